"""The events that carry HTTP requests into a function, each source a small class with the same members; a list decides.

    event -> source_of(event) -> .request() -> HttpRequest        HttpResponse -> .answer() -> what the source expects back

Shapes: AWS, "Create Lambda proxy integrations for HTTP APIs" (payload formats 1.0 and 2.0; Function URLs use the latter), "Lambda
functions as Application Load Balancer targets". A field that is null or missing is as good as empty; one that is of another type
than it should be is the caller's mistake. A direct invocation is an event that is none of these.
"""

from __future__ import annotations

import binascii
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import quote, urlencode

import orjson

from triform.errors import AnswerTooLarge, InvalidRequest
from triform.headers import REQUEST_ID, values
from triform.http import MODEL, HttpRequest, HttpResponse

PAYLOAD_BYTES: Final = 6 << 20  # Lambda quotas: request and response of a synchronous invocation
ALB_BYTES: Final = 1 << 20  # "Lambda functions as targets": the response's limit; the request's too
INPUT: Final = "x-triform-input"
OUTPUT: Final = "x-triform-output"
# Whether the runtime client escapes what is not ASCII: by the name of the managed runtime, which an image of one's own has not.
_ASCII: Final = os.environ.get("AWS_EXECUTION_ENV", "") not in {f"AWS_Lambda_python3.{minor}" for minor in range(12, 16)}
_TEXT: Final = ("text/", "application/json", "application/jsonlines")

Event = Mapping[str, Any]


class Source(Protocol):
    """Where an event came from. `limit`: bytes of the whole answer, as JSON."""

    limit: ClassVar[int]

    def __init__(self, event: Event) -> None: ...

    @staticmethod
    def applies(event: Event) -> bool: ...

    def request(self) -> HttpRequest:
        """The request in it. Raises `InvalidRequest`."""

    def answer(self, response: HttpResponse) -> dict[str, Any]: ...


class HttpApi:
    """API Gateway HTTP API, payload format 2.0, and Function URLs."""

    limit: ClassVar[int] = PAYLOAD_BYTES

    def __init__(self, event: Event) -> None:
        self.event = event

    @staticmethod
    def applies(event: Event) -> bool:
        return event.get("version") == "2.0" and "requestContext" in event

    def request(self) -> HttpRequest:
        context = _object(self.event, "requestContext")
        method = _text(_object(context, "http"), "method", "requestContext.http.")
        path = _below_proxy(self.event, _without_stage(_text(self.event, "rawPath"), context.get("stage")))
        query, client = self.event.get("rawQueryString"), _object(context, "http").get("sourceIp")
        return HttpRequest(method, path, _headers(self.event), _body(self.event), str(query or ""), str(client or ""))

    def answer(self, response: HttpResponse) -> dict[str, Any]:
        return {"statusCode": response.status, "headers": response.headers, **_said(response)}


class RestApi:
    """API Gateway REST API, and HTTP APIs with payload format 1.0."""

    limit: ClassVar[int] = PAYLOAD_BYTES

    def __init__(self, event: Event) -> None:
        self.event = event

    @staticmethod
    def applies(event: Event) -> bool:
        return "httpMethod" in event and "requestContext" in event

    def request(self) -> HttpRequest:
        path = _below_proxy(self.event, _text(self.event, "path"))
        headers, body, query = _headers(self.event), _body(self.event), urlencode(_queries(self.event))  # which came decoded
        client = _object(_object(self.event, "requestContext"), "identity").get("sourceIp")
        return HttpRequest(_text(self.event, "httpMethod"), path, headers, body, query, str(client or ""))

    def answer(self, response: HttpResponse) -> dict[str, Any]:
        return {"statusCode": response.status, "headers": response.headers, **_said(response)}


class LoadBalancer:
    """An Application Load Balancer's target group, with or without multi-value headers: it is answered as it asked."""

    limit: ClassVar[int] = ALB_BYTES

    def __init__(self, event: Event) -> None:
        self.event = event

    @staticmethod
    def applies(event: Event) -> bool:
        context = event.get("requestContext")
        return isinstance(context, dict) and "elb" in context

    def request(self) -> HttpRequest:
        path, headers = _text(self.event, "path"), _headers(self.event)
        query = "&".join(f"{name}={value}" for name, value in _queries(self.event))  # as it came
        client = ",".join(values(headers, "x-forwarded-for")).rpartition(",")[2].strip()  # the last is the balancer's own word
        return HttpRequest(_text(self.event, "httpMethod"), path, headers, _body(self.event), query, client)

    def answer(self, response: HttpResponse) -> dict[str, Any]:
        from http import HTTPStatus

        headers: dict[str, Any] = {"headers": response.headers}
        if "multiValueHeaders" in self.event:
            headers = {"multiValueHeaders": {name: [value] for name, value in response.headers.items()}}
        status = f"{response.status} {HTTPStatus(response.status).phrase}"
        return {"statusCode": response.status, "statusDescription": status, **headers, **_said(response)}


