"""`/ping` and `/invocations`: Amazon SageMaker, "Use your own inference code with hosting services" and "Common data formats
for inference"; MLflow, "Local inference specification"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from tests.conformance.hosts import Answer, Send


def invoke(send: Send, body: bytes, kind: str = "application/json", accept: str | None = None) -> Answer:
    return send("POST", "/invocations", {"content-type": kind} | ({"accept": accept} if accept is not None else {}), body)


def test_ping(send: Send) -> None:
    """SageMaker, how your container should respond to health check requests: 200."""
    assert send("GET", "/ping").status == 200


@pytest.mark.parametrize(
    "asked",
    [
        {"instances": [[1, 2, 3], [4, 5, 6]]},
        {"instances": [{"features": [1, 2, 3]}, {"features": [4, 5, 6]}]},
        {"instances": [{"x": [1, 2, 3]}, {"x": [4, 5, 6]}]},
        {"inputs": [[1, 2, 3], [4, 5, 6]]},
        {"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}},
        {"instances": [[1, 2, 3], [4, 5, 6]], "params": {}},
    ],
)
def test_json(post: Callable[..., Any], asked: Any) -> None:
    """MLflow, JSON input: dataframe_split, dataframe_records, instances, inputs. SageMaker, JSON: instances with features."""
    assert post("/invocations", asked) == {"predictions": [[14.0], [32.0]]}


@pytest.mark.parametrize(
    "asked",
    [
        {"dataframe_split": {"columns": ["tail", "x"], "index": [7, 9], "data": [["N1", [1, 2, 3]], ["N2", [4, 5, 6]]]}},
        {"dataframe_records": [{"x": [1, 2, 3]}, {"tail": "N2", "x": [4, 5, 6]}]},
    ],
)
def test_tables(post: Callable[..., Any], asked: Any) -> None:
    """MLflow, JSON input: dataframe_split and dataframe_records; what is asked by columns is answered in columns."""
    assert post("/invocations", asked) == {"predictions": [14.0, 32.0]}


@pytest.mark.parametrize("kind", ["text/csv", "text/csv; charset=utf-8", "text/csv; header=absent"])
def test_csv(send: Send, kind: str) -> None:
    """SageMaker, CSV: no header line, a row a line; the answer is CSV, too."""
    answer = invoke(send, b"1,2,3\n4,5,6\n", kind)
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "text/csv; charset=utf-8", b"14.0\n32.0\n")


@pytest.mark.parametrize("body", [b"a,b,c\r\n1,2,3\r\n", b'"a","b","c"\n1,"2",3', b"\xef\xbb\xbfa,b,c\n1,2,3\n"])
def test_csv_with_a_header_line_that_says_so(send: Send, body: bytes) -> None:
    """RFC 4180, section 3: header=present; the answer has a header line then."""
    answer = invoke(send, body, "text/csv; header=present")
    assert (answer.status, answer.body) == (200, b"y\n14.0\n")


def test_json_lines(send: Send) -> None:
    """SageMaker, JSON Lines: a row a line, {"features": [...]} or the row itself; a prediction a line."""
    for kind in ("application/jsonlines", "application/x-jsonlines", "application/x-ndjson", "application/jsonl"):
        answer = invoke(send, b'{"features": [1, 2, 3]}\n\n{"features": [4, 5, 6]}\n', kind)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/jsonlines")
        assert answer.body == b"[14.0]\n[32.0]\n"
    assert invoke(send, b"[1, 2, 3]\r\n[4, 5, 6]", "application/jsonlines").body == b"[14.0]\n[32.0]\n"


@pytest.mark.parametrize(
    ("accept", "kind", "body"),
    [
        ("*/*", "application/json", b'{"predictions":[[14.0]]}'),
        ("", "application/json", b'{"predictions":[[14.0]]}'),
        ("text/csv", "text/csv; charset=utf-8", b"14.0\n"),
        ("text/csv;header=present", "text/csv; charset=utf-8", b"y\n14.0\n"),
        ("application/jsonlines", "application/jsonlines", b"[14.0]\n"),
        ("image/png, text/*;q=0.5", "text/csv; charset=utf-8", b"14.0\n"),
        ("text/csv;q=0.1, application/json", "application/json", b'{"predictions":[[14.0]]}'),
        ("text/csv;q=0, */*;q=0.1", "application/json", b'{"predictions":[[14.0]]}'),
        ("application/*", "application/json", b'{"predictions":[[14.0]]}'),
    ],
)
def test_the_answer_is_what_the_caller_accepts(send: Send, accept: str, kind: str, body: bytes) -> None:
    """SageMaker InvokeEndpoint, Accept: the desired MIME type of the inference response; weights: RFC 9110, 12.5.1."""
    answer = invoke(send, b'{"instances": [[1, 2, 3]]}', accept=accept)
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, kind, body)


def test_json_from_csv(send: Send) -> None:
    """SageMaker InvokeEndpoint, Accept."""
    assert invoke(send, b"1,2,3\n", "text/csv", "application/json").body == b'{"predictions":[[14.0]]}'


@pytest.mark.parametrize("accept", ["image/png", "application/x-recordio-protobuf"])
def test_what_nobody_here_writes(send: Send, refused: Callable[..., str], accept: str) -> None:
    """RFC 9110, 15.5.7."""
    refused(invoke(send, b'{"instances": [[1, 2, 3]]}', accept=accept), 406, "not_acceptable")


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-recordio-protobuf",
        "application/x-npy",
        "application/x-python-pickle",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/csv; charset=latin-1",
        "application/json; charset=utf-16",
        "json",
        "\x1b[31m",
    ],
)
def test_what_nobody_here_reads(send: Send, refused: Callable[..., str], kind: str) -> None:
    """MLflow, accepted header values; a pickle is read by nobody."""
    refused(invoke(send, b'{"instances": [[1, 2, 3]]}', kind), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{}", "application/json"),
        (b'{"instances": [[1,2,3]], "inputs": [[1,2,3]]}', "application/json"),
        (b'{"instances": [[1,2,3]], "params": {"temperature": 1}}', "application/json"),
        (b'{"dataframe_split": {"columns": ["x", "x"], "data": [[1, 2]]}}', "application/json"),
        (b'{"dataframe_split": {"columns": ["x"], "data": [[1, 2]]}}', "application/json"),
        (b'{"dataframe_split": {"columns": [], "data": [[], []]}}', "application/json"),
        (b'{"dataframe_split": {"columns": ["x"], "data": 1}}', "application/json"),
        (b'{"dataframe_split": [1]}', "application/json"),
        (b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1, 2, 3]]}}', "application/json"),
        (b'{"dataframe_records": {"x": [1]}}', "application/json"),
        (b'{"dataframe_records": [[1, 2, 3]]}', "application/json"),
        (b"[[1, 2, 3]]", "application/json"),
        (b"1,2\n", "text/csv"),
        (b"1,2,3\n1,2\n", "text/csv"),
        (b"1,2,3\n\n4,5,6\n", "text/csv"),
        (b"1,2,3\n\n", "text/csv"),
        (b"\n", "text/csv"),
        (b"1,2,\n", "text/csv"),
        (b"1,2,x\n", "text/csv"),
        (b"1,2,1_000\n", "text/csv"),
        (b"1,2,0x10\n", "text/csv"),
        (b"1,2,1e999999\n", "text/csv"),
        ("1,2,\u0663\n".encode(), "text/csv"),
        (b'1,2,"3\n', "text/csv"),
        (b"1,2,\xff\n", "text/csv"),
        (b"1,2," + b"9" * 200_000, "text/csv"),
        (b"a,a,b\n1,2,3\n4,5\n", "text/csv; header=present"),
        (b"[1, 2, 3]\n[1, 2]\n", "application/jsonlines"),
        (b"[1, 2, 3]\n[1, 2, 3\n", "application/jsonlines"),
        (b'[1, 2, 3]\n{"features": [1, 2, 3]}\n', "application/jsonlines"),
        (b'{"features": [1, 2, 3]}\n[1, 2, 3]\n{"other": 1}', "application/jsonlines"),
        (b'{"features": [1, 2, 3], "features": [1, 2, 3]}\n', "application/jsonlines"),
    ],
)
def test_what_does_not_fit(send: Send, refused: Callable[..., str], body: bytes, kind: str) -> None:
    """MLflow, JSON and CSV input; SageMaker, JSON Lines."""
    answer = invoke(send, body, kind)
    refused(answer, 400, orjson.loads(answer.body)["code"])


@pytest.mark.parametrize(
    ("body", "kind"), [(b"", "text/csv"), (b"", "application/jsonlines"), (b"\n \n", "application/jsonlines")]
)
def test_no_rows(send: Send, body: bytes, kind: str) -> None:
    """SageMaker, CSV and JSON Lines: none in, none out."""
    answer = invoke(send, body, kind)
    assert (answer.status, answer.body) == (200, b"")
