"""The promise: the same rows through batch, Lambda and Serve give the same numbers, whatever the protocol and the company.

Rows -> Parquet -> batch on Ray -> columns
     -> tensors -> tritonclient, in requests of several sizes -> Lambda, Serve -> columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc
import tritonclient.http
from rich.console import Console

from batch import job
from batch.spec import JobSpec
from infra.local.gateway import local_gateway
from tests.ray_apps.hosts import grpc_client
from triform.features import Features
from triform.package import Manifest
from triform.repository import open_repository
from triform.signature import BY_OIP, DATATYPES, Array

ROWS = 60
CUTS = [0, 1, 2, 4, 7, 12, 13, 29, ROWS]  # between one request and the next
chance = np.random.default_rng(20)


def of_datatype(name: str) -> Array:
    """Values of a datatype, its extremes among them; NaN is not, for JSON has none."""
    dtype = BY_OIP[name].numpy
    if name == "BYTES":
        return np.array(["", "ä\n", *(f"text {i}" for i in range(ROWS - 2))], dtype=object)
    if name == "BOOL":
        return chance.random(ROWS) < 0.5
    if dtype.kind == "f":
        tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
        return np.concatenate([[tiny, -huge, -0.0], chance.normal(size=ROWS - 3)]).astype(dtype)
    info = np.iinfo(dtype)
    return np.array([info.min, info.max, *chance.integers(info.min, info.max, ROWS - 2, dtype)], dtype)


FLOATS = chance.normal(size=(ROWS, 3)).astype(np.float32)
COLUMNS: Mapping[str, Mapping[str, Array]] = {
    "linear": {"x": FLOATS},
    "close": {"x": FLOATS},
    "every": {f"in_{d.oip}": of_datatype(d.oip) for d in DATATYPES},
}


class Case(NamedTuple):
    """A model, its rows as tensors, and what the batch form answered, by column."""

    manifest: Manifest
    features: Features
    tensors: Mapping[str, Array]
    batch: Mapping[str, Array]


@pytest.fixture(scope="module", params=list(COLUMNS))
def case(request: pytest.FixtureRequest, online_models: Path, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("parity")
    manifest = open_repository(online_models).package(request.param, 1).manifest
    features = Features(manifest.signature, manifest.config)
    columns = COLUMNS[request.param]
    (root / "in").mkdir()
    given = {name: pa.array(list(array)) for name, array in columns.items()}
    pq.write_table(pa.table({"id": range(ROWS), **given}), root / "in/0.parquet")
    where, to = (str(root / folder) for folder in ("in", "out"))
    spec = JobSpec(repository=str(online_models), model=manifest.ref, input=(where,), output=to, key=("id",), actors=1)
    summary = job.run(spec, Console(quiet=True))
    assert summary.manifest.rows_out == ROWS
    table = pq.read_table(next(Path(summary.data).glob("*.parquet")), partitioning=None).sort_by("id")
    batch = {c.name: values(table[c.name].to_pylist(), c.tensor.dtype) for c in features.outputs}
    return Case(manifest, features, features.from_columns(columns), batch)


def values(given: Any, dtype: Any) -> Array:
    """A column's values as an array; text as text, whoever answered it."""
    if isinstance(given[0], str | bytes):
        return np.array([v.decode() if isinstance(v, bytes) else v for v in given], dtype=object)
    return np.array(given, dtype)


Ask = Callable[[Case, int, int], Mapping[str, Array]]


def asking(triton: Any, client: Any, **binary: bool) -> Ask:
    """Asks for some of the rows; `triton` is the module that the client is of."""

    def ask(case: Case, start: int, stop: int) -> Mapping[str, Array]:
        signature = case.manifest.signature
        inputs = []
        for tensor in signature.inputs:
            rows = case.tensors[tensor.name][start:stop]
            inputs.append(triton.InferInput(tensor.name, list(rows.shape), tensor.datatype))
            inputs[-1].set_data_from_numpy(rows, **binary)
        outputs = [triton.InferRequestedOutput(tensor.name, **binary) for tensor in signature.outputs]
        answer = client.infer(case.manifest.name, inputs, "1", outputs)
        return case.features.to_columns({tensor.name: answer.as_numpy(tensor.name) for tensor in signature.outputs})

    return ask


@pytest.fixture(scope="module")
def lambda_address(online_models: Path) -> Iterator[str]:
    with local_gateway(environ={"TRIFORM_REPOSITORY": str(online_models)}, max_concurrency=1) as gateway:
        yield gateway.url.removeprefix("http://")


WAYS = ["lambda-json", "lambda-binary", "serve-json", "serve-binary", "serve-grpc"]


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest, serve_address: tuple[str, int]) -> Iterator[Ask]:
    form, protocol = request.param.split("-")
    if protocol == "grpc":
        with grpc_client() as client:
            yield asking(tritonclient.grpc, client)
        return
    address = request.getfixturevalue("lambda_address") if form == "lambda" else f"{serve_address[0]}:{serve_address[1]}"
    with tritonclient.http.InferenceServerClient(address, network_timeout=120) as client:
        yield asking(tritonclient.http, client, binary_data=protocol == "binary")


def assert_same(case: Case, answers: Mapping[str, Array], start: int, stop: int) -> None:
    independence = case.manifest.row_independence
    for name, batch in case.batch.items():
        answer, expected = values(answers[name], batch.dtype), batch[start:stop]
        if independence.kind == "close":
            bound = independence.tolerance
            np.testing.assert_allclose(answer, expected, rtol=bound.rtol, atol=bound.atol)
        elif batch.dtype == object:
            assert answer.tolist() == expected.tolist()
        else:
            assert answer.tobytes() == expected.tobytes(), name


def test_each_form_and_protocol_answers_as_the_batch_does(case: Case, ask: Ask) -> None:
    for start, stop in pairwise(CUTS):
        assert_same(case, ask(case, start, stop), start, stop)


@pytest.mark.parametrize("case", ["close"], indirect=True)
def test_a_close_model_does_move_with_its_company(case: Case, ask: Ask) -> None:
    """Else the test above would prove nothing of bounds."""
    assert case.manifest.row_independence.kind == "close"
    alone = ask(case, 0, 1)["y"]
    assert 0 < np.abs(alone - case.batch["y"][:1]).max() < 1e-5


def test_strangers_in_one_run_change_nothing(case: Case, serve_address: tuple[str, int]) -> None:
    """Requests at once, which Serve's dynamic batching runs together."""
    address = f"{serve_address[0]}:{serve_address[1]}"

    def one(row: int) -> None:
        with tritonclient.http.InferenceServerClient(address, network_timeout=120) as client:
            assert_same(case, asking(tritonclient.http, client)(case, row, row + 1), row, row + 1)

    with ThreadPoolExecutor(16) as clients:
        assert len(list(clients.map(one, range(ROWS)))) == ROWS
