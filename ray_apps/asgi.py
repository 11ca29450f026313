"""`triform.http` as an ASGI application: no framework, of a body no more is kept than its limit.

    scope -> HttpRequest -> HttpSurface.greet -> receive -> HttpSurface.handle_async -> HttpResponse -> send
                                                    |
                            the body is late, or its caller goes away: what waits for the model is cancelled

Ray Serve would take in all that a caller sends, as fast as it comes, and look for his going in two tasks of its own for every
request, which takes a sixth of its time. spared.py tells it to leave both to this application, which looks once in a while
(`LONG`) at those who wait for longer than that. Specification: ASGI 3.0, HTTP connection scope and lifespan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote, unquote

from ray_apps.places import no_place
from triform.errors import BodyTimeout, Overloaded, TriformError
from triform.headers import REQUEST_ID, Headers
from triform.http import HttpRequest, HttpResponse, HttpSurface, request_id_of
from triform.routes import EVERYBODYS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]
Hook = Callable[[], Awaitable[None]]

LATIN: Final = "latin-1"
MOST_RECEIVED: Final = 1 << 30  # bytes of bodies
GONE: Final = 499  # what servers count a caller under who did not wait for his answer: nginx, Ray Serve
LONG: Final = 0.05  # seconds between two looks at who waits for so long


class Room:
    """For so many bytes of bodies, of all requests under way. Belongs to one event loop."""

    def __init__(self, most: int = MOST_RECEIVED) -> None:
        self.most = most
        self.taken = 0

    def takes(self, size: int, *, always: bool) -> bool:
        """Whether there is room for so many more, which are taken then."""
        if self.taken + size > self.most and not always:
            return False
        self.taken += size
        return True

    def leaves(self, size: int) -> None:
        self.taken -= size


class AsgiApp:
    """`timeout`: seconds from a request's arrival to its deadline. `room`: for bodies that come in parts; others are refused.

    `tells_request_id`: whether the server around it adds the request's own id to the answer, as Ray Serve does. `at_end` is
    awaited when the server stops.
    """

    def __init__(
        self,
        surface: HttpSurface,
        *,
        timeout: float,
        room: Room | None = None,
        tells_request_id: bool = False,
        at_end: Hook | None = None,
    ) -> None:
        self.surface = surface
        self.timeout = timeout
        self.room = room or Room()
        self._told_by_server = tells_request_id
        self._at_end = at_end
        self._watch = _Watch(timeout)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:  # a websocket: refused before it is accepted, which the server turns into a 403
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def http(self, scope: Message, receive: Receive, send: Send) -> int:
        """Answers a request; returns the status."""
        headers = Headers.of_asgi(scope["headers"])
        query = scope.get("query_string", b"").decode(LATIN)
        greeted = self.surface.greet(HttpRequest(scope["method"], _path(scope), headers, b"", query, _client(scope)))
        if isinstance(greeted, HttpRequest):
            answered = None
            with _Caller(self._watch, receive) as caller:
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    caller.has_sent = True
                    request = greeted.with_body(message.get("body", b""))
                    answered = await self.surface.handle_async(request, deadline=caller.since + self.timeout)
                else:
                    answered = await self._in_parts(greeted, caller, message, receive)
            response = answered or self._unheard(greeted, caller)
        else:
            response = greeted
        return await self._send(response, headers, scope, send)

    async def full(self, scope: Message, send: Send) -> int:
        """Refuses a request for which its server has no place, nor one to wait for it; returns the status."""
        started, headers = time.perf_counter(), Headers.of_asgi(scope["headers"])
        return await self._send(self._refused(no_place(), headers, started), headers, scope, send)

    async def _send(self, response: HttpResponse, headers: Headers, scope: Message, send: Send) -> int:
        if self._told_by_server and (REQUEST_ID, response.headers[REQUEST_ID]) in headers:
            del response.headers[REQUEST_ID]
        encoded = _encoded(response, scope["method"])
        if not self.wrote(response, encoded, scope, send):
            await send({"type": "http.response.start", "status": response.status, "headers": encoded})
            await send({"type": "http.response.body", "body": response.body})
        return response.status

    def wrote(self, response: HttpResponse, headers: Sequence[Header], scope: Message, send: Send) -> bool:  # noqa: ARG002
        """Whether the answer is written: not here, but by whoever knows the server that `send` belongs to."""
        return False

    async def _in_parts(self, request: HttpRequest, caller: _Caller, first: Message, receive: Receive) -> HttpResponse | None:
        """The answer to a request of which this is the first message; None: the caller has gone.

        Of what is beyond the limit no more is kept than the byte that tells the surface so, of what has no room nothing. It is
        read all the same, up to as much again: who sends all before he reads gets his answer.
        """
        parts, held, size, refused = list[bytes](), 0, 0, False
        limit = 0 if unquote(request.path) in EVERYBODYS else self.surface.limits.request  # a probe has nothing to say
        message = first
        try:
            while message["type"] == "http.request":
                part = message.get("body", b"")
                kept = b"" if refused else part[: max(0, limit + 1 - size)]
                size += len(part)
                if self.room.takes(len(kept), always=size > limit):
                    parts.append(kept)
                    held += len(kept)
                else:
                    refused = True
                    self.room.leaves(held)
                    parts, held = [], 0
                if not message.get("more_body") or size > 2 * limit:
                    if refused:
                        return self._no_room(request, caller)
                    body = b"".join(parts)
                    parts.clear()
                    caller.has_sent = True
                    return await self.surface.handle_async(request.with_body(body), deadline=caller.since + self.timeout)
                message = await receive()
            return None
        finally:
            self.room.leaves(held)

    def _no_room(self, request: HttpRequest, caller: _Caller) -> HttpResponse:
        error = Overloaded(f"bodies of {self.room.most} bytes are under way already: send the request again later")
        response = self._refused(error, request.headers, time.perf_counter() - (time.monotonic() - caller.since))
        response.headers["connection"] = "close"  # what would still come is not read
        return response

    def _unheard(self, request: HttpRequest, caller: _Caller) -> HttpResponse:
        """The answer to a request that did not come whole. Who has gone gets none, but the server counts what he is told."""
        if not caller.is_late:
            return HttpResponse(GONE, {REQUEST_ID: request_id_of(request.headers, None)}, b"")
        error = BodyTimeout(f"the body did not come within {self.timeout:g} s")
        response = self._refused(error, request.headers, time.perf_counter() - self.timeout)
        response.headers["connection"] = "close"  # what would still come is not read
        return response

    def _refused(self, error: TriformError, headers: Sequence[tuple[str, str]], started: float) -> HttpResponse:
        """The answer to a request that has not reached the surface, which is counted all the same."""
        response = self.surface.refuse(error, headers)
        self.surface.service.refused(response.headers[REQUEST_ID], error, started)
        return response

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._at_end is not None:
                    await self._at_end()
                await send({"type": "lifespan.shutdown.complete"})
                return


class _Caller:
    """Who is to send a body (`has_sent`), and waits for his answer `since` a `time.monotonic()`.

    The block that it is entered for is cancelled where the body is late, or he goes away before he is answered; then the block is
    left without an error.
    """

    __slots__ = ("_ended", "_looking", "_receive", "_task", "_watch", "has_sent", "is_late", "since")

    def __init__(self, watch: _Watch, receive: Receive) -> None:
        self._watch = watch
        self._receive = receive
        self._task: asyncio.Task[Any] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._ended = False
        self.has_sent = self.is_late = False
        self.since = time.monotonic()

    def __enter__(self) -> _Caller:
        self._task = asyncio.current_task()
        self._watch.callers[self] = None
        if not self._watch.runs:
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        del self._watch.callers[self]
        if self._looking is not None:
            self._looking.cancel()
        # A cancellation of the server's, too, goes on
        return self._ended and self._task is not None and self._task.uncancel() == 0 and kind is asyncio.CancelledError

    def look(self, seconds: float) -> None:
        """Whether he is late, who has had so many seconds, or has gone: that is looked for by a task of its own from now on."""
        if not self.has_sent:
            if time.monotonic() - self.since >= seconds:
                self.is_late = True
                self._end()
        elif self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._wait())

    def _end(self) -> None:
        if not self._ended and self._task is not None:
            self._ended = True
            self._task.cancel()

    async def _wait(self) -> None:
        with suppress(Exception):  # a server that cannot tell has lost him
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self._end()


class _Watch:
    """Over all callers of an application who wait for long: a timer for each would take longer than the rest of this module.
    Belongs to one event loop.

    `seconds`: that a body may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.callers: dict[_Caller, None] = {}  # in the order in which they came
        self.runs = False

    def start(self) -> None:
        self.runs = True
        asyncio.get_running_loop().call_later(LONG, self._look)

    def _look(self) -> None:
        long_ago = time.monotonic() - LONG
        for caller in self.callers:
            if caller.since > long_ago:
                break
            caller.look(self._seconds)
        self.runs = False
        if self.callers:
            self.start()


def _path(scope: Message) -> str:
    """Percent-encoded, below the route prefix that the application has in Serve."""
    path: str = scope["raw_path"].decode(LATIN) if scope.get("raw_path") is not None else quote(scope["path"])
    root = scope.get("root_path", "")
    return path.removeprefix(root) if root and root != "/" else path


def _client(scope: Message) -> str:
    """The address that the request came from. Behind HAProxy uvicorn puts X-Forwarded-For in its place, and 0 for the port."""
    host, port = scope.get("client") or ("", None)
    return f"forwarded for {host}" if port == 0 else host


def _encoded(response: HttpResponse, method: str) -> list[Header]:
    """The headers. A HEAD is not told how long the body would have been."""
    headers = [(name.encode(LATIN), value.encode(LATIN)) for name, value in response.headers.items()]
    if method != "HEAD":
        headers.append((b"content-length", str(len(response.body)).encode()))
    return headers
