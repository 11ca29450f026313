"""The HTTP surface, the same on every host: a request in, a response out. No web framework, no sockets.

    HttpRequest -> access.py -> routes.py -> body (limits, gzip) -> protocol -> service.py -> protocol -> gzip -> HttpResponse
                                                        any TriformError -> {"error": ..., "code": ...} with its status

A host gives the request as it came and sends the response as it is. Names of headers are compared without case; the path is
percent-decoded here. Each answer carries its request id, and the exact version that made it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec

from triform.access import CHALLENGE, OVERRIDE, Access, Caller
from triform.canary import Way
from triform.content import beginning, by_weight, is_utf8, media_type, pack, unpack
from triform.deadlines import check
from triform.errors import (
    AnswerTooLarge,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    PayloadTooLarge,
    RouteNotFound,
    TriformError,
    Unauthenticated,
    UnsupportedMediaType,
    UnsupportedMethod,
    VersionNotFound,
)
from triform.headers import REQUEST_ID, Headers, Named, request_id, values
from triform.models import Served
from triform.protocols import invocations, oip, tfs
from triform.protocols.bodies import JSON, SMALL, Call, Encoded, effort, write_json
from triform.repository import VERSION
from triform.routes import EVERYBODYS, Chosen, Route, find
from triform.service import LARGE, Exchange, InferenceService

log = logging.getLogger(__name__)
T = TypeVar("T")

MODEL: Final = "x-triform-model"
FORM: Final = "application/x-www-form-urlencoded"  # what `curl -d` says of JSON
BINARY: Final = "application/octet-stream"
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


class HttpRequest(NamedTuple):
    """`path` percent-encoded, without the query; `headers` in the order they came, a repeated one twice.

    `client`: the address that it came from. `caller`: where the host knows him, and not from headers. `greeted`: whether
    `HttpSurface.greet` has let it in, with its caller.
    """

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    query: str = ""
    client: str = ""
    caller: Caller | None = None
    greeted: bool = False

    def let_in(self, caller: Caller) -> HttpRequest:
        """The request with its caller."""
        return HttpRequest(self.method, self.path, self.headers, self.body, self.query, self.client, caller, True)

    def with_body(self, body: bytes) -> HttpRequest:
        return HttpRequest(self.method, self.path, self.headers, body, self.query, self.client, self.caller, self.greeted)


class HttpResponse(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes: of a request's body as it is sent and unpacked, of a response's body."""

    request: int = 16 << 20
    unpacked: int = 64 << 20
    response: int = 64 << 20


class Received(NamedTuple):
    """A request on its way through the surface. `named`: its headers' values, by name; `told`: headers of the answer, whatever it
    will be."""

    http: HttpRequest
    named: Named
    request_id: str
    deadline: float | None
    started: float
    told: dict[str, str]

    def logged(self) -> dict[str, str]:
        """Fields of a log record."""
        return {"request_id": self.request_id}

    def header(self, name: str) -> str | None:
        """The value of a header that may stand once. Raises `InvalidRequest` where it stands twice."""
        given = self.named.get(name)
        if given is None:
            return None
        if len(given) > 1:
            raise InvalidRequest(f"the header {name} is given twice")
        return given[0]

    def listed(self, name: str) -> str:
        """The value of a header that is a list, in one line or several; "" where there is none."""
        return ",".join(self.named.get(name, ()))

    def media_type(self, *expected: str) -> tuple[str, dict[str, str]]:
        """Of the body: the type, "" where it is not said, and its parameters. Raises `UnsupportedMediaType`."""
        given = self.named.get("content-type", ())
        if len(given) == 1 and given[0] in expected:  # to the letter, as nearly always
            return given[0], {}
        said = self.header("content-type") or ""
        kind, parameters = media_type(said)
        if kind and kind not in expected:
            raise UnsupportedMediaType(f"content-type {kind[:80]!r}: expected {' or '.join(k for k in expected if k != FORM)}")
        if not is_utf8(parameters):
            raise UnsupportedMediaType(f"charset {parameters['charset'][:40]!r}: expected UTF-8")
        return kind, parameters


