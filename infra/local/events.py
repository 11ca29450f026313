"""HTTP requests as the events that AWS makes of them, and the functions' answers as HTTP responses.

    HTTP request -> EVENTS[kind](request) -> event -> function -> answer -> to_http -> HTTP response

Shapes: AWS, "Create Lambda proxy integrations", "Lambda functions as targets". What tests post to a handler is made here, too,
so that the golden files of tests/events and the local gateway cannot drift apart.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

ACCOUNT: Final = "123456789012"
_TEXT: Final = ("text/", "application/json", "application/javascript", "application/xml", "application/x-www-form-urlencoded")


class Request(NamedTuple):
    """`path` and `query` as they came."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    request_id: str = "0" * 8

    def header(self, name: str) -> str:
        return ",".join(value for key, value in self.headers if key.lower() == name)


class Response(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class BadAnswer(ValueError):
    """The function's answer is none that this source takes."""


def http_v2(request: Request, domain: str = "api.execute-api.us-east-1.amazonaws.com") -> dict[str, Any]:
    """API Gateway HTTP API, payload format 2.0."""
    joined: dict[str, str] = {}
    for name, value in request.headers:
        key = name.lower()
        joined[key] = f"{joined[key]},{value}" if key in joined else value
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": request.path,
        "rawQueryString": request.query,
        "headers": joined,
        "requestContext": {
            "accountId": ACCOUNT,
            "apiId": domain.partition(".")[0],
            "domainName": domain,
            "http": {
                "method": request.method,
                "path": request.path,
                "protocol": "HTTP/1.1",
                "sourceIp": "127.0.0.1",
                "userAgent": request.header("user-agent"),
            },
            "requestId": request.request_id,
            "routeKey": "$default",
            "stage": "$default",
            "timeEpoch": int(time.time() * 1e3),
        },
        **_body(request),
    }


def url(request: Request) -> dict[str, Any]:
    """A Function URL: payload format 2.0 under another domain."""
    return http_v2(request, "function.lambda-url.us-east-1.on.aws")


def rest(request: Request) -> dict[str, Any]:
    """API Gateway REST API with a `/{proxy+}` resource and `*/*` as its binary media types."""
    single, multi = _both(request.headers)
    query, queries = _both(parse_qsl(request.query, keep_blank_values=True))
    return {
        "resource": "/{proxy+}",
        "path": unquote(request.path),
        "httpMethod": request.method,
        "headers": single or None,
        "multiValueHeaders": multi or None,
        "queryStringParameters": query or None,
        "multiValueQueryStringParameters": queries or None,
        "pathParameters": {"proxy": unquote(request.path).removeprefix("/")},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": "/{proxy+}",
            "httpMethod": request.method,
            "path": f"/prod{request.path}",
            "stage": "prod",
            "requestId": request.request_id,
            "accountId": ACCOUNT,
            "identity": {"sourceIp": "127.0.0.1", "userAgent": request.header("user-agent")},
        },
        **({"body": None, "isBase64Encoded": False} | _body(request)),
    }


def alb(request: Request, *, multi_value: bool = False) -> dict[str, Any]:
    """An Application Load Balancer's target group."""
    single, multi = _both([(name.lower(), value) for name, value in request.headers])
    query, queries = _both([pair.partition("=")[::2] for pair in request.query.split("&") if pair])  # it decodes nothing
    group = f"arn:aws:elasticloadbalancing:us-east-1:{ACCOUNT}:targetgroup/triform/0123456789abcdef"
    return {
        "requestContext": {"elb": {"targetGroupArn": group}},
        "httpMethod": request.method,
        "path": request.path,
        **({"multiValueQueryStringParameters": queries} if multi_value else {"queryStringParameters": query}),
        **({"multiValueHeaders": multi} if multi_value else {"headers": single}),
        **({"body": "", "isBase64Encoded": False} | _body(request)),
    }


def alb_multi(request: Request) -> dict[str, Any]:
    return alb(request, multi_value=True)


EVENTS: Final[Mapping[str, Callable[[Request], dict[str, Any]]]] = {
    "http-v2": http_v2,
    "rest": rest,
    "alb": alb,
    "alb-multi": alb_multi,
    "url": url,
}
# What a caller sees where the function fails: status and body of each source.
FAILED: Final[Mapping[str, tuple[int, bytes]]] = {
    "http-v2": (500, b'{"message":"Internal Server Error"}'),
    "rest": (502, b'{"message": "Internal server error"}'),
    "alb": (502, b"<html><head><title>502 Bad Gateway</title></head></html>"),
    "alb-multi": (502, b"<html><head><title>502 Bad Gateway</title></head></html>"),
    "url": (502, b"Internal Server Error"),
}


def to_http(kind: str, payload: bytes) -> Response:
    """The function's answer as the source would pass it on. Raises `BadAnswer`."""
    try:
        answer = json.loads(payload)
    except ValueError as error:
        raise BadAnswer(f"not JSON: {error}") from error
    if kind in ("http-v2", "url") and not (isinstance(answer, dict) and "statusCode" in answer):
        return Response(200, [("content-type", "application/json")], payload)  # the whole answer is the body
    if not isinstance(answer, dict) or not isinstance(answer.get("statusCode"), int):
        raise BadAnswer("no statusCode")
    many = answer.get("multiValueHeaders")
    if kind == "alb-multi" and not many:
        raise BadAnswer("a target group with multi-value headers wants multiValueHeaders")
    headers = [(name, str(value)) for name, value in (answer.get("headers") or {}).items()]
    if kind != "alb":
        headers += [(name, str(value)) for name, values in (many or {}).items() for value in values]
    body = answer.get("body") or ""
    if not isinstance(body, str):
        raise BadAnswer("the body is no text")
    return Response(answer["statusCode"], headers, b64decode(body) if answer.get("isBase64Encoded") else body.encode())


def _both(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The last value of each name, and all of them."""
    many: dict[str, list[str]] = {}
    for name, value in pairs:
        many.setdefault(name, []).append(value)
    return {name: values[-1] for name, values in many.items()}, many


def _body(request: Request) -> dict[str, Any]:
    """Text where the content type says so and it is UTF-8, else base64."""
    if not request.body:
        return {"isBase64Encoded": False}
    if request.header("content-type").lower().startswith(_TEXT) and not request.header("content-encoding"):
        try:
            return {"body": request.body.decode(), "isBase64Encoded": False}
        except UnicodeDecodeError:
            pass
    return {"body": b64encode(request.body).decode(), "isBase64Encoded": True}
