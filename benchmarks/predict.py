"""What `Predictor.predict` costs on top of the bare ONNX Runtime session: validation, chunking, checks.

    python -m benchmarks.predict

Interleaved rounds in one process, one thread; medians, with the spread (interquartile range over median).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from triform import testing
from triform.predictor import Predictor
from triform.repository import ModelRepository
from triform.runtime import RuntimeOptions, open_session

ROUNDS = 400
ROWS = (1, 32, 1_000)


def main() -> None:
    table = Table(
        "model", "rows", "session.run", "run", "predict", "predict / session.run", "spread", title="time of one call, us"
    )
    with tempfile.TemporaryDirectory() as folder:
        models = {"linear": testing.linear(Path(folder) / "linear.onnx", features=30)}
        repository = testing.repository(Path(folder) / "models", models)
        for name in models:
            measure(name, repository, table)
    Console(width=110).print(table)


def measure(name: str, repository: ModelRepository, table: Table) -> None:
    package = repository.package(name, 1)
    predictor = Predictor.load(package)
    session = open_session(package.model_path, RuntimeOptions(), threads=1)
    for rows in ROWS:
        inputs = {"x": np.random.default_rng(0).standard_normal((rows, 30)).astype(np.float32)}
        calls: list[Callable[[], object]] = [
            lambda feed=inputs: session.run(["y"], feed),
            lambda feed=inputs: predictor.run(feed),
            lambda feed=inputs: predictor.predict(feed),
        ]
        bare, run, predict, spread = interleaved(calls)
        table.add_row(name, f"{rows:,}", f"{bare:.1f}", f"{run:.1f}", f"{predict:.1f}", f"{predict / bare:.2f}", f"{spread:.0%}")


def interleaved(calls: list[Callable[[], object]]) -> tuple[float, ...]:
    """The median time of each call in microseconds, and the spread of the last."""
    times = np.empty((ROUNDS, len(calls)))
    for i in range(ROUNDS):
        for j, call in enumerate(calls):
            started = time.perf_counter_ns()
            call()
            times[i, j] = (time.perf_counter_ns() - started) / 1e3
    low, middle, high = np.quantile(times[ROUNDS // 10 :], (0.25, 0.5, 0.75), axis=0)
    return (*middle.tolist(), float((high[-1] - low[-1]) / middle[-1]))


if __name__ == "__main__":
    main()
