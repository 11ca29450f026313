"""The models that every host serves in these tests, small enough to know their answers by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from triform import testing
from triform.access import Access
from triform.http import HttpSurface, Limits
from triform.models import Models
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.service import InferenceService
from triform.signature import DATATYPES
from triform.telemetry import Telemetry

DEFAULT = "linear"
FLIGHTS = """
[inputs.x]
columns = ["distance", { name = "hour", null = "nan" }]
[outputs.score]
columns = ["p_on_time", "p_late"]
[outputs.outcome]
labels = ["on time", "late"]
[outputs.who]
columns = ["airline"]
"""


def build(folder: Path) -> Path:
    """A repository with, each as version 1:

    linear   x FP32[rows, 3] -> y FP32[rows, 1] = x @ [1, 2, 3]
    every    in_BOOL, in_UINT8, ... [rows] -> out_BOOL, out_UINT8, ...: each of the 13 datatypes as it came
    text     x BYTES[rows] -> y BYTES[rows], as it came
    lookup   x INT64[rows] -> y FP32[rows] = 10 * x for 0..9; any other x makes the run fail
    flights  columns distance, hour (null: NaN), carrier -> p_on_time, p_late, outcome: the larger, airline
    close    x FP32[rows, 3] -> y FP32[rows, 3] = x, and 2**-20 more in runs of more than two rows
    """
    repository = folder / "models"
    files = {
        "linear": testing.linear(folder / "linear.onnx"),
        "every": _every(folder / "every.onnx"),
        "text": testing.identity(folder / "text.onnx", "BYTES"),
        "lookup": testing.lookup(folder / "lookup.onnx"),
        "flights": _flights(folder / "flights.onnx"),
        "close": _close(folder / "close.onnx"),
    }
    testing.repository(repository, files, config={"flights": FLIGHTS})
    return repository


def _every(path: Path) -> Path:
    names = [d.oip for d in DATATYPES]
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in names]
    inputs = [testing.value(f"in_{name}", name, ["N"]) for name in names]
    return testing.save(path, nodes, inputs, [testing.value(f"out_{name}", name, ["N"]) for name in names])


def _flights(path: Path) -> Path:
    nodes = [
        helper.make_node("Identity", ["x"], ["score"]),
        helper.make_node("ArgMax", ["x"], ["outcome"], axis=1, keepdims=0),
        helper.make_node("Identity", ["carrier"], ["who"]),
    ]
    inputs = [testing.value("x", "FP32", ["N", 2]), testing.value("carrier", "BYTES", ["N"])]
    outputs = [
        testing.value("score", "FP32", ["N", 2]),
        testing.value("outcome", "INT64", ["N"]),
        testing.value("who", "BYTES", ["N"]),
    ]
    return testing.save(path, nodes, inputs, outputs)


def _close(path: Path) -> Path:
    """What vectorised kernels do to many a real model's last bits, by a rule that holds on every machine."""
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Greater", ["rows", "two"], ["many"]),
        helper.make_node("Cast", ["many"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["one", "little"], ["moved"]),
        helper.make_node("Add", ["x", "moved"], ["y"]),
    ]
    constants = {"two": np.array([2]), "little": np.array([2**-20], np.float32)}
    return testing.save(path, nodes, [testing.value("x", "FP32", ["N", 3])], [testing.value("y", "FP32", ["N", 3])], constants)


def surface(
    repository: Path,
    *,
    telemetry: Telemetry | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
    **options: Any,
) -> HttpSurface:
    """All of them behind the surface of `http.py`, in this process."""
    models = Models(form="serve", default=DEFAULT, telemetry=telemetry, **options)
    opened = open_repository(repository)
    for name in opened.models():
        package = opened.package(name, 1)
        models.add(name, 1, lambda package=package: Predictor.load(package))  # type: ignore[misc]
    return HttpSurface(InferenceService(models), limits, access)
