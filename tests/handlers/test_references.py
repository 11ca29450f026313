"""Inputs and outputs by reference, against an S3 over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import boto3
import numpy as np
import pytest

from handlers._boot import Booted
from handlers._function import Function
from handlers._references import References
from infra.local.events import EVENTS, Request
from tests.faulty_proxy import FaultyProxy
from tests.handlers.conftest import context
from tests.handlers.loopback import Quiet, served
from triform.errors import ConfigurationError, ReferenceNotAllowed

BODY = json.dumps({"instances": [[1, 2, 3]] * 4}).encode()


@pytest.fixture
def function(started: Callable[..., Booted], s3_bucket: str, s3_server: str) -> Function:
    prefixes = f"s3://{s3_bucket}/in,s3://{s3_bucket}/out/,{s3_server}/{s3_bucket}/signed/"
    return Function(started(TRIFORM_REFERENCE_PREFIXES=prefixes, TRIFORM_REFERENCE_BYTES="30000000"))


def ask(function: Function, body: bytes = b"", ends: Any = None, **headers: str) -> tuple[int, Any]:
    sent = [("content-type", "application/json"), *((name.replace("_", "-"), value) for name, value in headers.items())]
    answer = function(EVENTS["http-v2"](Request("POST", "/v1/models/linear:predict", "", sent, body)), ends or context())
    return answer["statusCode"], json.loads(answer["body"])


def test_input_and_output_by_reference(function: Function, s3_bucket: str) -> None:
    s3 = boto3.client("s3")
    s3.put_object(Bucket=s3_bucket, Key="in/rows.json", Body=BODY)
    assert ask(function, x_triform_input=f"s3://{s3_bucket}/in/rows.json") == (200, {"predictions": [[14.0]] * 4})
    target = f"s3://{s3_bucket}/out/answer.json"
    status, told = ask(function, BODY, x_triform_output=target, accept_encoding="gzip")
    assert (status, told["output"], told["content_type"]) == (200, target, "application/json")
    written = s3.get_object(Bucket=s3_bucket, Key="out/answer.json")["Body"].read()
    assert json.loads(written) == {"predictions": [[14.0]] * 4}
    assert len(written) == told["bytes"]


def test_an_output_is_never_replaced_by_another(function: Function, s3_bucket: str) -> None:
    target = f"s3://{s3_bucket}/out/once.json"
    assert ask(function, BODY, x_triform_output=target)[0] == 200
    assert ask(function, BODY, x_triform_output=target)[0] == 200  # the same answer again
    status, told = ask(function, b'{"instances": [[0, 0, 1]]}', x_triform_output=target)
    assert (status, told["code"]) == (409, "output_exists")


def test_what_is_larger_than_an_event_may_be(function: Function, s3_bucket: str) -> None:
    x = np.ones((800_000, 3), np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    boto3.client("s3").put_object(Bucket=s3_bucket, Key="in/large.bin", Body=head + x.tobytes())
    headers = [("Inference-Header-Content-Length", str(len(head))), ("content-type", "application/octet-stream")]
    headers += [("x-triform-input", f"s3://{s3_bucket}/in/large.bin"), ("x-triform-output", f"s3://{s3_bucket}/out/large.bin")]
    answer = function(EVENTS["http-v2"](Request("POST", "/v2/models/linear/infer", "", headers, b"")), context())
    assert answer["statusCode"] == 200, answer
    written = boto3.client("s3").get_object(Bucket=s3_bucket, Key="out/large.bin")["Body"].read()
    at = int(answer["headers"]["inference-header-content-length"])
    assert np.frombuffer(written[at:], np.float32).tolist() == [6.0] * 800_000


def test_direct_invocations_take_references(function: Function, s3_bucket: str) -> None:
    boto3.client("s3").put_object(Bucket=s3_bucket, Key="in/rows.json", Body=BODY)
    event = {"input": f"s3://{s3_bucket}/in/rows.json", "output": f"s3://{s3_bucket}/out/direct.json"}
    answer = function(event, context())
    assert (answer["output"], answer["model"]) == (event["output"], "linear/1")


def test_an_input_by_reference_and_one_in_the_request_are_one_too_many(function: Function, s3_bucket: str) -> None:
    named = f"s3://{s3_bucket}/in/rows.json"
    boto3.client("s3").put_object(Bucket=s3_bucket, Key="in/rows.json", Body=BODY)
    for more in {"instances": [[1, 2, 3]]}, {"inputs": [[1, 2, 3]]}, {"signature_name": "serving_default"}:
        answer = function({"input": named, **more}, context())
        assert (answer["status"], answer["code"]) == (400, "invalid_request")
        assert "not both" in answer["error"]
    status, told = ask(function, BODY, x_triform_input=named)
    assert (status, told["code"]) == (400, "invalid_request")


def test_presigned_urls(function: Function, s3_bucket: str) -> None:
    s3 = boto3.client("s3")
    s3.put_object(Bucket=s3_bucket, Key="signed/rows.json", Body=BODY)
    source = s3.generate_presigned_url("get_object", Params={"Bucket": s3_bucket, "Key": "signed/rows.json"})
    target = s3.generate_presigned_url("put_object", Params={"Bucket": s3_bucket, "Key": "signed/answer.json"})
    status, told = ask(function, x_triform_input=source, x_triform_output=target)
    assert status == 200, told
    assert json.loads(s3.get_object(Bucket=s3_bucket, Key="signed/answer.json")["Body"].read()) == {"predictions": [[14.0]] * 4}
    assert ask(function, x_triform_input=source.replace("rows", "none"))[0] == 404


@contextmanager
def store(say: Callable[[BinaryIO], None]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every GET and PUT alike: its address, and what it was asked."""
    asked: list[str] = []

    class Answer(Quiet):
        def reply(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.body()
            with suppress(OSError):  # who asked may have given up
                say(self.wfile)

    with served(Answer) as address:
        yield address, asked


BOTH = ["x_triform_input", "x_triform_output"]


def sent(reference: str) -> bytes:
    return b"" if reference == "x_triform_input" else BODY


@pytest.mark.parametrize("reference", BOTH)
@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        (400, 403, "reference_not_allowed"),
        (401, 403, "reference_not_allowed"),
        (403, 403, "reference_not_allowed"),  # what S3 says of a URL that has expired
        (404, 404, "not_found"),
        (410, 404, "not_found"),
        (412, 409, "output_exists"),
        (301, 403, "reference_not_allowed"),
        (307, 403, "reference_not_allowed"),
        (429, 503, "store_unavailable"),
        (500, 503, "store_unavailable"),
        (503, 503, "store_unavailable"),
    ],
)
def test_what_a_store_refuses_is_the_callers_error_unless_it_is_the_stores(
    started: Callable[..., Booted], reference: str, answers: int, status: int, code: str
) -> None:
    with store(lambda _: None) as (elsewhere, asked_elsewhere):

        def say(to: BinaryIO) -> None:
            to.write(f"HTTP/1.1 {answers} X\r\nLocation: {elsewhere}/in/x\r\nContent-Length: 6\r\n\r\nsecret".encode())

        with store(say) as (address, _):
            function = Function(started(TRIFORM_REFERENCE_PREFIXES=f"{address}/in/"))
            got, told = ask(function, sent(reference), **{reference: f"{address}/in/x?X-Amz-Signature=hush"})
    assert (got, told["code"]) == (status, code)
    assert str(answers) in told["error"] or code == "output_exists"
    assert not any(hidden in told["error"] for hidden in ("hush", "secret", address))
    assert asked_elsewhere == []


