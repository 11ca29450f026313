"""What is read off a graph: external data that must lie beside it, nodes that mix rows, precision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from triform import graph, testing
from triform.errors import DigestMismatch, GoldenMismatch, PackageError, UnsafePackage
from triform.predictor import Predictor
from triform.testing import save, value

Pack = Callable[..., Any]
X = np.ones((2, 3), dtype=np.float32)


def with_external_data(path: Path, location: str = "weights.bin") -> Path:
    """testing.linear with its weights in a file beside it."""
    model = onnx.load(testing.linear(path))
    (path.parent / location).parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def at(path: Path, location: str) -> Path:
    """The same model, its weights said to lie somewhere else."""
    model = onnx.load(with_external_data(path), load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["weights.bin", "parts/w-0.bin"])
def test_external_data_is_packaged_and_verified(pack: Pack, tmp_path: Path, location: str) -> None:
    packed = pack(with_external_data(tmp_path / "source/l.onnx", location))
    assert set(packed.manifest.files) == {"model.onnx", "golden.npz", location}
    packed.package.verify("full")
    assert packed.predict(x=X)["y"].tolist() == [[6], [6]]


def test_weights_swapped_with_the_model_unchanged_are_not_served(pack: Pack, tmp_path: Path) -> None:
    package = pack(with_external_data(tmp_path / "source/l.onnx")).package
    (package.folder / "weights.bin").write_bytes(np.array([1, 2, 4], np.float32).tobytes())
    for level in ("golden", "full"):
        with pytest.raises(DigestMismatch, match=r"m/1: weights\.bin"):
            Predictor.load(package, verification=level)
    with pytest.raises(GoldenMismatch, match="output 'y'"):  # sealed trusts the digests, not the answers
        Predictor.load(package, verification="sealed")


def symbolic_link(folder: Path) -> None:
    (folder / "weights.bin").symlink_to(folder.parent / "secret.bin")


def hard_link(folder: Path) -> None:
    os.link(folder.parent / "secret.bin", folder / "weights.bin")


def link_of_the_folder(folder: Path) -> None:
    (folder / "weights").symlink_to(folder.parent)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "weights.bin")


UNSAFE: dict[str, Callable[[Path], None] | None] = {
    "../secret.bin": None, "../../secret.bin": None, "parts/../../secret.bin": None, "/etc/passwd": None, "C:\\secret.bin": None,
    "": None, ".": None, ".hidden": None, "a\nb": None, "model.onnx": None, "manifest.json": None,
}  # fmt: skip
LINKED = [
    ("weights.bin", symbolic_link),
    ("weights.bin", hard_link),
    ("weights/secret.bin", link_of_the_folder),
    ("weights.bin", pipe),
]


@pytest.mark.parametrize(("location", "spoil"), [*UNSAFE.items(), *LINKED])
def test_external_data_elsewhere_is_refused_and_not_read(
    pack: Pack, tmp_path: Path, location: str, spoil: Callable[[Path], None] | None
) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.array([7, 7, 7], np.float32).tobytes())
    model = at(tmp_path / "source/l.onnx", location)
    if spoil:
        (model.parent / "weights.bin").unlink()
        spoil(model.parent)
    os.utime(secret, ns=(0, time.time_ns()))  # an access time before the change time is renewed by any read (relatime)
    with pytest.raises(UnsafePackage):
        pack(model)
    assert secret.stat().st_atime_ns == 0
    assert [p for p in (tmp_path / "models").rglob("*") if p.is_file()] == []


def test_external_data_that_is_missing_is_named(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"external data other\.bin cannot be read"):
        pack(at(tmp_path / "source/l.onnx", "other.bin"))


def external(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    return tensor


def hide_in_a_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "b", [], [value("w", "FP32", [3])], [external("w")])
    model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch))


def hide_in_a_function(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "b", [], [value("w", "FP32", [3])], [external("w")])
    node = helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)
    model.functions.append(helper.make_function("d", "F", ["c"], ["o"], [node], [helper.make_opsetid("", 17)]))


def hide_in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["o"], value=external("v")))


def hide_in_a_sparse_constant(model: onnx.ModelProto) -> None:
    sparse = onnx.SparseTensorProto(values=external("v"), indices=numpy_helper.from_array(np.arange(3), "i"), dims=[3])
    node = helper.make_node("Constant", [], ["o"])
    node.attribute.append(AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    model.graph.node.append(node)


@pytest.mark.parametrize("hide", [hide_in_a_branch, hide_in_a_function, hide_in_a_constant, hide_in_a_sparse_constant])
def test_external_data_is_found_wherever_a_graph_can_hold_tensors(
    pack: Pack, tmp_path: Path, hide: Callable[[onnx.ModelProto], None]
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(12))
    model = onnx.load(testing.linear(tmp_path / "source/l.onnx"))
    hide(model)
    (tmp_path / "source/l.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafePackage, match=r"\.\./secret\.bin"):
        pack(tmp_path / "source/l.onnx")


def one_node(
    path: Path, op: str, *, batch: str = "N", constants: dict[str, Any] | None = None, **attributes: Any
) -> onnx.ModelProto:
    tensors = [value("x", "FP32", [batch, 2])], [value("y", "FP32", [batch, 2])]
    return onnx.load(save(path, [helper.make_node(op, ["x", *(constants or {})], ["y"], **attributes)], *tensors, constants))


MIXING = [
    ("Softmax", {"axis": 0}, None, True),
    ("Softmax", {"axis": -2}, None, True),
    ("Softmax", {"axis": -1}, None, False),
    ("Softmax", {}, None, False),
    ("LogSoftmax", {"axis": 0}, None, True),
    ("ReduceMax", {"axes": [0]}, None, True),
    ("ReduceMax", {"axes": [0, 1]}, None, True),
    ("ReduceMax", {}, None, True),
    ("ReduceMax", {"axes": [1]}, None, False),
    ("ReduceSum", {}, {"axes": np.array([0])}, True),
    ("ReduceSum", {}, {"axes": np.array([1])}, False),
    ("ReduceSum", {"noop_with_empty_axes": 1}, None, False),
    ("CumSum", {}, {"axis": np.array(0)}, True),
    ("CumSum", {}, {"axis": np.array(1)}, False),
]


@pytest.mark.parametrize(("op", "attributes", "constants", "mixes"), MIXING)
def test_what_runs_over_the_batch_axis_is_found(
    tmp_path: Path, op: str, attributes: dict[str, Any], constants: dict[str, Any] | None, mixes: bool
) -> None:
    model = one_node(tmp_path / "m.onnx", op, constants=constants, **attributes)
    reasons = graph.mixing_nodes(model, {"N"}, {"y"})
    assert bool(reasons) is mixes
    assert all(op in reason for reason in reasons)
    assert bool(graph.mixing_nodes(model, {"N"}, {"another output"})) is False  # what is dropped does not count


def test_precision_is_that_of_most_weights(tmp_path: Path) -> None:
    for dtype, name in ((np.float32, "fp32"), (np.float64, "fp64"), (np.float16, "fp16"), (np.int8, "int8")):
        weights = {"w": np.ones((4, 4), dtype), "few": np.ones(1, np.float32)}
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
        model = onnx.load(save(tmp_path / "m.onnx", nodes, [value("x", "FP32", ["N"])], [value("y", "FP32", ["N"])], weights))
        assert graph.precision(model) == name
