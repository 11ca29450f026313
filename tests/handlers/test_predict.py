"""Every event source, what is wrong with an event, limits and deadlines: of the function in this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from handlers._boot import Booted, boot
from handlers._events import ALB_BYTES, PAYLOAD_BYTES
from handlers._function import Function
from infra.local.events import EVENTS, Request, to_http
from tests.handlers.conftest import context
from tests.handlers.starting import golden_event
from triform import testing

HTTP = ("http-v2", "rest", "alb", "alb-multi", "url")
JSON = [("Content-Type", "application/json")]


def asked(
    kind: str, path: str, body: bytes, headers: list[tuple[str, str]] | None = None, method: str = "POST"
) -> dict[str, Any]:
    return EVENTS[kind](Request(method, path, "", JSON if headers is None else headers, body))


def said(function: Function, kind: str, event: Any, seconds: float = 30.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body as the source passes the function's answer on; it must be JSON that Lambda takes."""
    answer = json.dumps(function(event, context(seconds))).encode()
    response = to_http(kind, answer)
    return response.status, {name.lower(): value for name, value in response.headers}, response.body


@pytest.mark.parametrize("kind", HTTP)
def test_golden_events_are_answered(function: Function, kind: str) -> None:
    status, headers, body = said(function, kind, golden_event(kind))
    assert (status, json.loads(body)) == (200, {"predictions": [[14.0], [3.0]]})
    assert headers["x-triform-model"] == "linear/1"
    assert headers["x-request-id"] == "golden-1"


def test_a_direct_invocation_is_answered_with_the_version_that_made_it(function: Function) -> None:
    answer = function(golden_event("direct"), context())
    assert answer == {"predictions": [[14.0], [3.0]], "model": "linear/1", "request_id": "golden-1"}


@pytest.mark.parametrize(
    ("asked_for", "code"),
    [
        ({"version": 1}, None),
        ({"version": "1"}, None),
        ({"alias": "stable"}, None),
        ({"version": 9}, "version_not_found"),
        ({"version": -1}, "version_not_found"),
        ({"alias": "canary"}, "alias_not_found"),
        ({"alias": 7}, "invalid_request"),
        ({"version": 1, "alias": "stable"}, "invalid_request"),
        ({"model": "nobody"}, "model_not_found"),
        ({"model": "../linear"}, "route_not_found"),
        ({"model": 3}, "invalid_request"),
        ({"model": None}, None),
        ({"colour": "red"}, "invalid_request"),
        ({"instances": [[1, 2, 2**70]]}, "invalid_request"),
        ({"instances": [[1, 2, float("inf")]]}, "invalid_request"),
        ({"instances": [[1, 2, float("nan")]]}, "invalid_request"),
        ({"model": "\ud800"}, "invalid_request"),
        ({"alias": "\ud800"}, "invalid_request"),
        ({"instances": [[1, 2]]}, "invalid_input"),
        ({"instances": None}, "invalid_request"),
    ],
)
def test_direct_invocations_choose_and_are_refused(function: Function, asked_for: dict[str, Any], code: str | None) -> None:
    answer = function({"model": "linear", "instances": [[1, 2, 3]]} | asked_for, context())
    assert answer.get("code") == code, answer
    assert ("predictions" in answer) == (code is None)
    if code is not None:
        assert answer["status"] in (400, 404)


def test_inputs_by_column_directly(function: Function) -> None:
    answer = function({"inputs": {"word": [["a"], ["b"]], "x": [[1.0], [2.0]]}, "model": "words"}, context())
    assert answer["outputs"]["twice"] == [[2.0], [4.0]]


