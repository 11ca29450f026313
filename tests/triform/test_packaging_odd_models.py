"""Models out of the ordinary: each works, is refused with what to write into model.toml, or is refused and says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from triform import testing
from triform.errors import ConfigurationError, InvalidRequest, PackageError, UnsupportedModel
from triform.testing import save, value

Pack = Callable[..., Any]
X = np.array([[1, 2, 3], [-1, 0, 5]], dtype=np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def rows_on_axis_1(path: Path) -> Path:
    """Sums each column of a [4, rows] tensor: the rows stand on axis 1."""
    axes = {"axes": np.array([0])}
    return save(
        path, [node("ReduceSum", "x axes", "y", keepdims=0)], [value("x", "FP32", [4, "N"])], [value("y", "FP32", ["N"])], axes
    )


def turned(path: Path) -> Path:
    """The answer comes with its rows on axis 1."""
    return save(path, [node("Transpose", "x", "y")], [value("x", "FP32", ["N", 3])], [value("y", "FP32", [3, "N"])])


def scalar(path: Path) -> Path:
    inputs = [value("x", "FP32", ["N", 3]), value("scale", "FP32", [])]
    return save(path, [node("Mul", "x scale", "y")], inputs, [value("y", "FP32", ["N", 3])])


def sequence(path: Path) -> Path:
    nodes = [node("SplitToSequence", "x", "parts", axis=1), node("Neg", "x", "y")]
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    return save(path, nodes, [value("x", "FP32", ["N", 3])], [value("y", "FP32", ["N", 3]), parts])


def total(path: Path) -> Path:
    """One number for the whole batch beside an answer per row."""
    nodes = [node("Neg", "x", "y"), node("ReduceSum", "x", "total", keepdims=0)]
    return save(path, nodes, [value("x", "FP32", ["N", 3])], [value("y", "FP32", ["N", 3]), value("total", "FP32", [])])


def stateful(path: Path) -> Path:
    """A state [1, rows, 2] goes in and comes out moved on."""
    nodes = [node("ReduceSum", "x axes", "s", keepdims=1), node("Add", "state s", "moved"), node("Neg", "x", "y")]
    inputs = [value("x", "FP32", ["N", 3]), value("state", "FP32", [1, "N", 1])]
    return save(path, nodes, inputs, [value("y", "FP32", ["N", 3]), value("moved", "FP32", [1, "N", 1])], {"axes": np.array([1])})


ADVISED = [
    (rows_on_axis_1, r"\[inputs.NAME\]\nbatch_axis", "[inputs.x]\nbatch_axis = 1", {"x": np.ones((2, 4))}, {"y": [4, 4]}),
    (turned, r"\[outputs.y\]\nbatch_axis = 1", "[outputs.y]\nbatch_axis = 1", {"x": X}, {"y": X}),
    (scalar, r"'scale' is a scalar.*\n\[inputs.scale\]\nconstant", "[inputs.scale]\nconstant = 2", {"x": X}, {"y": 2 * X}),
    (sequence, r"'parts' is seq.*drop = true", "[outputs.parts]\ndrop = true", {"x": X}, {"y": -X}),
    (total, r"(?s)'total' has no rows.*\[outputs.total\]\ndrop = true", "[outputs.total]\ndrop = true", {"x": X}, {"y": -X}),
    (
        stateful,
        r"(?s)'state' has the batch dimension.*\[inputs.state\]\nbatch_axis",
        "[inputs.state]\nbatch_axis = 1\n[outputs.moved]\nbatch_axis = 1",
        {"x": X, "state": np.zeros((2, 1, 1))},
        {"y": -X, "moved": [[[6]], [[4]]]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "advice", "toml", "inputs", "answers"), ADVISED, ids=[case[0].__name__ for case in ADVISED])
def test_refused_with_advice_that_works(
    pack: Pack, tmp_path: Path, build: Any, advice: str, toml: str, inputs: dict[str, Any], answers: dict[str, Any]
) -> None:
    model = build(tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModel, match=advice):
        pack(model)
    packed = pack(model, toml)
    assert packed.manifest.row_independence.kind == "exact"
    got = packed.predict(**inputs)
    assert got.keys() == answers.keys()
    for name, answer in answers.items():
        np.testing.assert_array_equal(got[name], answer)


def doubled_in_a_loop(path: Path) -> Path:
    """y = 8 x, by three turns of a Loop."""
    body = helper.make_graph(
        [node("Add", "h h", "h2"), node("Identity", "go", "on")],
        "body",
        [value("i", "INT64", []), value("go", "BOOL", []), value("h", "FP32", ["N", 3])],
        [value("on", "BOOL", []), value("h2", "FP32", ["N", 3])],
    )
    constants = {"three": np.array(3), "true": np.array(True)}
    return save(
        path,
        [node("Loop", "three true x", "y", body=body)],
        [value("x", "FP32", ["N", 3])],
        [value("y", "FP32", ["N", 3])],
        constants,
    )


def chosen_by_if(path: Path) -> Path:
    """y = -x if a constant says so."""
    branches = {
        f"{side}_branch": helper.make_graph([node(op, "x", side)], side, [], [value(side, "FP32", ["N", 3])])
        for side, op in (("then", "Neg"), ("else", "Abs"))
    }
    nodes = [node("If", "yes", "y", **branches)]
    return save(path, nodes, [value("x", "FP32", ["N", 3])], [value("y", "FP32", ["N", 3])], {"yes": np.array(True)})


def summed_by_scan(path: Path) -> Path:
    """y = running sums along the features, by a Scan over axis 1."""
    body = helper.make_graph(
        [node("Add", "sum one", "next"), node("Identity", "next", "out")],
        "body",
        [value("sum", "FP32", ["N"]), value("one", "FP32", ["N"])],
        [value("next", "FP32", ["N"]), value("out", "FP32", ["N"])],
    )
    nodes = [
        node("ReduceSum", "x axes", "s", keepdims=0),
        node("Sub", "s s", "zero"),
        node("Scan", "zero x", "last y", body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1]),
    ]
    return save(path, nodes, [value("x", "FP32", ["N", 3])], [value("y", "FP32", ["N", 3])], {"axes": np.array([1])})


@pytest.mark.parametrize(
    ("build", "answer"), [(doubled_in_a_loop, 8 * X), (chosen_by_if, -X), (summed_by_scan, np.cumsum(X, axis=1))]
)
def test_subgraphs_work(pack: Pack, tmp_path: Path, build: Any, answer: Any) -> None:
    packed = pack(build(tmp_path / "m.onnx"))
    assert packed.manifest.row_independence.kind == "exact"
    np.testing.assert_array_equal(packed.predict(x=X)["y"], answer)


def random(path: Path) -> Path:
    return save(
        path,
        [node("RandomNormalLike", "x", "r"), node("Add", "x r", "y")],
        [value("x", "FP32", ["N", 3])],
        [value("y", "FP32", ["N", 3])],
    )


def bfloat16(path: Path) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["N", 3])]
    return save(path, [node("Cast", "x", "y", to=TensorProto.FLOAT)], inputs, [value("y", "FP32", ["N", 3])])


def custom_op(path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")],
        "g",
        [value("x", "FP32", ["N", 3])],
        [value("y", "FP32", ["N", 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def takes_nothing_that_is_made_up(path: Path) -> Path:
    """Reshapes to what only rows of 5 * 7 values could be."""
    nodes = [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")]
    constants = {"shape": np.array([-1, 35]), "w": np.ones((35, 1), np.float32)}
    return save(path, nodes, [value("x", "FP32", ["N", "w"])], [value("y", "FP32", ["M", 1])], constants)


def written(content: bytes) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return build


def three_gigabytes(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(3 << 30)  # sparse: it takes no room
    return path


REFUSED = {
    "random": (random, "the same rows get different answers.*RandomNormalLike"),
    "bf16": (bfloat16, "'x' is BF16.*Cast"),
    "custom op": (custom_op, "com.example.*Frobnicate|Frobnicate.*com.example"),
    "batch of four with mixing rows": (lambda p: centred_of_four(p), "cannot run alone.*dynamic batch axis"),
    "free size that fits nothing": (takes_nothing_that_is_made_up, r"--samples, or the true shape with \[inputs.NAME\] shape"),
    "text": (written(b"hello, this is a text file"), "not an ONNX model"),
    "html": (written(b"<!DOCTYPE html><html></html>"), "not an ONNX model"),
    "empty": (written(b""), "not an ONNX model"),
    "pickle": (written(b"\x80\x04\x95\x0b\x00\x00\x00"), "not an ONNX model"),
    "over 2 GB": (three_gigabytes, "protobuf reads 2 GB.*save_as_external_data"),
}


def centred_of_four(path: Path) -> Path:
    nodes = [node("ReduceMean", "x", "m", axes=[0], keepdims=1), node("Sub", "x m", "y")]
    return save(path, nodes, [value("x", "FP32", [4, 2])], [value("y", "FP32", [4, 2])])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_published(pack: Pack, tmp_path: Path, case: str) -> None:
    build, why = REFUSED[case]
    with pytest.raises(PackageError, match=f"(?s){why}"):
        pack(build(tmp_path / "m.onnx"))
    assert [p for p in (tmp_path / "models").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("name", ["nothing.onnx", "."])
def test_a_model_that_is_not_there_is_wrong_use(pack: Pack, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        pack(tmp_path / name)


BAD_TOML = {
    "[inputs.z]\nbatch_axis = 1": "inputs.z: the model has no such input",
    "[outputs.z]\ndrop = true": "outputs.z: the model has no such output",
    "[inputs.x]\nbatch_axis = 2": "inputs.x.batch_axis",
    '[inputs.x]\ncolumns = ["a", "b"]': "names 2 columns",
    '[outputs.y]\ncolumns = ["a", "b"]': "names 2 column",
    "[runtime]\nthreads = 4096": "runtime.threads",
    "[batching]\npad_to = [8, 1]": "batching.pad_to",
    "[batchin]": "batchin",
    "x = [": "not TOML",
}  # fmt: skip


@pytest.mark.parametrize("toml", BAD_TOML)
def test_a_model_toml_that_does_not_fit_is_refused_by_its_key(pack: Pack, tmp_path: Path, toml: str) -> None:
    with pytest.raises(ConfigurationError, match=BAD_TOML[toml]):
        pack(testing.linear(tmp_path / "l.onnx"), toml)


@pytest.mark.parametrize("sizes", [[1, 8], [4, 8]])
def test_padding_sizes_are_kept_and_change_no_answer(pack: Pack, tmp_path: Path, sizes: list[int]) -> None:
    packed = pack(testing.linear(tmp_path / "l.onnx"), f"[batching]\npad_to = {sizes}")
    rows = np.array(list(itertools.islice(itertools.cycle(X.tolist()), 11)), dtype=np.float32)
    np.testing.assert_array_equal(packed.predict(x=rows)["y"], rows @ np.array([[1], [2], [3]], np.float32))
