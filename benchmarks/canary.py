"""What a canary at 10% costs a request in the process that answers, beside the same process without one.

    python -m benchmarks.canary

In process, without a host or a socket; interleaved rounds, one thread; medians, and the spread
(interquartile range over median). The keys are those of stable, whose callers should notice nothing, and of the canary.
"""

from __future__ import annotations

import tempfile
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.protocols import COLUMNS, FEATURES, TOML, interleaved
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


def main() -> None:
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


if __name__ == "__main__":
    main()