class HttpSurface:
    """What a host calls. Thread-safe. What came of each inference request is in the service's telemetry, and so is each request
    that no path or method takes, or that its caller may not make. Without `access` nobody is asked who he is."""

    def __init__(self, service: InferenceService, limits: Limits | None = None, access: Access | None = None) -> None:
        self.service = service
        self.limits = limits or Limits()
        self.access = access

    def handle(self, http: HttpRequest, *, deadline: float | None = None, request_id: str | None = None) -> HttpResponse:
        """Answers a request; never raises. `deadline`: a `time.monotonic()`; `request_id`: the host's, if the caller has none.

        For a service that never waits (`service.run_here`): the model runs in this thread.
        """
        return at_once(self.handle_async(http, deadline=deadline, request_id=request_id))

    async def handle_async(
        self, http: HttpRequest, *, deadline: float | None = None, request_id: str | None = None
    ) -> HttpResponse:
        """The same on an event loop, for a service whose models run elsewhere. What it raises is its cancellation."""
        headers = http.headers
        if not isinstance(headers, Headers):
            headers = Headers(headers)
            http = http._replace(headers=headers)
        received = Received(http, headers.named, request_id_of(headers, request_id), deadline, time.perf_counter(), {})
        try:
            status, encoded = await self._answer(received)
        except TriformError as error:
            if isinstance(error, BEFORE):
                self.service.refused(received.request_id, error, received.started)
            if error.http_status >= 500:
                log.warning("request %s: %s", received.request_id, error.code, exc_info=error, extra=received.logged())
            status, encoded = _failure(error)
        except Exception:
            log.exception("request %s failed", received.request_id, extra=received.logged())
            status, encoded = _failure(TriformError("the server failed; its log knows why"))
        body, packed = encoded.body, dict[str, str]()
        if "accept-encoding" in received.named:
            body, packed = await self._packed(body, received.listed("accept-encoding"), received.deadline)
        answer = {"content-type": encoded.content_type, **encoded.headers, **received.told, **packed}
        answer[REQUEST_ID] = received.request_id
        return HttpResponse(status, answer, b"" if http.method == "HEAD" else body)

    async def _packed(self, body: bytes, accepted: str, deadline: float | None) -> tuple[bytes, dict[str, str]]:
        """The body as the caller would like it; as it is, where there is no time for that."""
        try:
            return await self.service.do(partial(pack, body, accepted), len(body), deadline, urgent=True)
        except (Overloaded, DeadlineExceeded):
            return body, {}

    def greet(self, http: HttpRequest) -> HttpRequest | HttpResponse:
        """For a host that has not read the body yet: the request with its caller, or a refusal that needs no body."""
        if self.access is None or unquote(http.path) in EVERYBODYS:
            return http
        started = time.perf_counter()
        try:
            return self.access.authenticate_head(http)
        except TriformError as error:
            response = self.refuse(error, http.headers)
            self.service.refused(response.headers[REQUEST_ID], error, started)
            return response

    def refuse(self, error: TriformError, headers: Sequence[tuple[str, str]] = (), request_id: str | None = None) -> HttpResponse:
        """The answer to a request that its host found at fault; `headers` are the request's."""
        status, encoded = _failure(error)
        told = {"content-type": encoded.content_type, **encoded.headers, REQUEST_ID: request_id_of(headers, request_id)}
        return HttpResponse(status, told, encoded.body)

    async def admit(self, http: HttpRequest) -> HttpRequest:
        """The request with its caller, who may do what it asks: for a host that acts on it before `handle` does.

        Raises as `Access.authenticate` and `authorize`, `RouteNotFound`, `MethodNotAllowed`.
        """
        if self.access is not None:
            http = await self.access.authenticate(http)
            route, chosen = find(http.method, unquote(http.path))
            await self.access.authorize(http, route.operation, route.role, self._model(route, chosen))
        return http

    def _answer(self, received: Received) -> Awaitable[Answer]:
        """What is awaited for the answer: for the usual request no more than the operation itself."""
        http, access, path = received.http, self.access, unquote(received.http.path)
        if access is None or path in EVERYBODYS:
            return self._operate(received, *find(http.method, path), http)
        if http.greeted:
            route, chosen = find(http.method, path)
            if access.infers(http, route.role, self._model(route, chosen)):
                return self._operate(received, route, chosen, http)
        return self._attended(received, path, access)

    async def _attended(self, received: Received, path: str, access: Access) -> Answer:
        http = await access.authenticate(received.http)
        route, chosen = find(http.method, path)
        model = self._model(route, chosen)
        return await access.attend(http, route.operation, route.role, model, partial(self._operate, received, route, chosen))

    def _operate(self, received: Received, route: Route, chosen: Chosen, http: HttpRequest) -> Awaitable[Answer]:
        operation: Callable[[Received, Chosen], Answer | Awaitable[Answer]] = getattr(self, route.operation)
        answer = operation(received if http is received.http else received._replace(http=http), chosen)
        return _ready(answer) if isinstance(answer, tuple) else answer

    def _model(self, route: Route, chosen: Chosen) -> str | None:
        return chosen.get("model") or (self.service.models.default_name() if route.operation == "invocations" else None)

    def v2_infer(self, received: Received, chosen: Chosen) -> Awaitable[Answer]:
        def decode(body: bytes, served: Served) -> Call:
            received.media_type(JSON, FORM, BINARY)
            return oip.decode(body, _header_length(received), served)

        return self._infer(received, chosen, decode, tensors=True)

    def v1_predict(self, received: Received, chosen: Chosen) -> Awaitable[Answer]:
        def decode(body: bytes, served: Served) -> Call:
            received.media_type(JSON, FORM)
            return tfs.decode(body, served)

        return self._infer(received, chosen, decode)

    def invocations(self, received: Received, chosen: Chosen) -> Awaitable[Answer]:
        def decode(body: bytes, served: Served) -> Call:
            kind = received.media_type(*invocations.MEDIA_TYPES)
            return invocations.decode(body, kind, by_weight(received.listed("accept")), served)

        return self._infer(received, chosen, decode)

    async def _infer(
        self, received: Received, chosen: Chosen, decode: Callable[[bytes, Served], Call], *, tensors: bool = False
    ) -> Answer:
        """`tensors`: whether they may follow the JSON in binary."""
        caller = received.http.caller.id if received.http.caller else ""
        with self.service.exchange(
            received.request_id, deadline=received.deadline, started=received.started, caller=caller
        ) as exchange:
            version, alias = _version(received, chosen), chosen.get("alias")
            served = exchange.choose(chosen.get("model"), version=version, alias=alias)
            received.told[MODEL] = served.manifest.ref
            size = len(received.http.body)
            if size < LARGE and (size > SMALL or "content-encoding" in received.named):
                size = _as_read(received, _header_length(received) if tensors else None)
            splits, split = exchange.models.splits.live, None
            if splits and version is None and alias is None:
                split = splits.get(served.manifest.name)
            if split is not None:
                if (given := split.gives(exchange, received.named)) is None:
                    return 200, await self._shared(split.otherwise, received, exchange, decode, size)
                served = given
                received.told[MODEL] = served.manifest.ref
            try:
                return 200, await self.answer(exchange, lambda: decode(self._body(received), served), size)
            except BaseException as error:
                if split is None:
                    raise
                instead = await self._shared(partial(split.instead, error), received, exchange, decode, size)
                if instead is None:
                    raise
                return 200, instead

    async def _shared(
        self,
        answer: Callable[..., Awaitable[T]],
        received: Received,
        exchange: Exchange,
        decode: Callable[[bytes, Served], Call],
        size: int,
    ) -> T:
        """What a split answers; the headers name who has."""
        try:
            return await answer(self.answer, exchange, lambda served: decode(self._body(received), served), size)
        finally:
            received.told[MODEL] = exchange.refs or received.told[MODEL]

    async def answer(self, exchange: Way, decode: Callable[[], Call], size: int = 0) -> Encoded:
        """The way of a request whose version is chosen, whatever its protocol. No step is begun after the deadline.

        `size`: the bytes that `decode` has to read. Raises what each step does, `DeadlineExceeded`, `Overloaded` and
        `AnswerTooLarge`.
        """
        began = exchange.begin("decode")
        try:
            if self.service.is_small(size):
                call, inputs = exchange.read(decode)
            else:
                call, inputs = await self.service.do(partial(exchange.read, decode), size, exchange.deadline)
        finally:
            exchange.end("decode", began)
        outputs = await exchange.infer_checked(inputs)
        began = exchange.begin("encode")
        try:
            size = sum([array.nbytes for array in outputs.values()])
            encode = call.say if call.columns is None else call.encode
            if self.service.is_small(size):
                encoded = encode(outputs)
            else:
                encoded = await self.service.do(partial(encode, outputs), size, exchange.deadline, urgent=True)
        finally:
            exchange.end("encode", began)
        check(exchange.deadline, "the answer was sent")
        if len(encoded.body) > self.limits.response:
            raise AnswerTooLarge(
                f"the answer has {len(encoded.body)} bytes, {self.limits.response} are allowed: send fewer rows at a time, "
                "or ask for fewer outputs"
            )
        return encoded

    def _body(self, received: Received) -> bytes:
        """The body, unpacked. Raises `PayloadTooLarge`, `UnsupportedMediaType` or `InvalidRequest`."""
        body = received.http.body
        if len(body) > self.limits.request:
            raise PayloadTooLarge(f"the body has more than the {self.limits.request} bytes that are allowed")
        if "content-encoding" not in received.named:
            return body
        return unpack(body, (received.header("content-encoding") or "").lower(), self.limits.unpacked)

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
        ready = self.service.models.is_ready(chosen["model"], version_of(chosen.get("version")))
        return _json({"name": chosen["model"], "ready": ready}, 200 if ready else 503)

    def v1_status(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        version, alias = version_of(chosen.get("version")), chosen.get("alias")
        return _json(tfs.status(self.service.models.states(chosen["model"], version=version, alias=alias)))

    def v1_metadata(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        return _json(tfs.metadata(self._served(chosen)))

    def v1_classify(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        raise UnsupportedMethod("classify takes tf.Example, which an ONNX model does not: use :predict")

    def v1_regress(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        raise UnsupportedMethod("regress takes tf.Example, which an ONNX model does not: use :predict")

    def openapi(self, received: Received, chosen: Chosen) -> Answer:  # noqa: ARG002
        from triform.openapi import written

        return 200, Encoded(written())

    def _served(self, chosen: Chosen) -> Served:
        return self.service.models.get(chosen["model"], version=version_of(chosen.get("version")), alias=chosen.get("alias"))


Answer = tuple[int, Encoded]
# What ends a request before there is an exchange that records it.
BEFORE: Final = (Unauthenticated, Forbidden, RouteNotFound, MethodNotAllowed, UnsupportedMethod)


async def _ready(answer: Answer) -> Answer:
    return answer


def at_once(answer: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never waits."""
    try:
        answer.send(None)
    except StopIteration as finished:
        response: T = finished.value
        return response
    answer.close()
    raise RuntimeError("this service's models run elsewhere: use handle_async")


def _json(value: Any, status: int = 200) -> Answer:
    return status, Encoded(write_json(value))


def _failure(error: TriformError) -> Answer:
    """The answer that tells of an error: its message and code, nothing of where it was raised."""
    headers = {"allow": error.allowed} if isinstance(error, MethodNotAllowed) and error.allowed else {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = CHALLENGE
    if error.retryable and (error.http_status >= 500 or error.http_status == Overloaded.http_status):
        headers["retry-after"] = "1"
    return error.http_status, Encoded(write_json({"error": told(error), "code": error.code}), headers=headers)


def told(error: TriformError) -> str:
    """The message as UTF-8 can hold it."""
    return str(error).encode(errors="backslashreplace").decode()


def request_id_of(headers: Sequence[tuple[str, str]], given: str | None) -> str:
    """The caller's, if it can stand in a log and a header as it is; else the host's, if that can; else a new one."""
    told = values(headers, REQUEST_ID)
    return request_id(told if given is None else [*told, given])


def version_of(text: str | None) -> int | None:
    """The version that a request names. Raises `VersionNotFound` for what is none."""
    if text is None:
        return None
    if not VERSION.fullmatch(text):
        raise VersionNotFound(f"{text[:40]!r} is no version: versions are positive integers")
    return int(text)


def _version(received: Received, chosen: Chosen) -> int | None:
    if OVERRIDE not in received.named and "version" not in chosen:
        return None
    override = received.header(OVERRIDE)
    if override is not None and ("version" in chosen or "alias" in chosen):
        raise InvalidRequest(f"the path says which version is to answer, and {OVERRIDE} does, too: send one of them")
    return version_of(override if override is not None else chosen.get("version"))


def _as_read(received: Received, before_tensors: int | None) -> int:
    """The size of the body, or `LARGE` where it takes as long to read: unpacked, and with what its JSON has in it."""
    body = text = received.http.body
    if "content-encoding" in received.named:
        text = beginning(body, (received.header("content-encoding") or "").lower(), LARGE)
    said = text if before_tensors is None else text[:before_tensors]
    return max(len(body), min(LARGE, max(len(text), effort(said))))


def _header_length(received: Received) -> int | None:
    if oip.HEADER_LENGTH not in received.named:
        return None
    text = received.header(oip.HEADER_LENGTH) or ""
    if not _DIGITS.fullmatch(text):
        raise InvalidRequest(f"{oip.HEADER_LENGTH}: expected a number of bytes, got {text[:40]!r}")
    return int(text)
