"""Who calls a function: AWS's own word in the event's context, else a key; never a header, and nothing is read for a stranger."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handlers._boot import Booted
from handlers._function import Function
from handlers._identity import identity_of
from tests.handlers.conftest import context
from tests.handlers.starting import golden_event as golden
from triform.api_keys import KeyRing, new_key

KEY, KEPT = new_key({"infer"})
ANSWER = {"predictions": [[14.0], [3.0]]}
ARN = "arn:aws:iam::123456789012:role/callers"


@pytest.fixture
def closed(started: Callable[..., Booted]) -> Callable[..., Function]:
    """`closed(TRIFORM_...="...")`: a function that lets in nobody whom it does not know; it knows one key."""

    def make(**environ: str) -> Function:
        keys = msgspec.json.encode(KeyRing([KEPT])).decode()
        return Function(started(**{"TRIFORM_ALLOW_ANONYMOUS": "false", "TRIFORM_API_KEYS": keys} | environ))

    return make


def of(kind: str, context: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The golden event with another authorizer, identity or header."""
    event = golden(kind)
    event["requestContext"] = {**event["requestContext"], **context}
    for name in "headers", "multiValueHeaders":
        if event.get(name):
            more = {key: value if name == "headers" else [value] for key, value in (headers or {}).items()}
            event[name] = {**event[name], **more}
    return event


@pytest.mark.parametrize(
    ("event", "who"),
    [
        (golden("http-v2"), "jwt:42"),
        (of("http-v2", {"authorizer": {"jwt": {"claims": {"client_id": "batch"}}}}), "jwt:batch"),
        (of("http-v2", {"authorizer": {"iam": {"userArn": ARN, "accessKey": "AKIA"}}}), f"iam:{ARN}"),
        (of("http-v2", {"authorizer": {"lambda": {"principalId": "ann"}}}), "authorizer:ann"),
        (of("http-v2", {"authorizer": {"lambda": {}}}), "authorizer:unnamed"),
        (of("url", {"authorizer": {"iam": {"userArn": ARN}}}), f"iam:{ARN}"),
        (of("rest", {"authorizer": {"principalId": "ann", "integrationLatency": 3}}), "authorizer:ann"),
        (of("rest", {"authorizer": {"claims": {"sub": "42"}}}), "jwt:42"),
        (of("rest", {"identity": {"userArn": ARN, "sourceIp": "192.0.2.1"}}), f"iam:{ARN}"),
    ],
)
def test_whom_the_gateway_vouches_for_is_let_in(closed: Callable[..., Function], event: dict[str, Any], who: str) -> None:
    assert identity_of(event) == who
    function = closed()
    answer = function(event, context())
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, ANSWER)


NOT_HIS_WORD = {"authorization": "Bearer eyJhbGciOiJub25lIn0.e30.", "x-amzn-oidc-identity": "root", "x-amzn-oidc-data": "e30"}


@pytest.mark.parametrize(
    "event",
    [
        golden("rest"),
        golden("url"),
        golden("alb"),
        golden("alb-multi"),
        *(of(kind, {}, NOT_HIS_WORD) for kind in ("rest", "url", "alb", "alb-multi")),
        *(of("alb", {name: {"principalId": "root", "iam": {"userArn": ARN}}}) for name in ("authorizer", "identity")),
        *(of("http-v2", {"authorizer": wrong}) for wrong in (None, {}, [], "root", 1, {"jwt": "root"}, {"iam": {"userArn": ""}})),
        *(
            of("http-v2", {"authorizer": {"jwt": {"claims": wrong}}})
            for wrong in (None, {}, [], {"sub": 42}, {"sub": None}, {"sub": ""})
        ),
        of("http-v2", {"authorizer": {"lambda": None}}),
        of("rest", {"authorizer": {"principalId": None}, "identity": {"userArn": None, "apiKeyId": "k"}}),
        of("rest", {"authorizer": {"principalId": {"sub": "root"}}}),
        {**golden("rest"), "authorizer": {"principalId": "root"}},
    ],
)
def test_what_vouches_for_nobody(closed: Callable[..., Function], event: dict[str, Any]) -> None:
    function = closed()
    answer = function(event, context())
    headers = answer.get("headers") or {name: values[0] for name, values in answer["multiValueHeaders"].items()}
    assert (answer["statusCode"], json.loads(answer["body"])["code"]) == (401, "unauthenticated")
    assert "Bearer" in headers["www-authenticate"]


@pytest.mark.parametrize("kind", ["rest", "url", "alb", "alb-multi"])
def test_keys_work_where_no_authorizer_is(closed: Callable[..., Function], kind: str) -> None:
    answer = closed()(of(kind, {}, {"authorization": f"Bearer {KEY}"}), context())
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, ANSWER)


def test_the_authorizer_comes_first(closed: Callable[..., Function]) -> None:
    """A token that the gateway has checked stands where a key would: it is none, and nobody asks."""
    function = closed()
    assert function(of("http-v2", {}, {"authorization": "Bearer eyJhbGciOiJub25lIn0.e30."}), context())["statusCode"] == 200


def test_direct_invocations_are_iams_to_allow(closed: Callable[..., Function]) -> None:
    function = closed()
    assert function(golden("direct"), context())["predictions"] == ANSWER["predictions"]
    assert function({**golden("direct"), "requestContext": {}}, context())["code"] == "invalid_request"


def test_an_operator_of_the_platforms_is_named_by_its_id(closed: Callable[..., Function]) -> None:
    function = closed(TRIFORM_OPERATORS="jwt:41,iam:arn:aws:iam::*:role/callers")
    override = {"x-triform-version": "1"}
    answer = function(of("http-v2", {}, override), context())
    assert (answer["statusCode"], json.loads(answer["body"])["code"]) == (403, "forbidden")
    answer = function(of("http-v2", {"authorizer": {"iam": {"userArn": ARN}}}, override), context())
    assert (answer["statusCode"], answer["headers"]["x-triform-model"]) == (200, "linear/1")


def test_nothing_is_read_for_a_stranger(closed: Callable[..., Function], tmp_path: Path) -> None:
    """Nobody listens at the reference: who came so far as to ask for it is told 503."""
    function = closed(TRIFORM_REFERENCE_PREFIXES="http://127.0.0.1:9/in/")
    reference = {"x-triform-input": "http://127.0.0.1:9/in/rows.json"}
    assert function({**of("url", {}, reference), "body": None}, context())["statusCode"] == 401
    known = of("url", {}, {**reference, "authorization": f"Bearer {KEY}"})
    assert function({**known, "body": None}, context())["statusCode"] == 503


def test_who_asked_is_in_the_log_and_refusals_are_counted_once(
    closed: Callable[..., Function], capsys: pytest.CaptureFixture[str]
) -> None:
    function = closed()
    function(golden("http-v2"), context())
    function(golden("url"), context())
    function(of("url", {}, {"x-triform-input": "http://127.0.0.1:9/in/rows.json"}), context())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(line["code"], line["caller"]) for line in lines if line.get("message") == "request"]
    assert told == [("ok", "jwt:42"), ("unauthenticated", ""), ("unauthenticated", "")]
    counted = [line["triform_requests_total"] for line in lines if "triform_requests_total" in line]
    assert counted == [[1.0]] * 3
