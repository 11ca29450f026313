"""A signature from what the graph declares and, above all, from what runs returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triform import layout, testing
from triform.config import InputConfig, ModelConfig, OutputConfig
from triform.errors import ConfigurationError, UnsupportedModel
from triform.runtime import RuntimeOptions, open_session
from triform.signature import TensorMetadata


def inputs_of(path: Path, declared: list[int | str | None], **given: Any) -> layout.Inputs:
    session = open_session(testing.identity(path, "FP32", shape=declared), RuntimeOptions(), 1)
    return layout.input_metadata(session, ModelConfig(inputs={"x": InputConfig(**given)} if given else {}))


@pytest.mark.parametrize(
    ("shape", "given", "seen", "fixed", "names"),
    [
        (["N", 3], {}, ("rows", 3), None, {"N"}),
        ([None, 3], {}, ("rows", 3), None, set()),
        (["?", 3, "?", "?"], {}, ("rows", 3, -1, -1), None, set()),  # Paddle's name for each dynamic dimension
        (["N", "height", "width"], {}, ("rows", "height", "width"), None, {"N"}),
        (["N", "rows"], {}, ("rows", "rows_"), None, {"N"}),
        ([8, 3], {}, ("rows", 3), 8, set()),
        ([2, "N", 128], {"batch_axis": 1}, ("rows", 2, 128), None, {"N"}),
        (["N", 3, "h", "w"], {"shape": ("N", 3, 48, "w")}, ("rows", 3, 48, "w"), None, {"N"}),
    ],
)
def test_inputs_are_seen_with_their_rows_first(
    tmp_path: Path, shape: Any, given: dict[str, Any], seen: Any, fixed: int | None, names: set[str]
) -> None:
    assert inputs_of(tmp_path / "m.onnx", shape, **given) == ((TensorMetadata("x", "FP32", seen),), fixed, names)


@pytest.mark.parametrize(
    ("shape", "given", "complaint"),
    [
        ([], {}, r"'x' is a scalar.*\n\[inputs.x\]\nconstant"),
        (["N", "N"], {}, r"(?s)batch dimension 'N' on a second axis.*\[inputs.x\]\nbatch_axis"),
        (["N"], {"constant": [1.0]}, "no input left to feed"),
    ],
)
def test_inputs_without_rows_are_refused(tmp_path: Path, shape: Any, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        inputs_of(tmp_path / "m.onnx", shape, **given)


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_batch_axis_that_is_not_there_is_refused(tmp_path: Path, axis: int) -> None:
    with pytest.raises(ConfigurationError, match=f"inputs.x.batch_axis: {axis}"):
        inputs_of(tmp_path / "m.onnx", ["N", 3], batch_axis=axis)


def outputs_of(path: Path, declared: list[int | str | None], *came: tuple[int, ...], axis: int = 0, width: Any = 3) -> Any:
    """The output's shape, where runs of 3 and 2 rows returned arrays of the shapes `came`."""
    session = open_session(testing.identity(path, "FP32", shape=declared), RuntimeOptions(), 1)
    seen = layout.Inputs((TensorMetadata("x", "FP32", ("rows", width)),), None, {"N"})
    runs = [(rows, {"y": np.zeros(shape)}) for rows, shape in zip((3, 2), came, strict=True)]
    config = ModelConfig(outputs={"y": OutputConfig(batch_axis=axis)})
    return layout.output_metadata(session, config, seen, runs)[0].shape


def test_outputs_have_the_shape_that_came(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    assert outputs_of(model, ["N", 4], (3, 4), (2, 4)) == ("rows", 4)
    assert outputs_of(model, ["N", 4], (3, 5), (2, 5)) == ("rows", 5)  # the declared size lies
    assert outputs_of(model, ["N", 4], (3, 4, 2), (2, 4, 2)) == ("rows", 4, 2)  # the declared rank lies
    assert outputs_of(model, ["N", "k"], (3, 4), (2, 5)) == ("rows", "k")
    assert outputs_of(model, ["N", None], (3, 4), (2, 5)) == ("rows", -1)
    assert outputs_of(model, ["N", "k"], (3, 4), (2, 4), width=-1) == ("rows", "k")  # it may follow the free input
    assert outputs_of(model, ["N", 4], (3, 4), (2, 4), width=-1) == ("rows", 4)
    assert outputs_of(model, [4, "N"], (4, 3), (4, 2), axis=1) == ("rows", 4)


@pytest.mark.parametrize(
    ("came", "advice"),
    [
        ([(4, 3), (4, 2)], r"its rows are on axis 1: say so in model.toml:\n\[outputs.y\]\nbatch_axis = 1"),
        ([(4,), (4,)], r"(?s)\[inputs.NAME\]\nbatch_axis = 1.*\[outputs.y\]\ndrop = true"),
        ([(), ()], r"(?s)drop = true"),
    ],
)
def test_outputs_without_rows_are_refused_with_advice(tmp_path: Path, came: Any, advice: str) -> None:
    with pytest.raises(UnsupportedModel, match=advice):
        outputs_of(tmp_path / "m.onnx", ["N", 4], *came)
