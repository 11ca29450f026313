"""How fast one process scores the flights from Parquet to Parquet, beside the loop one would write by hand.

    python -m benchmarks.scoring [--data build/flights] [--plot docs/img/scoring.svg]

The hand-written loop reads a file whole, stacks its columns, runs ONNX Runtime, and writes the answers: no dead letters (it
drops rows with nulls), no streaming, no checks, no fsync. Both get one ONNX Runtime thread. Interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.plot import bars
from examples.flights import build
from triform.features import Features
from triform.package import ModelPackage
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.runs import inputs
from triform.runs.plan import Pinned, Plan, make_plan
from triform.runtime import RuntimeOptions, open_session
from triform.scoring import Layout, score_part
from triform.sources import Sources

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("build/flights"), help="the flights example; built if it is not there")
    parser.add_argument("--plot", type=Path, help="also draw the table to this SVG")
    options = parser.parse_args()
    data: Path = options.data
    build.build(data)
    sources = Sources()
    files = [file for file, _ in inputs.read_files(inputs.find([str(data / "input")], sources), sources)]
    layout = Layout(key=("id",), keep=("carrier",))
    table = Table("model", "by hand, rows/s", "triform.scoring, rows/s", "ratio", "spread", title="flights, one process")
    refs: list[str] = []
    by_hand_rates: list[float] = []
    our_rates: list[float] = []
    for version in 1, 2:
        package = open_repository(data / "repository").package("flight-delay", version)
        pinned = Pinned(package.manifest.ref, package.manifest.digest)
        plan = make_plan(files, layout, model="flight-delay", pinned=pinned, repository="")
        refs.append(package.manifest.ref)
        measured = compare(plan, package)
        by_hand_rates.append(measured.by_hand)
        our_rates.append(measured.ours)
        ratio = measured.ours / measured.by_hand
        table.add_row(refs[-1], f"{measured.by_hand:,.0f}", f"{measured.ours:,.0f}", f"{ratio:.2f}", f"{measured.spread:.0%}")
    Console(width=110).print(table)
    if options.plot:
        series = {"by hand": by_hand_rates, "triform.scoring": our_rates}
        bars(options.plot, "Scoring the flights in one process", refs, series, "rows/s")


class Measured(NamedTuple):
    """Rows per second, medians; `spread` is (slowest - fastest) / median of our rounds."""

    by_hand: float
    ours: float
    spread: float


def compare(plan: Plan, package: ModelPackage) -> Measured:
    predictor = Predictor.load(package)
    session = open_session(package.model_path, RuntimeOptions(), threads=1)
    features = Features(package.manifest.signature, package.manifest.config)
    ways: list[Callable[[Path], None]] = [
        lambda folder: by_hand(plan, session, features, folder),
        lambda folder: with_triform(plan, predictor, folder),
    ]
    seconds: list[list[float]] = [[], []]
    for way in ways:
        timed(way)  # imports and caches
    for _ in range(ROUNDS):
        for way, times in zip(ways, seconds, strict=True):
            times.append(timed(way))
    hand, ours = (plan.rows / statistics.median(times) for times in seconds)
    spread = (max(seconds[1]) - min(seconds[1])) / statistics.median(seconds[1])
    return Measured(hand, ours, spread)


def timed(way: Callable[[Path], None]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        way(Path(folder))
        return time.perf_counter() - started


def by_hand(plan: Plan, session: object, features: Features, folder: Path) -> None:
    for part in plan.parts:
        table = pq.read_table(part.path, columns=[*features.columns, "id"]).drop_null()
        feed = {}
        for feature in features.inputs:
            columns = [table.column(c.name).to_numpy() for c in feature.columns]
            feed[feature.tensor.name] = np.column_stack(columns).astype(feature.tensor.dtype)
        _, probabilities = session.run(None, feed)  # type: ignore[attr-defined]
        answers = table.select(["id", "carrier"]).append_column("p_late", [probabilities[:, 1]])
        pq.write_table(answers, folder / f"{part.number}.parquet", compression="zstd", compression_level=1)


def with_triform(plan: Plan, predictor: Predictor, folder: Path) -> None:
    for part in plan.parts:
        data, dead = folder / f"{part.number}.parquet", folder / f"{part.number}.dead.parquet"
        score_part(part, predictor, plan.layout, data=data, dead_letters=dead)


if __name__ == "__main__":
    main()
