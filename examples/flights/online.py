"""Ask the local Lambda for some of the flights that the batch job scored, and hold its answers against the batch's.

Flow: scored ids -> their input rows as JSON records -> local gateway -> awslambdaric -> handlers.predict -> answers == p_late.
"""

import http.client
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.dataset as ds

from examples.flights.mapping import read_columns
from infra.local.gateway import local_gateway
from triform.repository import open_repository, resolve
from triform.signature import Array

MODEL = "flight-delay@stable"


class Online(NamedTuple):
    """What the requests, one flight each, came to. Times in milliseconds; `batch` and `answers` are p_late, FP32[flights]."""

    ref: str
    init: float  # of the cold start: process started -> ready
    first: float  # the request that waited for it, as its caller sees it
    millis: Sequence[float]  # of each later request, as its caller sees it
    batch: Array
    answers: Array
    bound: tuple[float, float]  # atol and rtol that the package recorded for rows in other company

    @property
    def equal(self) -> int:
        """How many answers are the batch's to the bit."""
        return int((self.batch == self.answers).sum())

    @property
    def agree(self) -> bool:
        atol, rtol = self.bound
        return bool(np.allclose(self.answers, self.batch, atol=atol, rtol=rtol))


def ask(root: Path, data: Path, flights: int = 1_000) -> Online:
    """Answers of flights spread evenly over the run's `data`. `root`: where the example was built."""
    records, batch = _records(root / "input", data, flights)
    repository = open_repository(root / "repository")
    manifest = repository.package(*resolve(repository, MODEL)).manifest
    environ = {"TRIFORM_REPOSITORY": str((root / "repository").absolute()), "TRIFORM_DEFAULT_MODEL": manifest.name}
    bodies = [json.dumps({"instances": [record]}).encode() for record in records]
    path = f"/v1/models/{manifest.name}/labels/stable:predict"
    with local_gateway("http-v2", environ={**os.environ, **environ}, max_concurrency=1) as gateway:
        connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=120)
        seen = [_ask(connection, path, body) for body in bodies]
        connection.close()
        init = gateway.reports[0].init_ms or 0.0
    bound = manifest.row_independence.tolerance
    return Online(
        ref=manifest.ref,
        init=init,
        first=seen[0][1],
        millis=[took for _, took in seen[1:]],
        batch=batch,
        answers=np.array([answer for answer, _ in seen], np.float32),
        bound=(bound.atol, bound.rtol),
    )


def _ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[float, float]:
    started = time.perf_counter()
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    took = (time.perf_counter() - started) * 1e3
    if response.status != 200:
        raise RuntimeError(f"the function answers {response.status}: {content[:500].decode(errors='replace')}")
    return json.loads(content)["predictions"][0]["p_late"], took


def _records(given: Path, data: Path, flights: int) -> tuple[list[dict[str, Any]], Array]:
    """Input rows as records of the model's columns, and p_late as the batch scored it, both in the same order."""
    scored = ds.dataset(data, partitioning=None).to_table(columns=["id", "p_late"]).sort_by("id")
    scored = scored.take(np.linspace(0, scored.num_rows - 1, flights).astype(np.int64))
    columns = read_columns().all
    rows = ds.dataset(given, partitioning=None).to_table(columns=["id", *columns], filter=ds.field("id").isin(scored["id"]))
    return rows.sort_by("id").select(columns).to_pylist(), scored["p_late"].to_numpy().astype(np.float32)