@pytest.mark.parametrize(
    "event", [None, [], "text", 3, {}, {"Records": []}, {"version": "2.0", "rawPath": "/"}, {"httpMethod": "GET"}]
)
def test_what_is_no_event_of_ours_is_told_so(function: Function, event: Any) -> None:
    answer = function(event, context())
    assert (answer["status"], answer["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("kind", HTTP)
def test_binary_tensors_both_ways(function: Function, kind: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    headers = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(head)))]
    status, told, body = said(function, kind, asked(kind, "/v2/models/linear/infer", head + x.tobytes(), headers))
    assert status == 200, body
    at = int(told["inference-header-content-length"])
    assert np.frombuffer(body[at:], np.float32).tolist() == (x @ np.array([1, 2, 3], np.float32)).tolist()


@pytest.mark.parametrize("kind", HTTP)
def test_gzip_both_ways(function: Function, kind: str) -> None:
    import gzip

    rows = json.dumps({"instances": [[1, 2, 3]] * 500}).encode()
    headers = [*JSON, ("Content-Encoding", "gzip"), ("Accept-Encoding", "gzip")]
    status, told, body = said(function, kind, asked(kind, "/v1/models/linear:predict", gzip.compress(rows), headers))
    assert (status, told["content-encoding"]) == (200, "gzip")
    assert json.loads(gzip.decompress(body)) == {"predictions": [[14.0]] * 500}


@pytest.mark.parametrize("kind", HTTP)
@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"body": "%%%", "isBase64Encoded": True}, 400),
        ({"body": "YWJ", "isBase64Encoded": True}, 400),
        ({"body": "YWJj\nYWJj", "isBase64Encoded": True}, 400),
        ({"body": "é", "isBase64Encoded": True}, 400),
        ({"body": None}, 400),
        ({"body": None, "isBase64Encoded": None}, 400),
        ({"body": ["a"]}, 400),
        ({"body": {"instances": []}}, 400),
        ({"body": "\ud800"}, 400),
        ({"body": base64.b64encode(b"\xff\xfe").decode(), "isBase64Encoded": True}, 400),
        ({"headers": None, "multiValueHeaders": None}, 200),
        ({"headers": "text", "multiValueHeaders": None}, 400),
        ({"headers": {"content-type": 7}, "multiValueHeaders": None}, 400),
        ({"headers": {"content-type": None}, "multiValueHeaders": None}, 200),
        ({"path": None, "rawPath": None}, 400),
        ({"path": 7, "rawPath": 7}, 400),
        ({"httpMethod": None}, 400),
    ],
)
def test_what_is_wrong_with_an_event_is_the_callers_mistake(
    function: Function, kind: str, wrong: dict[str, Any], status: int
) -> None:
    event = golden_event(kind) | wrong
    if "httpMethod" in wrong and "http" in event["requestContext"]:
        del event["requestContext"]["http"]
    if "path" in wrong and event.get("pathParameters"):
        event["pathParameters"] = None
    answer = function(event, context())
    assert answer["statusCode"] == status, answer
    if status >= 400:
        assert json.loads(answer["body"])["code"] == "invalid_request"
    assert said(function, kind, golden_event(kind))[0] == 200  # and the next one is right


@pytest.mark.parametrize("missing", ["headers", "body", "isBase64Encoded", "pathParameters", "stageVariables", "cookies"])
@pytest.mark.parametrize("kind", HTTP)
def test_missing_fields_are_empty_ones(function: Function, kind: str, missing: str) -> None:
    event = {name: value for name, value in golden_event(kind).items() if name != missing}
    assert function(event, context())["statusCode"] == (400 if missing == "body" else 200)


@pytest.mark.parametrize("kind", HTTP)
@pytest.mark.parametrize(("path", "status"), [("/v2/health/live", 200), ("/nothing", 404), ("/v1/models/..%2f..:predict", 404)])
def test_paths(function: Function, kind: str, path: str, status: int) -> None:
    assert said(function, kind, asked(kind, path, b"", method="GET"))[0] == status


def test_a_path_below_a_stage_or_a_base_path() -> None:
    from handlers._events import source_of

    event = golden_event("http-v2")
    assert source_of(event).request().path == "/v1/models/linear:predict"
    event["pathParameters"] = None
    assert source_of(event).request().path == "/v1/models/linear:predict"
    event["requestContext"]["stage"] = "$default"
    assert source_of(event).request().path == "/prod/v1/models/linear:predict"
    rest = golden_event("rest") | {"path": "/shop/v1/models/linear:predict"}  # a custom domain's base path
    assert source_of(rest).request().path == "/v1/models/linear:predict"


