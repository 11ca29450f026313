"""Two modes of `benchmarks/serving.py` with models that take a while, which dynamic batching is for.

batching: raw runs of 16 rows, one after another, in this process, before and after
          | the batcher alone, in this process | 48 clients of the server with a row each | arrivals at 70% of the raw rows/s
          of a model of 10 ms for a row, and of one of 10 ms for 16 rows, whose server has many more requests to answer
scaling:  1 and 2 replicas, of the latter and of the tiny one
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load import Ask, Load, closed_loop, open_loop, poisson
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, lasting, open_session, packaged, run_seconds
from benchmarks.servers.running import Running
from benchmarks.servers.ways import MODEL, WAYS, Place
from ray_apps.replica import SWITCH
from triform.batching import DynamicBatcher
from triform.predictor import Predictor
from triform.repository import open_repository

ROWS, SECONDS = 16, 0.010  # of a run
CLIENTS = 3 * ROWS  # a run's worth is being run, another waits, the third is on its way
OF_A_RUN = (1, ROWS)  # rows for which the two models take `SECONDS`
SHARE = 0.7
DEADLINE = 30.0  # seconds that the batcher alone has for a request, as servers give them one
REPLICAS = (1, 2)
ARGS = {"overrides": {MODEL: {"max_rows": ROWS}}}


class Round(NamedTuple):
    """Seconds of raw runs of 1 row and of `ROWS`; rows a second of the batcher alone; Triform under clients that wait, and under
    arrivals that do not; the p99 of these arrivals, in seconds, did runs take what they take raw and all else no time."""

    one: float
    run: float
    alone: float
    closed: Load
    open: Load
    ideal: float

    @property
    def share(self) -> float:
        """Of the raw rows a second."""
        return self.closed.rate / (ROWS / self.run)


@contextmanager
def triform(files: tuple[Path, Path], args: dict[str, Any], encoding: str) -> Iterator[tuple[Running, Ask, Path]]:
    """Triform with the model, and a request of one row."""
    x, y = example(files[0])
    way = WAYS["triform"]
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        place = Place(*files, Path(work), args)
        with way.started(sys.executable, place, x, y) as server:
            yield server, way.encodings[encoding].ask(x), place.work


def batching(options: argparse.Namespace, report: Report) -> None:
    """models of 10 ms: throughput against raw batches, latency at 70%% load"""
    for rows in OF_A_RUN:
        batched(options, report, rows)


def batched(options: argparse.Namespace, report: Report, rows: int) -> None:
    """Of the model that takes `SECONDS` for so many rows."""
    files = lasting(options.root, rows, SECONDS)
    session = open_session(files[0])
    rounds = []
    for number in range(options.rounds):
        raw = [run_seconds(session, rows, options.seconds / 4) for rows in range(1, ROWS)]
        before = run_seconds(session, ROWS, options.seconds / 2)
        by_itself = alone(files[1], options.seconds)
        with triform(files, ARGS, "binary") as (server, ask, work):
            closed_loop(server.address, ask, clients=CLIENTS, seconds=1, work=work)
            closed = closed_loop(server.address, ask, clients=CLIENTS, seconds=options.seconds, work=work)
            due = poisson(SHARE * ROWS / before, options.seconds, seed=number)
            opened = open_loop(server.address, ask, due)
        run = (before + run_seconds(session, ROWS, options.seconds / 2)) / 2
        rounds.append(Round(raw[0], run, by_itself, closed, opened, ideal(due, [*raw, run])))
        print(f"round {number + 1} of {options.rounds}: {rounds[-1].share:.2f} of raw", flush=True)
    run = _median(rounds, "run")
    shares = [one.share for one in rounds]
    late = [one.open.p99 / one.run for one in rounds]
    told = [
        ["raw run of 1 row", f"{_median(rounds, 'one') * 1e3:.1f} ms", ""],
        [f"raw run of {ROWS} rows", f"{run * 1e3:.1f} ms, {ROWS / run:,.0f} rows/s", ""],
        [f"Triform, {CLIENTS} clients", f"{statistics.median(one.closed.rate for one in rounds):,.0f} rows/s", ""],
        ["of the raw rows/s", _spread(shares), "0.95"],
        ["the batcher alone, in one process, of the raw rows/s", _spread([one.alone * one.run / ROWS for one in rounds]), ""],
        ["p50, p99 with these clients", _latency([one.closed for one in rounds]), ""],
        [f"p50, p99 of arrivals at {SHARE:.0%} of the raw rows/s", _latency([one.open for one in rounds]), ""],
        [f"that p99, in runs of {ROWS}", _spread(late), "< 2"],
        ["the same, were there raw runs alone", _spread([one.ideal / one.run for one in rounds]), ""],
    ]
    report.table(
        f"A model of {SECONDS * 1e3:.0f} ms for {rows} row{'s' * (rows > 1)}, {ROWS} rows a run at most",
        ["", "seen", "goal"],
        told,
    )


def alone(repository: Path, seconds: float) -> float:
    """Rows a second of one `DynamicBatcher` and callers on its event loop: no server, no requests, no load from outside."""
    predictor = Predictor.load(open_repository(repository).package(MODEL, 1))
    (tensor,) = predictor.signature.inputs
    x = {tensor.name: example(repository.parent / "model.onnx")[0]}
    answered = 0

    async def caller(batcher: DynamicBatcher, ends: float) -> None:
        nonlocal answered
        while time.perf_counter() < ends:
            await batcher.infer(x, deadline=time.monotonic() + DEADLINE)
            answered += 1

    async def callers() -> None:
        batcher = DynamicBatcher(predictor, threads, max_rows=ROWS)
        ends = time.perf_counter() + seconds
        await asyncio.gather(*(caller(batcher, ends) for _ in range(CLIENTS)))

    had = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with ThreadPoolExecutor() as threads:
            began = time.perf_counter()
            asyncio.run(callers())
            return answered / (time.perf_counter() - began)
    finally:
        sys.setswitchinterval(had)


def ideal(due: Sequence[float], raw: Sequence[float]) -> float:
    """The p99 in seconds of requests of one row, were there nothing but runs: each of what waits when the one before it ends, in
    the time of a `raw` run of as many rows, of which the first is of 1."""
    latencies, ended, first = list[float](), 0.0, 0
    while first < len(due):
        begins = max(ended, due[first])
        last = min(bisect_right(due, begins), first + len(raw))
        ended = begins + raw[last - first - 1]
        latencies += [ended - at for at in due[first:last]]
        first = last
    return float(np.quantile(latencies, 0.99))


def scaling(options: argparse.Namespace, report: Report) -> None:
    """1 and 2 replicas"""
    models = {f"{SECONDS * 1e3:.0f} ms for {ROWS} rows": (lasting(options.root, ROWS, SECONDS), ARGS, "binary")}
    models["tiny"] = (packaged(options.root, "tiny", TINY), {}, "JSON")
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in models for count in REPLICAS}
    for number in range(options.rounds):
        for (name, count), seen in rates.items():
            files, args, encoding = models[name]
            with triform(files, {**args, "num_replicas": count}, encoding) as (server, ask, work):
                clients = CLIENTS * count
                closed_loop(server.address, ask, clients=clients, seconds=1, work=work)
                seen.append(closed_loop(server.address, ask, clients=clients, seconds=options.seconds, work=work).rate)
            print(f"round {number + 1} of {options.rounds}, {name}, {count} replica(s): {seen[-1]:,.0f}/s", flush=True)
    rows = []
    for name in models:
        one, two = (rates[name, count] for count in REPLICAS)
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        rows.append([name, f"{statistics.median(one):,.0f}", f"{statistics.median(two):,.0f}", _spread(ratios)])
    columns = ["model", "1 replica: req/s", "2 replicas: req/s", "times"]
    report.table(f"Replicas, one row a request, {CLIENTS} clients for each", columns, rows)


def _median(rounds: Sequence[Round], field: str) -> float:
    return statistics.median(getattr(one, field) for one in rounds)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _latency(loads: Sequence[Load]) -> str:
    p50, p99 = (statistics.median(getattr(load, p) for load in loads) * 1e3 for p in ("p50", "p99"))
    return f"{p50:.1f}, {p99:.1f} ms"
