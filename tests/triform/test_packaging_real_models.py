"""Real models, taken from the wheels that `requirements/models.txt` installs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from triform.errors import UnsupportedModel

Pack = Callable[..., Any]


def in_wheel(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: run `make setup`"
    return Path(next(iter(spec.submodule_search_locations or ()))) / file


def rows(name: str, *shape: int) -> dict[str, Any]:
    return {name: np.random.default_rng(3).random(shape, np.float32)}


def assert_answers_like_the_bare_file(packed: Any, file: Path, inputs: dict[str, Any]) -> None:
    """Row by row within the tolerance that the package records for a close model, bit by bit for an exact one."""
    got, seen = packed.predict(**inputs), packed.manifest.row_independence
    raw = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    want = raw.run(None, inputs)
    for name, answer in zip([o.name for o in raw.get_outputs()], want, strict=True):
        assert seen.kind in ("exact", "close")
        np.testing.assert_allclose(got[name], answer, atol=seen.tolerance.atol, rtol=seen.tolerance.rtol)


def test_magika_is_close(pack: Pack, tmp_path: Path) -> None:
    file = in_wheel("magika", "models/standard_v3_3/model.onnx")
    samples = np.random.default_rng(0).integers(0, 257, (4, 2048), dtype=np.int32)
    np.savez(tmp_path / "s.npz", bytes=samples)
    packed = pack(file, samples=tmp_path / "s.npz")
    assert packed.manifest.row_independence.kind == "close"  # 8e-7 between batch sizes: facts-tools.md
    assert str(packed.manifest.signature.outputs[0]) == "target_label FP32[rows, 214]"
    assert_answers_like_the_bare_file(packed, file, {"bytes": samples[::-1].copy()})


OCR = {
    "ch_ppocr_mobile_v2.0_cls_mobile": (rows("x", 3, 3, 48, 192), [2]),
    "PP-OCRv6_det_small": (rows("x", 2, 3, 64, 96), [1, 64, 96]),
    "PP-OCRv6_rec_small": (rows("x", 2, 3, 48, 160), [20, 18710]),
}


@pytest.mark.parametrize("name", [*list(OCR)[:2], pytest.param("PP-OCRv6_rec_small", marks=pytest.mark.slow)])
def test_rapidocr_has_free_heights_and_widths(pack: Pack, name: str) -> None:
    file, (inputs, row_shape) = in_wheel("rapidocr", f"models/{name}.onnx"), OCR[name]
    packed = pack(file)
    answer = packed.predict(**inputs)
    assert [list(a.shape[1:]) for a in answer.values()] == [row_shape]
    assert_answers_like_the_bare_file(packed, file, inputs)


SR = "[inputs.sr]\nconstant = 16000\n"
STATE = "[inputs.state]\nbatch_axis = 1\n"
STATE_OUT = "[outputs.stateN]\nbatch_axis = 1\n"


@pytest.mark.parametrize(
    ("toml", "advice"),
    [
        (None, r"(?s)'sr' is a scalar.*\[inputs.sr\]\nconstant = "),
        (SR, r"(?s)'?state'?.*batch_axis = 1"),
        (SR + STATE, r"(?s)'stateN'.*batch_axis = 1"),
    ],
)  # fmt: skip
def test_silero_vad_is_refused_step_by_step(pack: Pack, toml: str | None, advice: str) -> None:
    with pytest.raises(UnsupportedModel, match=advice):
        pack(in_wheel("silero_vad", "data/silero_vad.onnx"), toml)


def test_silero_vad_works_as_advised_and_its_state_is_carried_by_the_caller(pack: Pack, tmp_path: Path) -> None:
    file = in_wheel("silero_vad", "data/silero_vad.onnx")
    np.savez(tmp_path / "s.npz", **audio(4))
    packed = pack(file, SR + STATE + STATE_OUT, samples=tmp_path / "s.npz")
    assert packed.manifest.row_independence.kind in ("exact", "close")
    assert [t.name for t in packed.manifest.signature.inputs] == ["input", "state"]
    clip, state = audio(2), np.zeros((2, 2, 128), np.float32)
    raw = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for _ in range(3):
        got = packed.predict(input=clip["input"], state=state)
        want = raw.run(None, {"input": clip["input"], "state": state.swapaxes(0, 1), "sr": np.array(16000)})
        np.testing.assert_allclose(got["output"], want[0], atol=1e-5)
        np.testing.assert_allclose(got["stateN"], want[1].swapaxes(0, 1), atol=1e-4)
        state = got["stateN"]
    assert np.abs(state).max() > 0


def audio(count: int) -> dict[str, Any]:
    return {**rows("input", count, 576), "state": np.zeros((count, 2, 128), np.float32)}
