"""Tiny models and fakes for tests, yours included. Needs the `onnx` package (triform[cli]).

model = testing.linear(tmp_path / "linear.onnx")        # y = x @ w
repository = testing.repository(tmp_path / "models", {"linear": model})
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from triform.packaging import package_model
from triform.repository import ModelRepository, open_repository
from triform.signature import BY_OIP
from triform.telemetry import InferenceRecord, LoadRecord, RunRecord, SplitRecord

OPSET: Final = 17


def value(name: str, datatype: str, shape: Sequence[int | str | None]) -> Any:
    """A graph input or output; `datatype` in the Open Inference Protocol's words."""
    return helper.make_tensor_value_info(name, BY_OIP[datatype].onnx_enum, list(shape))


def save(
    path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], constants: Mapping[str, Any] | None = None
) -> Path:
    """An ONNX file of these nodes; constants are numpy arrays by name. The same arguments give the same bytes."""
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="triform.testing"
    )
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def linear(path: Path, *, features: int = 3, outputs: int = 1, rows: int | str | None = "N") -> Path:
    """y = x @ w: x FP32[rows, features] -> y FP32[rows, outputs]; w counts up from 1, so sums are easy to follow."""
    weights = np.arange(1, features * outputs + 1, dtype=np.float32).reshape(features, outputs)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save(path, [node], [value("x", "FP32", [rows, features])], [value("y", "FP32", [rows, outputs])], {"w": weights})


def identity(path: Path, datatype: str, *, shape: Sequence[int | str | None] = ("N",)) -> Path:
    """y = x of any datatype."""
    return save(path, [helper.make_node("Identity", ["x"], ["y"])], [value("x", datatype, shape)], [value("y", datatype, shape)])


def lookup(path: Path, *, entries: int = 10) -> Path:
    """y = 10 * x by a table: x INT64[rows] -> y FP32[rows]. An x outside 0..entries-1 makes the whole run fail."""
    table = (10.0 * np.arange(entries)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "x"], ["y"], axis=0)
    return save(path, [node], [value("x", "INT64", ["N"])], [value("y", "FP32", ["N"])], {"table": table})


def fragile(path: Path, *, entries: int = 10) -> Path:
    """`lookup`, but an x of -2 kills the process on x86: SIGFPE, for the least of all integers is divided by -1."""
    nodes = [
        helper.make_node("Add", ["x", "one"], ["divisor"]),
        helper.make_node("Div", ["least", "divisor"], ["quotient"]),
        helper.make_node("Mul", ["quotient", "zero"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["added"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "x"], ["found"], axis=0),
        helper.make_node("Add", ["found", "added"], ["y"]),
    ]
    table = (10.0 * np.arange(entries)).astype(np.float32)
    constants = {"table": table, "one": np.array([1]), "zero": np.array([0]), "least": np.array([-(2**63)])}
    return save(path, nodes, [value("x", "INT64", ["N"])], [value("y", "FP32", ["N"])], constants)


def centred(path: Path) -> Path:
    """y = x - mean over the batch: a model whose rows depend on one another. x FP32[rows, 2] -> y FP32[rows, 2]."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])]
    return save(path, nodes, [value("x", "FP32", ["N", 2])], [value("y", "FP32", ["N", 2])])


def slow(path: Path, *, layers: int = 200, width: int = 256) -> Path:
    """Many small layers, so that a deadline falls between two of them. x FP32[rows, width] -> y FP32[rows, width]."""
    names = ["x", *(f"h{i}" for i in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    tensors = [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])]
    return save(path, nodes, *tensors, {"w": np.eye(width, dtype=np.float32)})


def text_and_number(path: Path) -> Path:
    """is_a = (word == "a"), twice = 2 * x: word BYTES[rows, 1], x FP32[rows, 1] -> is_a BOOL[rows, 1], twice FP32[rows, 1]."""
    nodes = [
        helper.make_node(
            "LabelEncoder", ["word"], ["code"], domain="ai.onnx.ml", keys_strings=["a"], values_int64s=[1], default_int64=0
        ),
        helper.make_node("Cast", ["code"], ["is_a"], to=TensorProto.BOOL),
        helper.make_node("Add", ["x", "x"], ["twice"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("word", "BYTES", ["N", 1]), value("x", "FP32", ["N", 1])],
        [value("is_a", "BOOL", ["N", 1]), value("twice", "FP32", ["N", 1])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def repository(root: Path, models: Mapping[str, Path], *, config: Mapping[str, str] | None = None) -> ModelRepository:
    """A repository with each ONNX file packaged as version 1; `config` has the text of a model.toml by model."""
    made = open_repository(root)
    for name, path in models.items():
        toml = None
        if config and name in config:
            toml = path.with_suffix(".toml")
            toml.write_text(config[name])
        package_model(path, name=name, repository=made, config=toml)
    return made


class RecordingTelemetry:
    """A `Telemetry` that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[InferenceRecord] = []
        self.loads: list[LoadRecord] = []
        self.runs: list[RunRecord] = []
        self.splits: list[SplitRecord] = []

    def record(self, inference: InferenceRecord) -> None:
        self.records.append(inference)

    def loaded(self, load: LoadRecord) -> None:
        self.loads.append(load)

    def ran(self, run: RunRecord) -> None:
        self.runs.append(run)

    def shared(self, split: SplitRecord) -> None:
        self.splits.append(split)
