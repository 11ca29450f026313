"""What a request costs beyond `session.run`: routing, limits, JSON or bytes to arrays, checks, arrays to JSON or bytes.

    python -m benchmarks.protocols

In process, without a host or a socket; interleaved rounds, one thread; medians, and the spread
(interquartile range over median).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from triform import testing
from triform.http import HttpRequest, HttpSurface
from triform.models import Models
from triform.predictor import Predictor
from triform.protocols.oip import HEADER_LENGTH
from triform.repository import ModelRepository
from triform.runtime import RuntimeOptions, open_session
from triform.service import InferenceService

ROUNDS = 400
FEATURES = 30
COLUMNS = [f"c{i}" for i in range(FEATURES)]
TOML = f"[inputs.x]\ncolumns = {COLUMNS}\n"
Cases = dict[tuple[str, int], HttpRequest]


def main() -> None:
    table = Table("request", "rows", "body", "session.run", "request", "overhead", "spread", title="time of one request, us")
    with tempfile.TemporaryDirectory() as folder:
        model = testing.linear(Path(folder) / "linear.onnx", features=FEATURES)
        repository = testing.repository(Path(folder) / "models", {"linear": model}, config={"linear": TOML})
        measure(repository, table)
    Console(width=110).print(table)


def measure(repository: ModelRepository, table: Table) -> None:
    package = repository.package("linear", 1)
    models = Models(form="serve")
    models.add("linear", 1, lambda: Predictor.load(package))
    surface = HttpSurface(InferenceService(models))
    session = open_session(package.model_path, RuntimeOptions(), threads=1)
    for (name, rows), request in requests().items():
        feed = {"x": values(rows)}
        answer = surface.handle(request)
        assert answer.status == 200, answer
        bare, whole, spread = interleaved([lambda feed=feed: session.run(["y"], feed), lambda r=request: surface.handle(r)])
        sizes = f"{len(request.body):,} B"
        table.add_row(name, f"{rows:,}", sizes, f"{bare:.1f}", f"{whole:.1f}", f"{whole - bare:.1f}", f"{spread:.0%}")


def values(rows: int) -> Any:
    return np.random.default_rng(0).standard_normal((rows, FEATURES)).astype(np.float32)


def requests() -> Cases:
    cases: Cases = {}
    for rows in (1, 1_000):
        x = values(rows)
        tensor = {"name": "x", "shape": [rows, FEATURES], "datatype": "FP32"}
        header = written(
            {"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}], "parameters": {"binary_data_output": True}}
        )
        infer, length = "/v2/models/linear/infer", (HEADER_LENGTH, str(len(header)))
        cases["OIP, JSON", rows] = asked(infer, written({"inputs": [{**tensor, "data": x.reshape(-1)}]}))
        cases["OIP, binary", rows] = HttpRequest("POST", infer, [length], header + x.tobytes())
        cases["TF Serving, rows", rows] = asked("/v1/models/linear:predict", written({"instances": x}))
        records = [dict(zip(COLUMNS, row, strict=True)) for row in x]
        cases["TF Serving, records", rows] = asked("/v1/models/linear:predict", written({"instances": records}))
        lines = "".join(",".join(map(str, row)) + "\n" for row in x.tolist()).encode()
        cases["invocations, CSV", rows] = HttpRequest("POST", "/invocations", [("content-type", "text/csv")], lines)
    return cases


def asked(path: str, body: bytes) -> HttpRequest:
    return HttpRequest("POST", path, [("content-type", "application/json")], body)


def written(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def interleaved(calls: list[Callable[[], object]]) -> tuple[float, float, float]:
    """The median time of each of two calls in microseconds, and the spread of the second."""
    times = np.empty((ROUNDS, len(calls)))
    for i in range(ROUNDS):
        for j, call in enumerate(calls):
            started = time.perf_counter_ns()
            call()
            times[i, j] = (time.perf_counter_ns() - started) / 1e3
    low, middle, high = np.percentile(times[:, 1], [25, 50, 75])
    return float(np.median(times[:, 0])), float(middle), float((high - low) / middle)


if __name__ == "__main__":
    main()
