"""Inputs and outputs by reference, against an S3 over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import boto3
import numpy as np
import pytest

from handlers._boot import Booted
from handlers._function import Function
from handlers._references import References
from infra.local.events import EVENTS, Request
from tests.handlers.conftest import context
from triform.errors import ConfigurationError, ReferenceNotAllowed

BODY = json.dumps({"instances": [[1, 2, 3]] * 4}).encode()


@pytest.fixture
def function(started: Callable[..., Booted], s3_bucket: str, s3_server: str) -> Function:
    prefixes = f"s3://{s3_bucket}/in,s3://{s3_bucket}/out/,{s3_server}/{s3_bucket}/signed/"
    return Function(started(TRIFORM_REFERENCE_PREFIXES=prefixes, TRIFORM_REFERENCE_BYTES="30000000"))


def ask(function: Function, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    sent = [("content-type", "application/json"), *((name.replace("_", "-"), value) for name, value in headers.items())]
    answer = function(EVENTS["http-v2"](Request("POST", "/v1/models/linear:predict", "", sent, body)), context())
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


def test_presigned_urls(function: Function, s3_bucket: str) -> None:
    s3 = boto3.client("s3")
    s3.put_object(Bucket=s3_bucket, Key="signed/rows.json", Body=BODY)
    source = s3.generate_presigned_url("get_object", Params={"Bucket": s3_bucket, "Key": "signed/rows.json"})
    target = s3.generate_presigned_url("put_object", Params={"Bucket": s3_bucket, "Key": "signed/answer.json"})
    status, told = ask(function, x_triform_input=source, x_triform_output=target)
    assert status == 200, told
    assert json.loads(s3.get_object(Bucket=s3_bucket, Key="signed/answer.json")["Body"].read()) == {"predictions": [[14.0]] * 4}
    assert ask(function, x_triform_input=source.replace("rows", "none"))[0] == 404


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
    for headers in ({"x_triform_input": named}, {"x_triform_output": named}):
        status, told = ask(function, BODY, **headers)
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
