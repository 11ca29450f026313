"""The models that are served: perceptrons of random weights."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import helper

from benchmarks.servers.ways import MODEL
from triform import testing
from triform.repository import open_repository

TINY = (30, 64, 32, 1)
WIDTH, LAYERS = 1024, 8  # of the model that is to take a while


def perceptron(path: Path, widths: Sequence[int]) -> Path:
    """x FP32[rows, widths[0]] -> y FP32[rows, widths[-1]]: fully connected layers with ReLU between them."""
    random = np.random.default_rng(0)
    constants, nodes, last = {}, [], "x"
    for i, (width, following) in enumerate(itertools.pairwise(widths)):
        constants[f"w{i}"] = (random.standard_normal((width, following)) * np.sqrt(2 / width)).astype(np.float32)
        constants[f"b{i}"] = np.zeros(following, np.float32)
        ends = i == len(widths) - 2
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], ["y" if ends else f"g{i}"]))
        if not ends:
            nodes.append(helper.make_node("Relu", [f"g{i}"], [f"h{i}"]))
            last = f"h{i}"
    inputs, outputs = [testing.value("x", "FP32", ["N", widths[0]])], [testing.value("y", "FP32", ["N", widths[-1]])]
    return testing.save(path, nodes, inputs, outputs, constants)


def open_session(model: Path) -> Any:
    """In this process, as the servers have it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def example(model: Path, rows: int = 1) -> tuple[Any, Any]:
    """Rows and what the model answers, both float32."""
    session = open_session(model)
    x = np.random.default_rng(1).standard_normal((rows, session.get_inputs()[0].shape[1])).astype(np.float32)
    return x, session.run(["y"], {"x": x})[0]


def run_seconds(session: Any, rows: int, seconds: float) -> float:
    """The median time of a run of so many rows."""
    x = np.random.default_rng(2).standard_normal((rows, session.get_inputs()[0].shape[1])).astype(np.float32)
    session.run(["y"], {"x": x})
    times, ended = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < ended or not times:
        session.run(["y"], {"x": x})
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def lasting(root: Path, rows: int, seconds: float) -> tuple[Path, Path]:
    """A model, packaged, that takes about so long for so many rows on this machine: with as many layers as that needs."""
    name = f"lasting-{rows}"
    had = root / "bench" / name / "widths.json"
    widths = json.loads(had.read_text()) if had.exists() else [WIDTH] * (LAYERS + 1)
    files = packaged(root, name, widths)
    took = run_seconds(open_session(files[0]), rows, 2.0)
    if 0.75 < took / seconds < 1.25:
        return files
    return packaged(root, name, [WIDTH] * (round((len(widths) - 1) * seconds / took) + 1))


def packaged(root: Path, name: str, widths: Sequence[int]) -> tuple[Path, Path]:
    """The ONNX file and a repository with it as `perceptron`, made if they are not there: under `root`/bench/`name`."""
    folder = root.absolute() / "bench" / name
    model, repository, shape = folder / "model.onnx", folder / "models", folder / "widths.json"
    if not shape.exists() or json.loads(shape.read_text()) != list(widths):
        print(f"making {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        perceptron(model, widths)
        testing.repository(repository, {MODEL: model}, config={MODEL: "[runtime]\nthreads = 1\n"})
        shape.write_text(json.dumps(widths))
    kind = open_repository(repository).package(MODEL, 1).manifest.row_independence.kind
    assert kind != "dependent", f"{name}: its rows are not independent, so it would not be batched"
    return model, repository
