"""The online form beside its peers, in one run, with interleaved rounds: how fast each answers the same model over HTTP.

    python -m benchmarks.serving [--rounds 3] [--seconds 4] [--only triform,mosec] [--plot docs/img] [--markdown FILE]
    python -m benchmarks.serving --prepare     only makes what the runs need: environments, wrk, models
    python -m benchmarks.serving --batching    a model of 10 ms: throughput against raw batches, latency at 70% load
    python -m benchmarks.serving --rows        JSON, binary and gRPC by the rows of a request
    python -m benchmarks.serving --open-loop   arrivals that do not wait for answers
    python -m benchmarks.serving --scaling     1 and 2 replicas

    each round, each server: started alone, its answers checked -> wrk with 1, 8 and 32 clients -> ended -> medians -> table

One row a request, one worker and one ONNX Runtime thread a server (`servers/`), each Ray with as many logical CPUs. Servers run
one at a time: an idle Ray takes a tenth of a core, and there may be two. `access log`: whether the server writes a line for
each request, as the usual Ray Serve app and BentoML do by themselves; it is off in the rest. `p50`, `p99` are wrk's, in
milliseconds; `CPU us` is the CPU time of all the server's processes, HAProxy and Ray's daemons too, over the requests answered
meanwhile. Spread: largest minus smallest, over median.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import batched, latency, plot
from benchmarks.environments import debian
from benchmarks.load import PACKAGES, Load, LoadFailed, closed_loop
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, lasting, packaged
from benchmarks.servers.running import ServerFailed
from benchmarks.servers.ways import WAYS, Place, Way, installed

CLIENTS = (1, 8, 32)
MOST = CLIENTS[-1]
WARM_UP = 1.0  # seconds
GOALS = {  # the least that Triform is to be times this server's requests, with 32 clients and JSON
    "ray-fastapi": 10.0, "litserve": 3.0, "bentoml": 3.0, "mlserver": 3.0, "mosec": 1.0, "triton": 1.0, "ray-asgi": 0.85,
}  # fmt: skip


class Seen(NamedTuple):
    """`cpu`: seconds of the server's processes for one request."""

    load: Load
    cpu: float


Key = tuple[str, int]  # encoding, clients
Rounds = dict[str, list[dict[Key, Seen]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--only", type=_servers, default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--root", type=Path, default=Path("build"), help="where environments and models go")
    parser.add_argument("--plot", type=Path, help="also draw into this folder")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    modes = parser.add_mutually_exclusive_group()
    for mode, does in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=does.__doc__)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # as Ctrl-C: what was started is ended
    report = Report()
    MODES.get(options.mode, compare)(options, report)
    if options.markdown:
        report.write(options.markdown)


def _servers(text: str) -> list[str]:
    if strangers := set(text.split(",")) - set(WAYS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(strangers))}: expected some of {', '.join(WAYS)}")
    return [name for name in WAYS if name in text.split(",")]


def prepare(options: argparse.Namespace, report: Report) -> None:  # noqa: ARG001 - modes are called alike
    """only make what the runs need: environments, wrk, models"""
    debian(*PACKAGES)
    installed(options.only, options.root)
    packaged(options.root, "tiny", TINY)
    for rows in batched.OF_A_RUN:
        lasting(options.root, rows, batched.SECONDS)


def compare(options: argparse.Namespace, report: Report) -> None:
    pythons, failed = installed(options.only, options.root)
    model, repository = packaged(options.root, "tiny", TINY)
    rounds: Rounds = {name: [] for name in pythons}
    for number in range(options.rounds):
        for name, python in pythons.items():
            try:
                with tempfile.TemporaryDirectory(prefix="serving-") as work:
                    seen = measure(WAYS[name], python, Place(model, repository, Path(work)), options.seconds)
            except (ServerFailed, LoadFailed) as error:
                failed[name] = f"round {number + 1}: {error}"
                print(f"{name}: {error}", flush=True)
                continue
            rounds[name].append(seen)
            rates = ", ".join(f"{clients}: {one.load.rate:,.0f}/s" for (how, clients), one in seen.items() if how == "JSON")
            print(f"round {number + 1} of {options.rounds}, {name:12} {rates}", flush=True)
    for encoding in "JSON", "binary":
        tell(rounds, encoding, report)
    goals(rounds, report)
    if failed:
        report.table("Not measured", ["server", "why"], [[WAYS[name].title, reason] for name, reason in failed.items()])
    if options.plot:
        draw(rounds, options.plot)