class Direct:
    """`aws lambda invoke`, an SDK, Step Functions: {"model": ..., "version" or "alias": ..., "instances" or "inputs": ...}.

    Answered with {"predictions" or "outputs": ..., "model": "name/3", "request_id": ...}, or {"error", "code", "status"}: an
    error that is raised would show the caller a traceback.
    """

    limit: ClassVar[int] = PAYLOAD_BYTES
    FIELDS: Final = ("instances", "inputs", "signature_name")  # of the body; the other fields choose

    def __init__(self, event: Event, default: Callable[[], str] | None = None) -> None:
        self.event = event
        self.default = default

    @staticmethod
    def applies(event: Event) -> bool:  # noqa: ARG004 - the last in the list
        return True

    def request(self) -> HttpRequest:
        known = {"model", "version", "alias", "request_id", "input", "output", *self.FIELDS}
        if unknown := sorted(str(key)[:40] for key in self.event if key not in known):
            raise InvalidRequest(f"unknown field(s) {', '.join(unknown[:5])}: there are {', '.join(sorted(known))}")
        model = self.event.get("model")
        if model is None and self.default is not None:
            model = self.default()
        if not isinstance(model, str):
            raise InvalidRequest("model: expected a name")
        headers = [("content-type", "application/json")]
        for field, header in ("request_id", REQUEST_ID), ("input", INPUT), ("output", OUTPUT):
            if self.event.get(field) is not None:
                headers.append((header, _text(self.event, field)))
        body = {name: self.event[name] for name in self.FIELDS if name in self.event}
        try:
            content = orjson.dumps(body) if body else b""
            if b"null" in content:  # which is also what orjson makes of 1e999 and NaN
                json.dumps(body, allow_nan=False)
            path = f"/v1/models/{quote(model, safe='')}{self._which()}:predict"
        except (TypeError, ValueError):  # an integer beyond 64 bits, half a surrogate pair, infinity
            raise InvalidRequest("the event holds a value that JSON of finite 64-bit numbers and UTF-8 text cannot") from None
        return HttpRequest("POST", path, headers, content)

    def _which(self) -> str:
        version, alias = self.event.get("version"), self.event.get("alias")
        if version is not None and alias is not None:
            raise InvalidRequest("expected version or alias, not both")
        if version is not None:
            return f"/versions/{quote(str(version), safe='')}"
        return f"/labels/{quote(_text(self.event, 'alias'), safe='')}" if alias is not None else ""

    def answer(self, response: HttpResponse) -> dict[str, Any]:
        said: dict[str, Any] = orjson.loads(response.body)
        if response.status == 200:
            return {**said, "model": response.headers.get(MODEL), "request_id": response.headers[REQUEST_ID]}
        return {**said, "status": response.status, "request_id": response.headers[REQUEST_ID]}


SOURCES: Final[tuple[type[Source], ...]] = (LoadBalancer, HttpApi, RestApi)


def source_of(event: Any, default: Callable[[], str] | None = None) -> Source:
    """The source whose event this is. `default` tells the model of direct invocations that name none."""
    event = event if isinstance(event, dict) else {"event": event}
    for source in SOURCES:
        if source.applies(event):
            return source(event)
    return Direct(event, default)


def check_fits(answer: Mapping[str, Any], limit: int) -> None:
    """Raises `AnswerTooLarge` for an answer that the platform would not pass on."""
    body = answer.get("body")
    if body is not None and 6 * len(body) + 65_536 < limit:  # a character takes six bytes at most, escaped
        return
    size = len(json.dumps(answer, ensure_ascii=_ASCII).encode())
    if size > limit:
        raise AnswerTooLarge(
            f"the answer has {size} bytes as the function must give it, {limit} are allowed: send fewer rows at a time, ask for "
            f"binary or gzip, or have it written by reference ({OUTPUT})"
        )


def _object(at: Event, name: str) -> Event:
    value = at.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"the event's {name} is no object")
    return value


def _text(at: Event, name: str, where: str = "") -> str:
    value = at.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"the event's {where}{name} is no text")
    return value


def _without_stage(path: str, stage: Any) -> str:
    """Of an HTTP API's path: a stage that has a name stands in front."""
    if isinstance(stage, str) and stage != "$default" and path.startswith(f"/{stage}/"):
        return path[len(stage) + 1 :]
    return path


def _below_proxy(event: Event, path: str) -> str:
    """What the route's {proxy+} stands for: a domain's base path and a resource's own are not in it."""
    proxy = _object(event, "pathParameters").get("proxy")
    return f"/{proxy}" if isinstance(proxy, str) else path


def _headers(event: Event) -> list[tuple[str, str]]:
    return list(_pairs(_object(event, "multiValueHeaders") or _object(event, "headers")))


def _queries(event: Event) -> list[tuple[str, str]]:
    return list(_pairs(_object(event, "multiValueQueryStringParameters") or _object(event, "queryStringParameters")))


def _pairs(named: Event) -> Iterator[tuple[str, str]]:
    for name, many in named.items():
        for value in many if isinstance(many, list) else [many]:
            if value is None:
                continue
            if not isinstance(value, str):
                raise InvalidRequest(f"the event's header or parameter {str(name)[:80]} is no text")
            yield name, value


def _body(event: Event) -> bytes:
    body = event.get("body")
    if body is None:
        return b""
    if not isinstance(body, str):
        raise InvalidRequest("the event's body is no text")
    try:
        return b64decode(body, validate=True) if event.get("isBase64Encoded") is True else body.encode()
    except (binascii.Error, ValueError):  # what is not ASCII in base64, half a surrogate pair in text
        raise InvalidRequest("the event's body is not what isBase64Encoded says: base64, or text") from None


def _said(response: HttpResponse) -> dict[str, Any]:
    """The body: text where it is text, else base64."""
    kind = response.headers.get("content-type", "")
    if kind.startswith(_TEXT) and "content-encoding" not in response.headers:
        return {"body": response.body.decode(), "isBase64Encoded": False}
    return {"body": b64encode(response.body).decode(), "isBase64Encoded": True}
