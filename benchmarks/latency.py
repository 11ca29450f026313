"""Two modes of `benchmarks/serving.py` about what a single request takes.

by_rows:  Triform, one tritonclient, from an array of 1 to 1,000 rows to an array: in JSON, with binary tensors, over gRPC
arrivals: each server, arrivals by chance (Poisson) beside clients that wait for their answers
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from benchmarks import plot
from benchmarks.load import Load, LoadFailed, closed_loop, one_by_one, open_loop, poisson
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, packaged
from benchmarks.servers.running import Running, ServerFailed
from benchmarks.servers.ways import MODEL, WAYS, Place, installed

ROWS = (1, 16, 64, 256, 1000)
WIRES = ("JSON", "binary", "gRPC")
EACH = 1.0  # second, of a measurement by rows
CLIENTS = 32
RATES = (100, 500, 1000, 2000)  # arrivals a second; a client in Python does not send many more on time
WORTH = 0.9  # of what it answered to clients that wait: more is not offered to a server


class Seen(NamedTuple):
    """`cpu`: seconds of the server's processes for one request."""

    load: Load
    cpu: float


def by_rows(options: argparse.Namespace, report: Report) -> None:
    """JSON, binary and gRPC by the rows of a request"""
    files = packaged(options.root, "tiny", TINY)
    seen: dict[tuple[str, int], list[Seen]] = {(wire, rows): [] for rows in ROWS for wire in WIRES}
    way = WAYS["triform"]
    with (
        tempfile.TemporaryDirectory(prefix="serving-") as work,
        way.started(sys.executable, Place(*files, Path(work)), *example(files[0])) as server,
    ):
        examples = {rows: example(files[0], rows) for rows in ROWS}
        for _ in range(options.rounds):
            for wire, rows in seen:
                with _client(server, wire, *examples[rows]) as call:
                    load, cpu = server.measured(partial(one_by_one, call, EACH))
                seen[wire, rows].append(Seen(load, cpu / load.requests))
    table = []
    for rows in ROWS:
        p50 = {wire: statistics.median(one.load.p50 for one in seen[wire, rows]) for wire in WIRES}
        cells = [f"{rows:,}", *(f"{p50[wire] * 1e3:.2f}" for wire in WIRES)]
        cells += [f"{p50['JSON'] / p50[wire]:.2f}" for wire in WIRES[1:]]
        table.append([*cells, *(f"{statistics.median(one.cpu for one in seen[wire, rows]) * 1e6:,.0f}" for wire in WIRES)])
    columns = ["rows", *(f"{wire} p50 ms" for wire in WIRES), *(f"JSON's time / {wire}'s" for wire in WIRES[1:])]
    report.table(
        "One tritonclient, from array to array, by rows of 30 features", [*columns, *(f"{wire} CPU us" for wire in WIRES)], table
    )
    if options.plot:
        series = {wire: [statistics.median(one.load.p50 for one in seen[wire, rows]) * 1e3 for rows in ROWS] for wire in WIRES}
        plot.bars(options.plot / "serving_rows.svg", "One client", [f"{rows:,} rows" for rows in ROWS], series, "p50, ms")


@contextmanager
def _client(server: Running, wire: str, x: Any, y: Any) -> Iterator[Callable[[], object]]:
    """Asks with these rows, an array, and gets an array, which is the right one. Raises `ServerFailed`."""
    module = triton_grpc if wire == "gRPC" else triton_http
    binary = {} if wire == "gRPC" else {"binary_data": wire == "binary"}
    with module.InferenceServerClient("{}:{}".format(*(server.grpc if wire == "gRPC" else server.address))) as client:

        def call() -> Any:
            tensor = module.InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x, **binary)
            return client.infer(MODEL, [tensor], outputs=[module.InferRequestedOutput("y", **binary)]).as_numpy("y")

        if not np.allclose(call(), y, rtol=1e-4, atol=1e-5):
            raise ServerFailed(f"over {wire} it answers something else than the model")
        yield call


def arrivals(options: argparse.Namespace, report: Report) -> None:
    """arrivals that do not wait for answers"""
    pythons, failed = installed(options.only, options.root)
    files = packaged(options.root, "tiny", TINY)
    x, y = example(files[0])
    seen: dict[str, list[dict[int, Load]]] = {name: [] for name in pythons}  # by arrivals a second; 0: the closed loop
    for number in range(options.rounds):
        for name, python in pythons.items():
            way = WAYS[name]
            ask = way.encodings["JSON"].ask(x)
            try:
                with tempfile.TemporaryDirectory(prefix="serving-") as work:
                    place = Place(*files, Path(work))
                    with way.started(python, place, x, y) as server:
                        closed_loop(server.address, ask, clients=CLIENTS, seconds=1, work=place.work)
                        closed = closed_loop(server.address, ask, clients=CLIENTS, seconds=options.seconds, work=place.work)
                        rates = [rate for rate in RATES if rate <= WORTH * closed.rate]
                        due = {rate: poisson(rate, options.seconds, seed=number) for rate in rates}
                        seen[name].append({0: closed, **{rate: open_loop(server.address, ask, due[rate]) for rate in rates}})
            except (ServerFailed, LoadFailed) as error:
                failed[name] = f"round {number + 1}: {error}"
                print(f"{name}: {error}", flush=True)
                continue
            print(f"round {number + 1} of {options.rounds}, {name}: up to {max(seen[name][-1])} arrivals/s", flush=True)
    rows = []
    for name, its_rounds in seen.items():
        cells = [WAYS[name].title]
        for rate in (0, *RATES):
            loads = [one[rate] for one in its_rounds if rate in one]
            cells += [
                f"{statistics.median(getattr(load, p) for load in loads) * 1e3:.2f}" if loads else "" for p in ("p50", "p99")
            ]
        rows.append(cells)
    columns = ["server", f"{CLIENTS} clients: p50 ms", "p99 ms"]
    for rate in RATES:
        columns += [f"{rate:,}/s: p50 ms", "p99 ms"]
    report.table("Latency of one row of JSON: clients that wait, and arrivals by chance from when they were due", columns, rows)
    if failed:
        report.table("Not measured", ["server", "why"], [[WAYS[name].title, reason] for name, reason in failed.items()])
