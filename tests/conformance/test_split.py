"""Stable and canary in one process: who is answered by which, the same in every form and protocol."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.batch.workbench import Workbench, read_rows
from tests.canaries import USERS, Released, answers, build, records
from tests.conformance.hosts import Answer, Send, asgi, aws_lambda
from triform.splitting import KeyRule, TrafficSplit

JSON = {"content-type": "application/json"}
HOSTS = {
    "asgi": lambda root: asgi(root, default_model="scored"),
    "lambda": lambda root: aws_lambda(root, TRIFORM_DEFAULT_MODEL="scored"),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


@pytest.fixture(scope="module", params=HOSTS)
def send(request: pytest.FixtureRequest, released: Released) -> Iterator[Send]:
    make: Callable[[Path], Any] = HOSTS[request.param]
    with make(released.root) as sender:
        yield sender


def told(answer: Answer) -> Any:
    assert answer.status == 200, answer
    return orjson.loads(answer.body)


def versions(released: Released, users: list[Any]) -> list[int]:
    return [released.split().choose(str(user).encode()) for user in users]


@pytest.mark.parametrize("path", ["/v1/models/scored:predict", "/invocations", "/v2/models/scored/infer"])
def test_a_header_keeps_a_caller_on_its_version(send: Send, released: Released, path: str) -> None:
    inputs = [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [3, 4]}]
    body = orjson.dumps({"inputs": inputs} if "infer" in path else {"instances": [{"a": 3, "b": 4}]})
    seen = [send("POST", path, {**JSON, "x-user": user}, body).headers["x-triform-model"] for user in USERS]
    assert seen == [f"scored/{version}" for version in versions(released, USERS)]
    assert set(seen) == {"scored/1", "scored/2"}


def test_a_name_that_is_not_ascii_is_the_same_user_in_a_header_and_in_a_column(send: Send, released: Released) -> None:
    """Clients that send such a header send UTF-8, which servers read as Latin-1."""
    users = [f"jürgen-{i}" for i in range(24)]
    body = orjson.dumps({"instances": records(users)})
    assert told(send("POST", "/v1/models/scored:predict", JSON, body))["predictions"] == answers(users, versions(released, users))
    body = orjson.dumps({"instances": [{"a": 3, "b": 4}]})
    given = [{**JSON, "x-user": user.encode().decode("latin-1")} for user in users]
    seen = [send("POST", "/v1/models/scored:predict", headers, body).headers["x-triform-model"] for headers in given]
    assert seen == [f"scored/{version}" for version in versions(released, users)]


@pytest.mark.parametrize("users", [USERS, [*range(7, 31)]], ids=["texts", "numbers"])
def test_rows_of_a_table_are_the_same_users(send: Send, released: Released, tmp_path: Path, users: list[Any]) -> None:
    """A batch run that is split answers each of them by the version that answers them online; so do the functions that
    docs/releases.md names."""
    bench = Workbench(tmp_path, released.root)
    bench.input.mkdir()
    pq.write_table(pa.Table.from_pylist(records(users)), bench.input / "rows.parquet")
    scored = read_rows(bench.score_and_run(model="scored", key=(), keep=("a", "b", "user"), split=True).data)
    records_read = scored.select(["a", "b", "user"]).to_pylist()
    answer = told(send("POST", "/v1/models/scored:predict", JSON, orjson.dumps({"instances": records_read})))
    assert answer["predictions"] == scored.select(["sum", "label"]).to_pylist()
    assert {row["label"] for row in answer["predictions"]} == {1, 2}
    rows = TrafficSplit.of(released.log().in_force()).split(KeyRule.of_rows(scored["user"].to_pylist(), "nobody"))
    refs = scored["_model_version"].to_pylist()
    assert {v: [i for i, ref in enumerate(refs) if ref == f"scored/{v}"] for v in (1, 2)} == {
        v: at.tolist() for v, at in rows.items()
    }


def test_without_a_key_the_request_id_is_it(send: Send, released: Released) -> None:
    body = orjson.dumps({"instances": [{"a": 3, "b": 4}]})
    for user, version in zip(USERS, versions(released, USERS), strict=True):
        answer = send("POST", "/v1/models/scored:predict", {**JSON, "x-request-id": user}, body)
        assert (told(answer)["predictions"], answer.headers["x-triform-model"]) == (
            [{"sum": 7.0 * version, "label": float(version)}],
            f"scored/{version}",
        )


def csv(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(["a,b,user", *(",".join(map(str, row.values())) for row in rows)]).encode()


BODIES: dict[str, tuple[str, str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "predict rows": ("/v1/models/scored:predict", JSON["content-type"], lambda rows: orjson.dumps({"instances": rows})),
    "invocations rows": ("/invocations", JSON["content-type"], lambda rows: orjson.dumps({"dataframe_records": rows})),
    "invocations table": (
        "/invocations",
        JSON["content-type"],
        lambda rows: orjson.dumps({"dataframe_split": {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}}),
    ),
    "invocations lines": ("/invocations", "application/jsonlines", lambda rows: b"\n".join(map(orjson.dumps, rows))),
    "invocations csv": ("/invocations", "text/csv", csv),
}


@pytest.mark.parametrize("users", [USERS, [*range(7, 31)]], ids=["texts", "numbers"])
@pytest.mark.parametrize("kind", BODIES)
def test_records_are_answered_by_the_version_of_their_key_and_in_order(
    send: Send, released: Released, kind: str, users: list[Any]
) -> None:
    path, content_type, write = BODIES[kind]
    headers = {"content-type": content_type, "accept": "application/jsonlines"}
    if path.endswith("predict"):
        del headers["accept"]
    answer = send("POST", path, headers, write(records(users)))
    assert answer.status == 200, answer
    lines = told(answer)["predictions"] if path.endswith("predict") else [*map(orjson.loads, answer.body.splitlines())]
    assert lines == answers(users, versions(released, users))
    assert answer.headers["x-triform-model"] == "scored/1, scored/2"


@pytest.mark.parametrize("version", [1, 2])
def test_records_of_one_version_are_answered_by_that_alone(send: Send, released: Released, version: int) -> None:
    users = released.keys_of(version)
    answer = send("POST", "/v1/models/scored:predict", JSON, orjson.dumps({"instances": records(users)}))
    assert told(answer)["predictions"] == answers(users, [version] * len(users))
    assert answer.headers["x-triform-model"] == f"scored/{version}"


def oip_inputs(users: list[str], *, binary: bool, by_columns: bool) -> tuple[list[dict[str, Any]], list[bytes]]:
    rows = records(users)
    values: dict[str, tuple[str, list[int], list[Any]]] = {"user": ("BYTES", [len(rows)], users)}
    if by_columns:
        values |= {name: ("FP32", [len(rows)], [row[name] for row in rows]) for name in ("a", "b")}
    else:
        values["x"] = ("FP32", [len(rows), 2], [number for row in rows for number in (row["a"], row["b"])])
    inputs, tail = [], []
    for name, (datatype, shape, data) in values.items():
        given: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
        if binary:
            texts = datatype == "BYTES"
            tail.append(
                b"".join(struct.pack("<I", len(d)) + d.encode() for d in data) if texts else struct.pack(f"<{len(data)}f", *data)
            )
            given["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            given["data"] = data
        inputs.append(given)
    return inputs, tail


@pytest.mark.parametrize("by_columns", [True, False], ids=["columns", "tensors"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_open_inference_requests_may_bring_their_keys(send: Send, released: Released, binary: bool, by_columns: bool) -> None:
    inputs, tail = oip_inputs(USERS, binary=binary, by_columns=by_columns)
    header = orjson.dumps({"inputs": inputs, "id": "7"})
    headers = {"inference-header-content-length": str(len(header))} if binary else JSON
    answer = told(send("POST", "/v2/models/scored/infer", headers, b"".join([header, *tail])))
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("scored", "1,2", "7")
    wanted = answers(USERS, versions(released, USERS))
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    if by_columns:
        assert outputs == {name: [row[name] for row in wanted] for name in ("sum", "label")}
    else:
        assert outputs == {"y": [number for row in wanted for number in row.values()]}


def test_keys_beside_tensors_are_one_a_row(send: Send) -> None:
    inputs, _ = oip_inputs(USERS, binary=False, by_columns=False)
    inputs[0] |= {"shape": [2], "data": USERS[:2]}
    answer = send("POST", "/v2/models/scored/infer", JSON, orjson.dumps({"inputs": inputs}))
    assert (answer.status, orjson.loads(answer.body)["code"]) == (400, "invalid_input")


def test_what_formats_write_differently_is_refused_unless_the_header_says_who_asks(send: Send) -> None:
    body = orjson.dumps({"instances": records([1.5, 2.5])})
    refused = send("POST", "/v1/models/scored:predict", JSON, body)
    assert (refused.status, orjson.loads(refused.body)["code"]) == (400, "invalid_input")
    assert "a key is text or a whole number" in orjson.loads(refused.body)["error"]
    assert send("POST", "/v1/models/scored:predict", {**JSON, "x-user": "ann"}, body).status == 200


@pytest.mark.parametrize(
    ("choice", "version"), [("/versions/1", 1), ("/versions/2", 2), ("/labels/canary", 2), ("/labels/stable", 1)]
)
def test_who_names_a_version_gets_it(send: Send, choice: str, version: int) -> None:
    body = orjson.dumps({"instances": records(USERS)})
    answer = send("POST", f"/v1/models/scored{choice}:predict", {**JSON, "x-user": USERS[0]}, body)
    assert told(answer)["predictions"] == answers(USERS, [version] * len(USERS))
    assert answer.headers["x-triform-model"] == f"scored/{version}"


def test_metadata_is_the_stable_versions(send: Send) -> None:
    assert told(send("GET", "/v2/models/scored"))["versions"] == ["1", "2"]
    assert told(send("GET", "/v1/models/scored/metadata"))["model_spec"]["version"] == "1"
