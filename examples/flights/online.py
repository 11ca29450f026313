"""Ask the online forms for some of the flights that the batch job scored, and hold their answers against the batch's.

scored ids -> their input rows, as JSON records and as tensors -> Lambda, Serve -> answers == p_late
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.dataset as ds
import tritonclient.grpc
import tritonclient.http

from examples.flights.mapping import read_columns
from examples.flights.scoring import MODEL
from triform.features import Features
from triform.package import Manifest
from triform.repository import open_repository, resolve
from triform.signature import Array

ANSWER = "p_late"


class Flights(NamedTuple):
    """Flights to ask for: each as a record and, at the same place on axis 0, in the tensors; `batch` is p_late as the batch
    job scored it, FP32[flights]."""

    manifest: Manifest
    records: list[dict[str, Any]]
    tensors: dict[str, Array]
    batch: Array

    @property
    def bound(self) -> Array:
        """How far an answer may lie from the batch's, FP64[flights]: nothing where rows do not depend on their company."""
        independence = self.manifest.row_independence
        if independence.kind == "exact":
            return np.zeros(len(self.batch))
        return independence.tolerance.atol + independence.tolerance.rtol * np.abs(self.batch, dtype=np.float64)


class Asked(NamedTuple):
    """What the requests, one flight each, came to: p_late, FP32[flights], and how long its caller waited for each, in
    milliseconds."""

    form: str
    protocol: str
    answers: Array
    millis: Array

    def equal(self, flights: Flights) -> int:
        """How many answers are the batch's to the bit."""
        return int((self.answers.view(np.uint32) == flights.batch.view(np.uint32)).sum())

    def distances(self, flights: Flights) -> Array:
        """How far each answer is from the batch's, FP64[flights]."""
        return np.abs(np.subtract(self.answers, flights.batch, dtype=np.float64))

    def agrees(self, flights: Flights) -> bool:
        """Whether each answer is within the bound that the package recorded."""
        return bool((self.distances(flights) <= flights.bound).all())


def choose(root: Path, data: Path, flights: int = 1_000) -> Flights:
    """Flights spread evenly over the run's `data`. `root`: where the example was built."""
    scored = ds.dataset(data, partitioning=None).to_table(columns=["id", ANSWER]).sort_by("id")
    scored = scored.take(np.linspace(0, scored.num_rows - 1, flights).astype(np.int64))
    columns = read_columns().all
    given = ds.dataset(root / "input", partitioning=None)
    rows = given.to_table(columns=["id", *columns], filter=ds.field("id").isin(scored["id"])).sort_by("id")
    records = rows.select(columns).to_pylist()
    repository = open_repository(root / "repository")
    manifest = repository.package(*resolve(repository, MODEL)).manifest
    tensors = Features(manifest.signature, manifest.config).from_records(records)
    return Flights(manifest, records, tensors, scored[ANSWER].to_numpy().astype(np.float32))


def ask_json(form: str, address: str, flights: Flights) -> Asked:
    """Records, one by one, in TensorFlow Serving's JSON."""
    path = f"/v1/models/{flights.manifest.name}/labels/stable:predict"
    bodies = [json.dumps({"instances": [record]}).encode() for record in flights.records]
    connection = http.client.HTTPConnection(address, timeout=120)

    def ask(flight: int) -> float:
        connection.request("POST", path, bodies[flight], {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{form} answers {response.status}: {content[:500].decode(errors='replace')}")
        return float(json.loads(content)["predictions"][0][ANSWER])

    try:
        return _asked(form, "REST JSON", flights, ask)
    finally:
        connection.close()


def ask_binary(form: str, address: str, flights: Flights) -> Asked:
    """Tensors of one row over the Open Inference Protocol's REST, in binary both ways, by an unmodified Triton client."""
    with tritonclient.http.InferenceServerClient(address, network_timeout=120) as client:
        return _asked(form, "REST binary", flights, _by_triton(tritonclient.http, client, flights))


def ask_grpc(form: str, address: str, flights: Flights) -> Asked:
    """The same over gRPC."""
    with tritonclient.grpc.InferenceServerClient(address) as client:
        return _asked(form, "gRPC", flights, _by_triton(tritonclient.grpc, client, flights))


def _by_triton(triton: Any, client: Any, flights: Flights) -> Callable[[int], float]:
    """Asks for a flight by its place; `triton` is the module that the client is of."""
    manifest = flights.manifest
    features = Features(manifest.signature, manifest.config)
    outputs = [triton.InferRequestedOutput(tensor.name) for tensor in manifest.signature.outputs]

    def ask(flight: int) -> float:
        inputs = []
        for tensor in manifest.signature.inputs:
            row = flights.tensors[tensor.name][flight : flight + 1]
            inputs.append(triton.InferInput(tensor.name, list(row.shape), tensor.datatype))
            inputs[-1].set_data_from_numpy(row)
        answer = client.infer(manifest.name, inputs, str(manifest.version), outputs)
        columns = features.to_columns({tensor.name: answer.as_numpy(tensor.name) for tensor in manifest.signature.outputs})
        return float(columns[ANSWER][0])

    return ask


def _asked(form: str, protocol: str, flights: Flights, ask: Callable[[int], float]) -> Asked:
    answers, millis = np.zeros_like(flights.batch), np.zeros(len(flights.batch))
    for flight in range(len(flights.batch)):
        started = time.perf_counter()
        answers[flight] = ask(flight)
        millis[flight] = (time.perf_counter() - started) * 1e3
    return Asked(form, protocol, answers, millis)