def test_a_body_that_ends_too_early_is_the_stores_fault(started: Callable[..., Booted]) -> None:
    with store(lambda to: to.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + BODY) and None) as (address, _):
        function = Function(started(TRIFORM_REFERENCE_PREFIXES=f"{address}/in/"))
        status, told = ask(function, x_triform_input=f"{address}/in/x")
    assert (status, told["code"]) == (503, "store_unavailable")


@pytest.mark.parametrize("reference", BOTH)
@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["header", "body"])
def test_a_store_that_trickles_does_not_outlive_the_deadline(
    started: Callable[..., Booted], reference: str, begin: bytes
) -> None:
    ended = threading.Event()

    def trickle(to: BinaryIO) -> None:
        to.write(begin)
        while not ended.wait(0.1):
            to.write(b"x")

    with store(trickle) as (address, _):
        function = Function(started(TRIFORM_REFERENCE_PREFIXES=f"{address}/in/", TRIFORM_DEADLINE_MARGIN="5"))
        ends, watch = context(6.0), threading.Timer(20.0, ended.set)  # lest a function that waits does so for ever
        watch.start()
        status, told = ask(function, sent(reference), ends, **{reference: f"{address}/in/x"})
        left = ends.get_remaining_time_in_millis()
        ended.set()
        watch.cancel()
    assert (status, told["code"]) == (504, "deadline_exceeded")
    assert left > 0


