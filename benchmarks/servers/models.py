"""The models that are served: perceptrons of random weights."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import helper

from benchmarks.servers.ways import MODEL
from triform import testing
from triform.repository import open_repository

TINY = (30, 64, 32, 1)
WIDTH = 1024


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
