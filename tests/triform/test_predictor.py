"""A loaded model: real packages, real ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from triform import testing
from triform.errors import ConfigurationError, DeadlineExceeded, InvalidInput, ProviderUnavailable, RowsNotKept, RunFailed
from triform.package import ModelPackage
from triform.predictor import Predictor, run_bound
from triform.runtime import RuntimeOptions, open_session
from triform.signature import BY_OIP, Array

Pack = Callable[..., Any]

VALUES: dict[str, Any] = {
    "BOOL": [True, False, True],
    **{f"INT{n}": [-(2 ** (n - 1)), 0, 2 ** (n - 1) - 1] for n in (8, 16, 32, 64)},
    **{f"UINT{n}": [0, 1, 2**n - 1] for n in (8, 16, 32, 64)},
    "FP16": [-0.0, np.inf, 65504],
    "FP32": [np.nan, 2**-149, -3.4e38],
    "FP64": [np.nan, 5e-324, -1.7e308],
    "BYTES": ["", "naïve 日本", "NUL \0 within and at the end\0"],
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelPackage]:
    """Packages by name, built once: models that answer with what they were asked, row by row."""
    folder = tmp_path_factory.mktemp("predictor")
    nodes = [helper.make_node("Identity", [f"x_{d}"], [f"y_{d}"]) for d in BY_OIP]
    models = {
        "everything": testing.save(
            folder / "everything.onnx",
            nodes,
            [testing.value(f"x_{d}", d, ["N"]) for d in BY_OIP],
            [testing.value(f"y_{d}", d, ["N"]) for d in BY_OIP],
        ),
        "padded": testing.identity(folder / "padded.onnx", "INT64"),
        "chunked": testing.identity(folder / "chunked.onnx", "INT64"),
        "text": testing.identity(folder / "text.onnx", "BYTES", shape=("N", 2)),
        "slow": testing.slow(folder / "slow.onnx"),
        "lookup": testing.lookup(folder / "lookup.onnx"),
    }
    config = {"padded": "[batching]\npad_to = [1, 4]", "chunked": "[batching]\nmax_rows = 3"}
    repository = testing.repository(folder / "models", models, config=config)
    return lambda name: repository.package(name, 1)


@pytest.fixture(scope="module")
def predictors(packages: Callable[[str], ModelPackage]) -> Callable[[str], Predictor]:
    loaded: dict[str, Predictor] = {}
    return lambda name: loaded.get(name) or loaded.setdefault(name, Predictor.load(packages(name)))


def everything(**changed: Any) -> dict[str, Any]:
    return {f"x_{d}": np.zeros(3, row.numpy) if d != "BYTES" else ["a"] * 3 for d, row in BY_OIP.items()} | changed


@pytest.mark.parametrize("datatype", list(BY_OIP))
def test_every_datatype_comes_back_as_it_went_in(datatype: str, predictors: Callable[[str], Predictor]) -> None:
    dtype = BY_OIP[datatype].numpy
    given = np.array(VALUES[datatype], dtype)
    for values in (given, given[::-1], np.repeat(given, 2)[::2]):  # strided views too
        answer = predictors("everything").predict(everything(**{f"x_{datatype}": values}))[f"y_{datatype}"]
        assert answer.dtype == dtype
        if dtype.kind == "f":
            assert answer.tobytes() == np.ascontiguousarray(values).tobytes()
        else:
            assert answer.tolist() == values.tolist()


@pytest.mark.parametrize(
    "words",
    [
        [["a", "é"], ["", "日本"]],
        [[b"a", "é".encode()], [b"", "日本".encode()]],
        np.array([["a", "é"], ["", "日本"]]),
        np.array([["a", "é"], ["", "日本"]], dtype=object),
        np.array([["a", "é".encode()], ["", np.str_("日本")]], dtype=object),
    ],
    ids=["str", "bytes", "numpy U", "objects", "mixed"],
)
def test_text_in_every_guise(words: Any, predictors: Callable[[str], Predictor]) -> None:
    assert predictors("text").predict({"x": words})["y"].tolist() == [["a", "é"], ["", "日本"]]


def test_bytes_that_are_not_utf8_are_refused(predictors: Callable[[str], Predictor]) -> None:
    with pytest.raises(InvalidInput, match="element 3 is not UTF-8"):
        predictors("text").predict({"x": [["a", "b"], ["c", b"\xff\xfe"]]})


@pytest.mark.parametrize("name", ["padded", "chunked"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9])
def test_padding_and_chunks_are_unseen(name: str, rows: int, predictors: Callable[[str], Predictor]) -> None:
    values = np.arange(rows) + 2**53
    answer = predictors(name).predict({"x": values})["y"]
    assert (answer.dtype, answer.tolist()) == (np.int64, values.tolist())


def test_no_rows_have_no_answers_of_the_right_shape(predictors: Callable[[str], Predictor]) -> None:
    answer = predictors("text").predict({"x": np.empty((0, 2), dtype=object)})["y"]
    assert (answer.shape, answer.dtype) == ((0, 2), np.dtype(object))


def test_rows_the_model_raises_on(predictors: Callable[[str], Predictor]) -> None:
    lookup = predictors("lookup")
    with pytest.raises(RunFailed, match=r"the model raised: .*out of data bounds") as error:
        lookup.predict({"x": [1, 99]})
    assert "/" not in str(error.value)
    assert lookup.predict({"x": [1, 9]})["y"].tolist() == [10, 90]


def test_the_deadline_ends_a_run(predictors: Callable[[str], Predictor]) -> None:
    """And the predictor answers as before after a run was cut off."""
    slow = predictors("slow")
    with pytest.raises(DeadlineExceeded, match="stopped at the deadline"):  # alone this takes seconds
        slow.predict({"x": np.ones((30_000, 256), np.float32)}, deadline=time.monotonic() + 0.2)
    one = np.arange(256, dtype=np.float32).reshape(1, 256)
    assert slow.predict({"x": one}, deadline=time.monotonic() + 60)["y"].tolist() == one.tolist()
    assert slow.predict({"x": one})["y"].tolist() == one.tolist()


def test_a_deadline_in_the_past_runs_nothing(predictors: Callable[[str], Predictor]) -> None:
    """These rows would make the model raise: it never saw them."""
    with pytest.raises(DeadlineExceeded, match="before the model ran"):
        predictors("lookup").predict({"x": [99]}, deadline=time.monotonic() - 1)


def test_threads_share_a_predictor(predictors: Callable[[str], Predictor]) -> None:
    lookup = predictors("lookup")

    def ask(seed: int) -> bool:
        random = np.random.default_rng(seed)
        for _ in range(50):
            values = random.integers(0, 10, random.integers(1, 20))
            deadline = time.monotonic() + 60 if random.random() < 0.5 else None
            if lookup.predict({"x": values}, deadline=deadline)["y"].tolist() != (10.0 * values).tolist():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_an_io_binding_answers_as_a_plain_run(packages: Callable[[str], ModelPackage]) -> None:
    """What a GPU session does, on the CPU."""
    session = open_session(packages("slow").model_path, RuntimeOptions(), 1)
    feed = {"x": np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)}
    assert run_bound(session, ["y"], feed, None)[0].tolist() == session.run(["y"], feed)[0].tolist()


def _axis_one(path: Path) -> Path:
    """y = scale * x with the rows of x and y on axis 1; scale is an input that the package fixes."""
    inputs = [testing.value("x", "FP32", [2, "B"]), testing.value("scale", "FP32", [])]
    return testing.save(path, [helper.make_node("Mul", ["x", "scale"], ["y"])], inputs, [testing.value("y", "FP32", [2, "B"])])


AXIS_ONE = "[inputs.x]\nbatch_axis = 1\n[inputs.scale]\nconstant = {}\n[outputs.y]\nbatch_axis = 1\n[batching]\nmax_rows = 2\n"


def test_rows_on_another_axis_and_a_constant_input(pack: Pack, tmp_path: Path) -> None:
    predictor = Predictor.load(pack(_axis_one(tmp_path / "m.onnx"), AXIS_ONE.format(10)).package)
    assert [str(t) for t in predictor.signature.inputs] == ["x FP32[rows, 2]"]
    answer = predictor.predict({"x": [[1, 2], [3, 4], [5, 6]]})["y"]
    assert answer.tolist() == [[10, 20], [30, 40], [50, 60]]
    with pytest.raises(InvalidInput, match="no input is called 'scale'"):
        predictor.predict({"x": [[1, 2]], "scale": 1})


@pytest.mark.parametrize("constant", ["1e39", "'ten'", "16777217"])
def test_a_constant_that_the_input_cannot_hold(constant: str, pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model.toml: inputs.scale.constant: .*FP32"):
        pack(_axis_one(tmp_path / "m.onnx"), AXIS_ONE.format(constant))


def test_a_model_that_drops_rows_is_caught(pack: Pack, tmp_path: Path) -> None:
    """It keeps its rows while they are positive, as its samples were."""
    nodes = [
        helper.make_node("Greater", ["x", "least"], ["keep"]),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    tensors = [testing.value("x", "FP32", ["N"])], [testing.value("y", "FP32", ["M"])]
    model = testing.save(tmp_path / "positive.onnx", nodes, *tensors, {"least": np.float32(-1e30)})
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"x": 1}\n{"x": 2}\n{"x": 3}\n')
    predictor = Predictor.load(pack(model, samples=samples).package)
    assert predictor.predict({"x": [1, 2]})["y"].tolist() == [1, 2]
    with pytest.raises(RowsNotKept, match=r"output 'y': 2 row\(s\) went in, shape \[1\] came out"):
        predictor.predict({"x": [1, -2e30]})


def test_a_required_provider_fails_closed(packages: Callable[[str], ModelPackage]) -> None:
    package = packages("lookup")
    cpu = Predictor.load(package, RuntimeOptions(required_providers=("CPUExecutionProvider",)))
    assert cpu.provider == "CPUExecutionProvider"
    for options in (RuntimeOptions(required_providers=("CUDAExecutionProvider",)), RuntimeOptions(provider="tensorrt")):
        with pytest.raises(ProviderUnavailable, match="not in this ONNX Runtime build"):
            Predictor.load(package, options)
    assert Predictor.load(package, RuntimeOptions(provider="auto")).predict({"x": [3]})["y"].tolist() == [30]


def test_loading_tells_how_long_each_stage_took(predictors: Callable[[str], Predictor]) -> None:
    seconds = predictors("slow").load_seconds
    assert set(seconds) == {"verify", "session", "warmup"}
    assert all(0 < s < 60 for s in seconds.values())


def test_a_session_that_no_longer_answers_as_it_did_is_noticed(packages: Callable[[str], ModelPackage]) -> None:
    predictor = Predictor.load(packages("lookup"))
    predictor.check()
    predictor._session = Predictor.load(packages("slow"))._session
    with pytest.raises(RunFailed):
        predictor.check()


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_the_gpu_answers_as_the_cpu(limit: int | None, packages: Callable[[str], ModelPackage]) -> None:
    required = ("CUDAExecutionProvider",)
    gpu = Predictor.load(packages("slow"), RuntimeOptions(provider="cuda", required_providers=required, gpu_mem_limit=limit))
    assert gpu.provider == "CUDAExecutionProvider"
    rows: Array = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    np.testing.assert_allclose(gpu.predict({"x": rows})["y"], rows, rtol=1e-2, atol=1e-3)  # TF32