def test_a_bucket_that_stalls_does_not_outlive_the_deadline(
    started: Callable[..., Booted], s3_bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(proxy, "stall_seconds", 20.0)
    function = Function(started(TRIFORM_REFERENCE_PREFIXES=f"s3://{s3_bucket}/out/", TRIFORM_DEADLINE_MARGIN="5"))
    proxy.fail("stall", method="PUT", where=s3_bucket)
    ends = context(10.0)  # five seconds until the deadline, of which the machine may need some to get to the bucket
    status, told = ask(function, BODY, ends, x_triform_output=f"s3://{s3_bucket}/out/a.json")
    assert (status, told["code"]) == (504, "deadline_exceeded")
    assert ends.get_remaining_time_in_millis() > 0
    assert proxy.taken == ["stall"]
    assert ask(function, BODY, x_triform_output=f"s3://{s3_bucket}/out/a.json")[0] == 200  # the same answer again


@pytest.mark.parametrize(
    "reference",
    [
        "s3://{bucket}/secret/rows.json",
        "s3://{bucket}/in",
        "s3://{bucket}/in/",
        "s3://{bucket}/input/rows.json",
        "s3://{bucket}/in/../secret/rows.json",
        "s3://other/in/rows.json",
        "s3:///in/rows.json",
        "http://127.0.0.1:9/{bucket}/signed/rows.json",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/etc/passwd",
        "s3://{bucket}/in/a b",
        "s3://{bucket}/in/\u00e9",
        "s3://{bucket}/in/" + "k" * 3000,
    ],
)
def test_what_may_not_be_named(function: Function, s3_bucket: str, reference: str) -> None:
    named = reference.format(bucket=s3_bucket)
    for header in BOTH:
        status, told = ask(function, sent(header), **{header: named})
        assert (status, told["code"]) == (403, "reference_not_allowed")
        assert named not in told["error"]


def test_without_prefixes_nothing_may_be_named(started: Callable[..., Booted], s3_bucket: str) -> None:
    status, told = ask(Function(started()), x_triform_input=f"s3://{s3_bucket}/in/rows.json")
    assert (status, told["code"]) == (403, "reference_not_allowed")


def test_a_reference_to_nothing_and_to_too_much(function: Function, s3_bucket: str) -> None:
    assert ask(function, x_triform_input=f"s3://{s3_bucket}/in/nothing.json")[0] == 404
    boto3.client("s3").put_object(Bucket=s3_bucket, Key="in/large", Body=b" " * 30_000_001)
    status, told = ask(function, x_triform_input=f"s3://{s3_bucket}/in/large")
    assert (status, told["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    "prefix", ["bucket/in", "http://store/in/", "file:///in/", "s3://", "s3://b/../c/", "https://u@host/in/"]
)
def test_prefixes_that_refuse_the_start(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="reference_prefixes"):
        References([prefix], 1)


@pytest.mark.parametrize(
    "location", ["https://host.evil/in/x", "https://host/in/../x", "https://host@evil/in/x", "https://host/in/%2e%2e/x"]
)
def test_urls_that_only_look_like_the_prefix(location: str) -> None:
    with pytest.raises(ReferenceNotAllowed):
        References(["https://host/in/"], 1).check(location)
    References(["https://host/in/"], 1).check("https://host/in/x?X-Amz-Signature=a%2e%2e")
