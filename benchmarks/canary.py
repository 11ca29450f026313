"""What a canary at 10% costs a request in the process that answers, beside the same process without one.

    python -m benchmarks.canary                 in process, without a host or a socket
    python -m benchmarks.canary --serve         on Ray Serve behind HAProxy, in both placements: what stable pays, and the hop

Interleaved rounds; medians, and the spread (interquartile range over median). The keys are those of stable, whose callers should
notice nothing, and of the canary. On Ray Serve `wrk` asks, with the clients and the seconds a round that are given.
"""

from __future__ import annotations

import argparse
import http.client
import tempfile
import time
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.load import Ask, Load, closed_loop
from benchmarks.protocols import COLUMNS, FEATURES, TOML, interleaved
from examples.flights.serving import local_serve
from triform import testing
from triform.http import HttpRequest, HttpSurface
from triform.models import Models
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import Canary, Release, ReleaseLog
from triform.repository import ModelRepository
from triform.service import InferenceService
from triform.splitting import KeyRule, TrafficSplit

WEIGHT = 0.1
KEYS = {"header": KeyRule(header="x-user"), "request id": KeyRule(), "column": KeyRule(column="user")}


PLACEMENTS: dict[str, dict[str, Any]] = {"in process": {}, "isolated": {"canary": {}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--serve", action="store_true", help="on Ray Serve, in both placements")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="of wrk (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round (%(default)s)")
    options = parser.parse_args()
    if options.serve:
        serve(options)
    else:
        in_process()


def in_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = testing.linear(Path(folder) / "linear.onnx", features=FEATURES)
        repository = testing.repository(Path(folder) / "models", {"linear": model}, config={"linear": TOML})
        package_model(model, name="linear", repository=repository, config=model.with_suffix(".toml"))
        release = ReleaseLog(repository, "linear").set(stable=1, canary=Canary(2, WEIGHT))
        table = Table(
            "key", "records", "answered by", "no canary", "canary 10%", "more", "spread", title="time of one request, us"
        )
        measure(repository, release, table)
    Console(width=110).print(table)
    models = Models(form="serve")
    seconds = min(timeit.repeat(lambda: models.splits.live, number=100_000, repeat=20)) / 100_000
    print(f"without a canary a request asks whether there is one: {1e9 * seconds:.0f} ns, the call included")


def measure(repository: ModelRepository, release: Release, table: Table) -> None:
    loaded = {version: Predictor.load(repository.package("linear", version)) for version in (1, 2)}
    traffic = TrafficSplit.of(release)
    users = {
        version: [u for u in map("user-{}".format, range(400)) if traffic.choose(u.encode()) == version] for version in loaded
    }
    both = [*users[1][:9], users[2][0]]
    cases = [(name, users[version][:1]) for name in KEYS for version in (1, 2)]
    for name, asking in [*cases, ("column", users[1][:10]), ("column", both)]:
        ruled = msgspec.structs.replace(release, canary=Canary(2, WEIGHT, KEYS[name]))
        alone, beside = (surface(loaded, ruled, shared=shared) for shared in (False, True))
        request = asked(name, asking)
        answer = beside.handle(request)
        assert answer.status == 200, answer
        ways = [partial(alone.handle, request), partial(beside.handle, request)]
        without, canary, spread = interleaved(ways)
        ratio, by = f"{canary / without - 1:+.1%}", answer.headers["x-triform-model"]
        table.add_row(name, str(len(asking)), by, f"{without:.1f}", f"{canary:.1f}", ratio, f"{spread:.0%}")


def surface(loaded: dict[int, Predictor], release: Release, *, shared: bool) -> HttpSurface:
    models = Models(form="serve")
    models.replace("linear", loaded, release.aliases(), release if shared else None)
    return HttpSurface(InferenceService(models))


def asked(name: str, users: Sequence[str]) -> HttpRequest:
    rows: list[dict[str, Any]] = [{**dict.fromkeys(COLUMNS, 0.5), "user": user} for user in users]
    headers = [("content-type", "application/json")]
    headers += {"header": [("x-user", users[0])], "request id": [("x-request-id", users[0])], "column": []}[name]
    return HttpRequest("POST", "/v1/models/linear:predict", headers, orjson.dumps({"instances": rows}))


def serve(options: argparse.Namespace) -> None:
    """Two models alike, of which one has a canary: what callers of stable wait for in each, and callers of the canary."""
    table = Table("placement", "clients", "model", "p50, ms", "p99, ms", "req/s", "beside no canary: p50", "req/s", "spread")
    with tempfile.TemporaryDirectory() as folder, local_serve() as server:
        root = Path(folder)
        model = testing.linear(root / "linear.onnx", features=FEATURES)
        config = dict.fromkeys(("alone", "shared"), f'{TOML}\n[key]\nheader = "x-user"\n')
        repository = testing.repository(root / "models", dict.fromkeys(config, model), config=config)
        package_model(model, name="shared", repository=repository, config=model.with_suffix(".toml"))
        ReleaseLog(repository, "alone").set(stable=1)
        traffic = TrafficSplit.of(ReleaseLog(repository, "shared").set(stable=1, canary=Canary(2, WEIGHT)))
        stable, canary = (next(u for u in map("user-{}".format, range(400)) if traffic.choose(u.encode()) == v) for v in (1, 2))
        host, port = server.http.split(":")
        asks = {"no canary": _ask("alone", stable), "stable": _ask("shared", stable), "canary": _ask("shared", canary)}
        for placement, arguments in PLACEMENTS.items():
            server.begin(root / "models", poll_s=0.2, default_model="alone", **arguments)
            server.wait()
            address = host, int(port)
            _await(address, asks["canary"], "shared/2")
            for clients in options.clients:
                loads: dict[str, list[Load]] = {name: [] for name in asks}
                for number in range(options.rounds + 1):  # the first warms up
                    for name, ask in asks.items():
                        load = closed_loop(address, ask, clients=clients, seconds=options.seconds, work=root)
                        loads[name] += [load] if number else []
                _add(table, placement, clients, loads)
    Console(width=130).print(table)


def _await(address: tuple[str, int], ask: Ask, ref: str, seconds: float = 60.0) -> None:
    """Until that version answers: a canary in replicas of its own comes a little later than they do."""
    deadline = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("POST", ask.path, ask.body, dict(ask.headers))
        by = connection.getresponse().getheader("x-triform-model")
        connection.close()
        if by == ref:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{ref} does not answer, {by} does")
        time.sleep(0.1)


def _ask(model: str, user: str) -> Ask:
    body = orjson.dumps({"instances": [dict.fromkeys(COLUMNS, 0.5)]})
    return Ask(f"/v1/models/{model}:predict", {"content-type": "application/json", "x-user": user}, body)


def _add(table: Table, placement: str, clients: int, loads: dict[str, list[Load]]) -> None:
    """Ratios are of loads of the same round."""
    alone = loads["no canary"]
    for name, seen in loads.items():
        p50, p99, rate = (float(np.median([getattr(load, what) for load in seen])) for what in ("p50", "p99", "rate"))
        low, high = np.percentile([load.p50 for load in seen], [25, 75])
        slower = np.median([load.p50 / other.p50 for load, other in zip(seen, alone, strict=True)]) - 1
        fewer = np.median([load.rate / other.rate for load, other in zip(seen, alone, strict=True)]) - 1
        figures = f"{1e3 * p50:.2f}", f"{1e3 * p99:.2f}", f"{rate:.0f}", f"{slower:+.1%}", f"{fewer:+.1%}"
        table.add_row(placement, str(clients), name, *figures, f"{(high - low) / p50:.0%}")


if __name__ == "__main__":
    main()
