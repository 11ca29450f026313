"""What a warm request costs beyond the model's own time: handler time minus `session.run`, through the real runtime client.

    python -m benchmarks.lambda_warm [--calls 1000] [--plot FILE] [--markdown FILE]

Two environments, without and with Powertools, are asked in turn with HTTP API events: 1 row as JSON, 1,000 rows as binary
tensors and as JSON. `session.run` is timed within the same call. The goal: 0.35 ms at the median for 1 row of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import plot
from benchmarks.lambda_cold_start import made
from benchmarks.report import Report
from infra.local.environments import Environment, FunctionConfig
from infra.local.events import Request, http_v2

FEATURES = 30
ROWS = 1_000


class Call(NamedTuple):
    """Milliseconds: of the handler, of `session.run` within it, and of the invocation as the platform sees it."""

    handler: float
    run: float
    whole: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000, help="of each kind to each environment")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TRIFORM_REPOSITORY": str(made(Path(folder))), "TRIFORM_ALLOW_ANONYMOUS": "true"}
        config = FunctionConfig("benchmarks.functions.timed.handler", environ)
        ways = {
            "without": Environment(config._replace(environ={**environ, "TRIFORM_TELEMETRY": "none"}), "on-demand", ignore),
            "with Powertools": Environment(config, "on-demand", ignore),
        }
        try:
            for environment in ways.values():
                assert environment.start() is None
            seen = measured(ways, given.calls)
            peaks = {name: environment.peak_bytes() for name, environment in ways.items()}
        finally:
            for environment in ways.values():
                environment.close()
    show(seen, peaks, given)


def ignore(line: str) -> None:
    """What the function logs is written and read, and not looked at."""


def events() -> dict[str, bytes]:
    x = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
    kind = [("content-type", "application/json")]
    predict = "/v1/models/linear:predict"
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    binary = [("content-type", "application/octet-stream"), ("inference-header-content-length", str(len(head)))]
    requests = {
        "1 row, JSON": Request("POST", predict, "", kind, json.dumps({"instances": x[:1].tolist()}).encode()),
        "1,000 rows, binary": Request("POST", "/v2/models/linear/infer", "", binary, head + x.tobytes()),
        "1,000 rows, JSON": Request("POST", predict, "", kind, json.dumps({"instances": x.tolist()}).encode()),
    }
    return {name: json.dumps(http_v2(request)).encode() for name, request in requests.items()}


def measured(ways: Mapping[str, Environment], calls: int) -> dict[tuple[str, str], list[Call]]:
    """Calls of each kind to each environment in turn; the first tenth is not counted."""
    given = events()
    seen: dict[tuple[str, str], list[Call]] = {(kind, way): [] for kind in given for way in ways}
    for i in range(calls + calls // 10):
        for kind, payload in given.items():
            if "1,000" in kind and i % 5:
                continue
            for way, environment in ways.items():
                call = once(environment, payload)
                if i >= calls // 10:
                    seen[kind, way].append(call)
    return seen


def once(environment: Environment, payload: bytes) -> Call:
    began = time.perf_counter()
    outcome = environment.invoke("warm", payload)
    whole = (time.perf_counter() - began) * 1e3
    assert outcome.error is None, outcome
    answer = json.loads(outcome.payload)
    assert answer["statusCode"] == 200, answer
    return Call(int(answer["headers"]["x-handler-ns"]) / 1e6, int(answer["headers"]["x-run-ns"]) / 1e6, whole)


def show(seen: Mapping[tuple[str, str], Sequence[Call]], peaks: Mapping[str, int], given: argparse.Namespace) -> None:
    report, rows = Report(), []
    for (kind, way), calls in seen.items():
        over = [call.handler - call.run for call in calls]
        run, handler, whole = (np.median([getattr(call, name) for call in calls]) for name in ("run", "handler", "whole"))
        p50, p99 = np.quantile(over, (0.5, 0.99))
        rows.append([
            kind, way, str(len(calls)), f"{run:.3f}", f"{handler:.3f}", f"{p50:.3f}", f"{p99:.3f}", f"{whole:.2f}",
        ])  # fmt: skip
    columns = [
        "request",
        "telemetry",
        "calls",
        "session.run ms",
        "handler ms",
        "overhead p50 ms",
        "overhead p99 ms",
        "invocation ms",
    ]
    report.table("Warm requests, medians", columns, rows)
    report.table("Peak memory", ["telemetry", "RSS MB"], [[way, f"{peak / 2**20:.0f}"] for way, peak in peaks.items()])
    if given.markdown:
        report.write(given.markdown)
    if given.plot:
        kinds = list(dict.fromkeys(kind for kind, _ in seen))
        series = {
            way: [float(np.median([1e3 * (c.handler - c.run) for c in seen[kind, way]])) for kind in kinds] for way in peaks
        }
        plot.bars(given.plot, "Handler time beyond session.run", kinds, series, "microseconds, median")


if __name__ == "__main__":
    main()