def measure(way: Way, python: str, place: Place, seconds: int) -> dict[Key, Seen]:
    """A fresh server with each number of clients, in each encoding. Raises `ServerFailed`, `LoadFailed`."""
    x, y = example(place.model)
    with way.started(python, place, x, y) as server:

        def load(encoding: str, clients: int, seconds: float) -> Load:
            ask = way.encodings[encoding].ask(x)
            return closed_loop(server.address, ask, clients=clients, seconds=seconds, work=place.work)

        seen = {}
        for encoding in way.encodings:
            load(encoding, MOST, WARM_UP)
            for clients in CLIENTS:
                result, cpu = server.measured(lambda e=encoding, c=clients: load(e, c, seconds))  # type: ignore[misc]
                seen[encoding, clients] = Seen(result, cpu / result.requests)
    return seen


def tell(rounds: Rounds, encoding: str, report: Report) -> None:
    """One table: a row for each server, medians over the rounds."""
    rows = []
    for name, seen in rounds.items():
        if encoding not in WAYS[name].encodings or not seen:
            continue
        cells = [WAYS[name].title, "yes" if WAYS[name].logs else "no"]
        for clients in CLIENTS:
            loads = [one[encoding, clients].load for one in seen]
            cells += [f"{statistics.median(load.rate for load in loads):,.0f}"]
            cells += [f"{statistics.median(getattr(load, p) for load in loads) * 1e3:.2f}" for p in ("p50", "p99")]
        rates = [one[encoding, MOST].load.rate for one in seen]
        ratio = times(rounds, name, encoding)
        cells += [
            f"{statistics.median(one[encoding, MOST].cpu for one in seen) * 1e6:,.0f}",
            f"{(max(rates) - min(rates)) / statistics.median(rates):.0%}",
            f"{ratio:.2f}" if ratio else "",
        ]
        rows.append(cells)
    columns = ["server", "access log"]
    for clients in CLIENTS:
        columns += [f"{clients} client{'s' * (clients > 1)}: req/s", "p50 ms", "p99 ms"]
    columns += ["CPU us", "spread", "Triform's times"]
    report.table(f"One row, {encoding}; CPU, spread and ratio with {MOST} clients", columns, rows)


def times(rounds: Rounds, name: str, encoding: str = "JSON") -> float | None:
    """How many times this server's requests Triform answers: the median of each round's ratio. None where one is missing."""
    ours = [one[encoding, MOST].load.rate for one in rounds.get("triform", [])]
    theirs = [one[encoding, MOST].load.rate for one in rounds[name]]
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False)) if ours and theirs else None


def goals(rounds: Rounds, report: Report) -> None:
    rows = []
    for name, goal in GOALS.items():
        if name in rounds and (ratio := times(rounds, name)) is not None:
            rows.append([WAYS[name].title, f"{goal:g}", f"{ratio:.2f}", "yes" if ratio >= goal else "no"])
    report.table(f"Triform's requests, times the peer's: JSON, {MOST} clients", ["peer", "goal", "seen", "reached"], rows)


def draw(rounds: Rounds, folder: Path) -> None:
    def medians(encoding: str, value: Callable[[Seen], float]) -> list[float]:
        return [statistics.median(value(one[encoding, MOST]) for one in rounds[name]) if encoding in WAYS[name].encodings else 0.0
                for name in drawn]  # fmt: skip

    drawn = [name for name, seen in rounds.items() if seen]
    groups = [name.replace("-", "\n") for name in drawn]
    rates = {encoding: medians(encoding, lambda one: one.load.rate) for encoding in ("JSON", "binary")}
    plot.bars(folder / "serving.svg", f"One row a request, {MOST} clients", groups, rates, "requests/s")
    cpu = {encoding: medians(encoding, lambda one: one.cpu * 1e6) for encoding in ("JSON", "binary")}
    plot.bars(folder / "serving_cpu.svg", f"CPU time of a request, {MOST} clients", groups, cpu, "microseconds")


MODES: Mapping[str, Callable[[argparse.Namespace, Report], None]] = {
    "prepare": prepare,
    "batching": batched.batching,
    "rows": latency.by_rows,
    "open-loop": latency.arrivals,
    "scaling": batched.scaling,
}


if __name__ == "__main__":
    main()
