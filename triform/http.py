"""The HTTP surface, the same on every host: a request in, a response out. No web framework, no sockets.

    HttpRequest -> ROUTES -> body (limits, gzip) -> protocol -> service.py -> protocol -> HttpResponse
                                                     any TriformError -> {"error": ..., "code": ...} with its status

A host gives the request as it came and sends the response as it is. Names of headers are compared without case; the path is
percent-decoded here.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import msgspec

from triform.errors import (
    AnswerTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    RouteNotFound,
    TriformError,
    UnsupportedMediaType,
    UnsupportedMethod,
    VersionNotFound,
)
from triform.protocols import invocations, oip, tfs
from triform.protocols.bodies import Call, Encoded, write_json
from triform.repository import VERSION
from triform.service import Exchange, InferenceService, Served

log = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
MODEL: Final = "x-triform-model"
_CLEAN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+@-]{0,127}")
_WINDOW: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's wbits
_WORTH_PACKING: Final = 1024  # bytes
_JSON_TYPES: Final = ("", "application/json", "application/x-www-form-urlencoded")  # the last is what `curl -d` says of JSON
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


class HttpRequest(NamedTuple):
    """`path` percent-encoded, without the query; `headers` in the order they came, a repeated one twice."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


class HttpResponse(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes: of a request's body as it is sent and unpacked, of a response's body."""

    request: int = 16 << 20
    unpacked: int = 64 << 20
    response: int = 64 << 20


class Route(NamedTuple):
    """`operation` is the name of the method of `HttpSurface` that answers, and the operationId in openapi.json."""

    method: str
    template: str
    operation: str

    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/:]+)", re.escape(self.template)))


def _models_of(protocol: str, *operations: tuple[str, str, str], alias: bool = False) -> list[Route]:
    """The routes of a model, of one of its versions and, in a protocol that has them, of an alias."""
    chosen = ["", "/versions/{version}"] + (["/labels/{alias}"] if alias else [])
    return [
        Route(method, f"/{protocol}/models/{{model}}{which}{rest}", operation)
        for method, rest, operation in operations
        for which in chosen
    ]


ROUTES: Final = (
    *_models_of("v2", ("POST", "/infer", "v2_infer")),
    *_models_of("v1", ("POST", ":predict", "v1_predict"), alias=True),
    Route("POST", "/invocations", "invocations"),
    Route("GET", "/v2/health/live", "v2_live"),
    Route("GET", "/v2/health/ready", "v2_ready"),
    Route("GET", "/ping", "ping"),
    Route("GET", "/v2", "v2_server"),
    *_models_of("v2", ("GET", "/ready", "v2_model_ready"), ("GET", "", "v2_model")),
    *_models_of("v1", ("GET", "/metadata", "v1_metadata"), ("GET", "", "v1_status"), alias=True),
    *_models_of("v1", ("POST", ":classify", "v1_unsupported"), ("POST", ":regress", "v1_unsupported"), alias=True),
)


class Received(NamedTuple):
    """A request on its way through the surface."""

    http: HttpRequest
    request_id: str
    deadline: float | None
    started: float

    def header(self, name: str) -> str | None:
        """The header's value. Raises `InvalidRequest` where it stands twice with different values."""
        values = {value.strip() for key, value in self.http.headers if key.lower() == name}
        if len(values) > 1:
            raise InvalidRequest(f"the header {name} is given twice")
        return values.pop() if values else None

    def media_type(self) -> tuple[str, dict[str, str]]:
        """Of the body: the type in lower case, "" where it is not said, and its parameters."""
        return media_type(self.header("content-type") or "")


Chosen = Mapping[str, str]


class HttpSurface:
    """What a host calls. Thread-safe. What came of each inference request is in the service's telemetry."""

    def __init__(self, service: InferenceService, limits: Limits | None = None) -> None:
        self.service = service
        self.limits = limits or Limits()
        self._routes = [(route, route.pattern()) for route in ROUTES]

    def handle(self, http: HttpRequest, *, deadline: float | None = None, request_id: str | None = None) -> HttpResponse:
        """Answers a request; never raises. `deadline`: a `time.monotonic()`; `request_id`: the host's, if the caller has none."""
        received = Received(http, _request_id(http.headers, request_id), deadline, time.perf_counter())
        extra: dict[str, str] = {}
        try:
            operation, chosen = self._find(http)
            status, encoded, extra = operation(received, chosen)
        except TriformError as error:
            status, encoded, extra = _failure(error)
            if status >= 500:
                log.warning("request %s: %s", received.request_id, error.code, exc_info=error)
        except Exception:
            log.exception("request %s failed", received.request_id)
            status, encoded, extra = _failure(TriformError("the server failed; its log knows why"))
        headers = {"content-type": encoded.content_type, **encoded.headers, **extra, REQUEST_ID: received.request_id}
        body = _pack(encoded.body, http.headers, headers)
        return HttpResponse(status, headers, b"" if http.method == "HEAD" else body)

    def refuse(self, error: TriformError, headers: Sequence[tuple[str, str]] = (), request_id: str | None = None) -> HttpResponse:
        """The answer to a request that its host found at fault; `headers` are the request's."""
        told = {"content-type": "application/json", REQUEST_ID: _request_id(headers, request_id)}
        if error.retryable:
            told["retry-after"] = "1"
        return HttpResponse(error.http_status, told, write_json({"error": str(error), "code": error.code}))

    def _find(self, http: HttpRequest) -> tuple[Callable[[Received, Chosen], Answer], Chosen]:
        path, method = unquote(http.path), "GET" if http.method == "HEAD" else http.method
        allowed = []
        for route, pattern in self._routes:
            if (match := pattern.fullmatch(path)) is None:
                continue
            if route.method == method:
                return getattr(self, route.operation), match.groupdict()
            allowed.append(route.method)
        if allowed:
            raise MethodNotAllowed(f"{http.method[:20]} is not for this path: use {allowed[0]}", allowed=", ".join(allowed))
        raise RouteNotFound("no such path")

    def v2_infer(self, received: Received, chosen: Chosen) -> Answer:
        def decode(body: bytes, served: Served) -> Call:
            _expect(received, (*_JSON_TYPES, "application/octet-stream"))
            return oip.decode(body, _header_length(received), served)

        return self._infer(received, chosen, decode)

    def v1_predict(self, received: Received, chosen: Chosen) -> Answer:
        def decode(body: bytes, served: Served) -> Call:
            _expect(received, _JSON_TYPES)
            return tfs.decode(body, served)

        return self._infer(received, chosen, decode)

    def invocations(self, received: Received, chosen: Chosen) -> Answer:
        def decode(body: bytes, served: Served) -> Call:
            kind, parameters = received.media_type()
            return invocations.decode(body, kind, parameters, received.header("accept") or "", served)

        return self._infer(received, chosen, decode)

    def _infer(self, received: Received, chosen: Chosen, decode: Callable[[bytes, Served], Call]) -> Answer:
        with self.service.exchange(received.request_id, deadline=received.deadline, started=received.started) as exchange:
            served = _choose(exchange, chosen)
            with exchange.stage("decode"):
                call = decode(self._body(received), served)
            outputs = exchange.infer(call.inputs)
            with exchange.stage("encode"):
                encoded = call.encode(outputs)
            if len(encoded.body) > self.limits.response:
                raise AnswerTooLarge(
                    f"the answer has {len(encoded.body)} bytes, {self.limits.response} are allowed: send fewer rows at a time, "
                    "or ask for fewer outputs"
                )
        return 200, encoded, {MODEL: served.manifest.ref}

    def _body(self, received: Received) -> bytes:
        """The body, unpacked. Raises `PayloadTooLarge`, `UnsupportedMediaType` or `InvalidRequest`."""
        body = received.http.body
        if len(body) > self.limits.request:
            raise PayloadTooLarge(f"the body has {len(body)} bytes, {self.limits.request} are allowed")
        encoding = (received.header("content-encoding") or "identity").lower()
        if encoding == "identity":
            return body
        if encoding not in _WINDOW:
            raise UnsupportedMediaType(f"content-encoding {encoding[:40]!r}: expected gzip or deflate")
        return unpack(body, _WINDOW[encoding], self.limits.unpacked)

    def v2_server(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002 - all operations are called alike
        from triform import __version__

        return _json(oip.server_metadata(__version__))

    def v2_live(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        return _json({"live": True})

    def v2_ready(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        ready = self.service.models.all_ready()
        return _json({"ready": ready}, 200 if ready else 503)

    def ping(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        return _json({}, 200 if self.service.models.all_ready() else 503)

    def v2_model(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        served = self._served(chosen)
        return _json(oip.model_metadata(served, self.service.models.versions(chosen["model"])))

    def v2_model_ready(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        ready = self.service.models.is_ready(chosen["model"], _version(chosen))
        return _json({"name": chosen["model"], "ready": ready}, 200 if ready else 503)

    def v1_status(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        models = self.service.models
        versions = models.versions(chosen["model"])
        if "version" in chosen or "alias" in chosen:
            versions = [self._served(chosen).manifest.version]
        return _json(tfs.status({version: models.is_ready(chosen["model"], version) for version in versions}))

    def v1_metadata(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        return _json(tfs.metadata(self._served(chosen)))

    def v1_unsupported(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        raise UnsupportedMethod("classify and regress take tf.Example, which an ONNX model does not: use :predict")

    def _served(self, chosen: Chosen) -> Served:
        return self.service.models.get(chosen["model"], version=_version(chosen), alias=chosen.get("alias"))


Answer = tuple[int, Encoded, dict[str, str]]


def _json(value: Any, status: int = 200) -> Answer:
    return status, Encoded(write_json(value)), {}


def _failure(error: TriformError) -> Answer:
    """The answer that tells of an error: its message and code, nothing of where it was raised."""
    extra = {"allow": error.allowed} if isinstance(error, MethodNotAllowed) and error.allowed else {}
    if error.retryable:
        extra["retry-after"] = "1"
    return error.http_status, Encoded(write_json({"error": str(error), "code": error.code})), extra


def _request_id(headers: Sequence[tuple[str, str]], given: str | None) -> str:
    """The caller's, if it can stand in a log and a header as it is; else the host's; else a new one."""
    for key, value in headers:
        if key.lower() == REQUEST_ID and _CLEAN_ID.fullmatch(value):
            return value
    return given or uuid.uuid4().hex


def _version(chosen: Chosen) -> int | None:
    version = chosen.get("version")
    if version is None:
        return None
    if not VERSION.fullmatch(version):
        raise VersionNotFound(f"{version[:40]!r} is no version: versions are positive integers")
    return int(version)


def _choose(exchange: Exchange, chosen: Chosen) -> Served:
    return exchange.choose(chosen.get("model"), version=_version(chosen), alias=chosen.get("alias"))


def _expect(received: Received, kinds: Sequence[str]) -> None:
    kind, parameters = received.media_type()
    if kind not in kinds:
        raise UnsupportedMediaType(f"content-type {kind[:80]!r}: expected {', '.join(k for k in kinds[1:] if k)}")
    if parameters.get("charset", "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("charset: JSON is UTF-8")


def media_type(value: str) -> tuple[str, dict[str, str]]:
    """`text/csv; header=present` as its type and parameters."""
    kind, *rest = value.split(";")
    pairs = (part.partition("=") for part in rest)
    return kind.strip().lower(), {key.strip().lower(): text.strip().strip('"') for key, _, text in pairs}


def _header_length(received: Received) -> int | None:
    text = received.header(oip.HEADER_LENGTH)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text):
        raise InvalidRequest(f"{oip.HEADER_LENGTH}: expected a number of bytes, got {text[:40]!r}")
    return int(text)


def unpack(body: bytes, window: int, most: int) -> bytes:
    """The unpacked body, at most `most` bytes. Raises `PayloadTooLarge` before more is unpacked, `InvalidRequest`."""
    parts, size, rest = [], 0, body
    while True:
        stream = zlib.decompressobj(window)
        try:
            parts.append(stream.decompress(rest, most - size + 1))
        except zlib.error as error:
            raise InvalidRequest(f"the body cannot be unpacked: {error}") from None
        size += len(parts[-1])
        if size > most:
            raise PayloadTooLarge(f"the body unpacks to more than {most} bytes")
        if not stream.eof:
            raise InvalidRequest("the body cannot be unpacked: it is cut short")
        rest = stream.unused_data
        if not rest:
            return b"".join(parts)


def _pack(body: bytes, headers: Sequence[tuple[str, str]], told: dict[str, str]) -> bytes:
    """The body as the caller accepts it; tells so in `told`."""
    accepted = _accepted(",".join(value for key, value in headers if key.lower() == "accept-encoding"))
    if not accepted or len(body) < _WORTH_PACKING:
        return body
    encoding = "gzip" if "gzip" in accepted else "deflate"
    told |= {"content-encoding": encoding, "vary": "accept-encoding"}
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[encoding])
    return stream.compress(body) + stream.flush()


def _accepted(value: str) -> set[str]:
    """Of gzip and deflate those that an Accept-Encoding names with a weight above 0."""
    named = set()
    for part in value.lower().split(","):
        name, _, weight = part.partition(";")
        refused = weight.strip().removeprefix("q=").rstrip("0") in ("", "0.") and weight.strip() != ""
        if name.strip() in ("gzip", "deflate") and not refused:
            named.add(name.strip())
    return named