def test_a_load_balancer_is_answered_as_it_asked(function: Function) -> None:
    single, multi = function(golden_event("alb"), context()), function(golden_event("alb-multi"), context())
    assert single["statusDescription"] == multi["statusDescription"] == "200 OK"
    assert single["headers"]["content-type"] == "application/json"
    assert multi["multiValueHeaders"]["content-type"] == ["application/json"]
    assert ("multiValueHeaders" in single, "headers" in multi) == (False, False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Function:
    """y FP32[rows, 10000] of x FP32[rows, 1]: answers that grow past every limit."""
    folder = tmp_path_factory.mktemp("wide")
    testing.repository(folder / "models", {"wide": testing.linear(folder / "wide.onnx", features=1, outputs=10_000)})
    return Function(boot({"TRIFORM_REPOSITORY": str(folder / "models"), "TRIFORM_ALLOW_ANONYMOUS": "true"}))


@pytest.mark.parametrize("kind", HTTP)
def test_an_answer_over_the_limit_is_an_error_and_never_cut(wide: Function, kind: str) -> None:
    limit = ALB_BYTES if kind.startswith("alb") else PAYLOAD_BYTES

    def answer(rows: int) -> tuple[int, bytes, int]:
        event = asked(kind, "/v1/models/wide:predict", json.dumps({"instances": [[0.5]] * rows}).encode())
        whole = wide(event, context())
        return whole["statusCode"], whole["body"].encode(), len(json.dumps(whole))

    fits = 14 if limit == ALB_BYTES else 85
    status, body, size = answer(fits)
    assert status == 200
    assert len(json.loads(body)["predictions"]) == fits
    assert size <= limit
    status, body, size = answer(2 * fits)
    assert (status, json.loads(body)["code"]) == (413, "answer_too_large")
    assert size < 2_000


def test_a_direct_answer_over_the_limit_is_an_error(wide: Function) -> None:
    answer = wide({"instances": [[0.5]] * 200}, context())
    assert (answer["status"], answer["code"]) == (413, "answer_too_large")


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("kind", HTTP)
def test_too_little_time_left_is_a_504(function: Function, kind: str, seconds: float) -> None:
    status, _, body = said(function, kind, golden_event(kind), seconds)
    assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")


def test_too_little_time_left_for_a_direct_invocation(function: Function) -> None:
    answer = function(golden_event("direct"), context(0.1))
    assert (answer["status"], answer["code"]) == (504, "deadline_exceeded")


def test_a_run_is_ended_before_the_platform_would_kill_it(tmp_path: Any) -> None:
    testing.repository(tmp_path / "models", {"slow": testing.slow(tmp_path / "slow.onnx", layers=2000)})
    settings = {"TRIFORM_DEADLINE_MARGIN": "2", "TRIFORM_ALLOW_ANONYMOUS": "true"}
    function = Function(boot({"TRIFORM_REPOSITORY": str(tmp_path / "models"), **settings}))
    x = np.ones((2_000, 256), np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    headers = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(head)))]
    ends = context(4.0)
    answer = function(asked("http-v2", "/v2/models/slow/infer", head + x.tobytes(), headers), ends)
    assert ends.get_remaining_time_in_millis() > 0
    assert (answer["statusCode"], json.loads(answer["body"])["code"]) == (504, "deadline_exceeded")


def test_an_error_shows_neither_traceback_nor_path(started: Callable[..., Booted], models: Any) -> None:
    function = Function(started())
    for event in (golden_event("http-v2") | {"body": "[" * 250_000}, golden_event("rest") | {"body": '{"instances": [[1, 2]]}'}):
        text = json.dumps(function(event, context()))
        assert "Traceback" not in text
        assert str(models) not in text
