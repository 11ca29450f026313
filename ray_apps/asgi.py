"""`triform.http` as an ASGI application: no framework, of a body no more is kept than its limit.

    scope -> HttpRequest -> HttpSurface.greet -> receive -> HttpSurface.handle_async -> HttpResponse -> send
                                                    |
                            the body is late, or its caller goes away: what waits for the model is cancelled

Ray Serve would take in all that a caller sends, as fast as it comes, and look for his going in two tasks of its own for every
request, which takes a sixth of its time. spared.py tells it to leave both to this application, which looks once a request takes
longer (`LONG`). Specification: ASGI 3.0, HTTP connection scope and lifespan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

from triform.errors import BodyTimeout
from triform.headers import REQUEST_ID, Headers
from triform.http import HttpRequest, HttpResponse, HttpSurface, request_id_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Hook = Callable[[], Awaitable[None]]

LATIN: Final = "latin-1"
GONE: Final = 499  # what servers count a caller under who did not wait for his answer: nginx, Ray Serve
LONG: Final = 0.05  # seconds from a request's body to the first look whether its caller is still there


class AsgiApp:
    """`timeout`: seconds from a request's arrival to its deadline.

    `tells_request_id`: whether the server around it adds the request's own id to the answer, as Ray Serve does. `at_end` is
    awaited when the server stops.
    """

    def __init__(
        self, surface: HttpSurface, *, timeout: float, tells_request_id: bool = False, at_end: Hook | None = None
    ) -> None:
        self.surface = surface
        self.timeout = timeout
        self._told_by_server = tells_request_id
        self._at_end = at_end

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:  # a websocket: refused before it is accepted, which the server turns into a 403
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        deadline = time.monotonic() + self.timeout
        headers = Headers([(name.decode(LATIN), value.decode(LATIN)) for name, value in scope["headers"]])
        query = scope.get("query_string", b"").decode(LATIN)
        response = await self.surface.greet(HttpRequest(scope["method"], _path(scope), headers, b"", query, _client(scope)))
        if isinstance(response, HttpRequest):
            response = await self._handle(response, receive, deadline)
        if self._told_by_server and (REQUEST_ID, response.headers[REQUEST_ID]) in headers:
            del response.headers[REQUEST_ID]
        await _answer(response, send, length=scope["method"] != "HEAD")

    async def _handle(self, request: HttpRequest, receive: Receive, deadline: float) -> HttpResponse:
        """The answer to a request whose body is still to come. Who has gone gets none, but the server counts what he is told."""
        started = time.perf_counter()
        with _Patience(receive) as patience:
            patience.until_late(self.timeout)
            body = await _read(receive, self.surface.limits.request)
            if body is not None:
                patience.until_gone()
                return await self.surface.handle_async(request._replace(body=body), deadline=deadline)
        if not patience.is_late:
            return HttpResponse(GONE, {REQUEST_ID: request_id_of(request.headers, None)}, b"")
        error = BodyTimeout(f"the body did not come within {self.timeout:g} s")
        response = self.surface.refuse(error, request.headers)
        self.surface.service.refused(response.headers[REQUEST_ID], error, started)
        response.headers["connection"] = "close"  # what would still come is not read
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


class _Patience:
    """Cancels the task that it is made in where a body is late, or its caller goes away before he is answered; then the block is
    left without an error. A caller is looked for by a task of its own, which only requests have that take long.

    `asyncio.timeout` twice would do the first half, and take longer than all the rest of this module.
    """

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"  # noqa: S101
        self.is_late = False
        self._ended = False
        self._receive = receive
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def __enter__(self) -> _Patience:
        return self

    def until_late(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._late)

    def until_gone(self) -> None:
        """The body has come."""
        self._stop()
        self._timer = self._loop.call_later(LONG, self._look)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._stop()
        # A cancellation of the server's, too, goes on
        return self._ended and self._task.uncancel() == 0 and kind is asyncio.CancelledError

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def _late(self) -> None:
        self.is_late = True
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._task.cancel()

    def _look(self) -> None:
        self._looking = self._loop.create_task(self._wait())

    async def _wait(self) -> None:
        with suppress(Exception):  # a server that cannot tell has lost him
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self._end()


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body; of one beyond the limit a byte more than that, which the surface refuses. None: the caller has gone.

    What is too much is thrown away, up to as much again: who sends all before he reads gets his answer.
    """
    message = await receive()
    if not message.get("more_body") and message["type"] == "http.request":
        return bytes(message.get("body", b""))[: limit + 1]
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part = message.get("body", b"")
        parts.append(part[: max(0, limit + 1 - size)])
        size += len(part)
        if not message.get("more_body") or size > 2 * limit:
            return b"".join(parts)
        message = await receive()
    return None


def _path(scope: Message) -> str:
    """Percent-encoded, below the route prefix that the application has in Serve."""
    path: str = scope["raw_path"].decode(LATIN) if scope.get("raw_path") is not None else quote(scope["path"])
    root = scope.get("root_path", "")
    return path.removeprefix(root) if root and root != "/" else path


def _client(scope: Message) -> str:
    """The address that the request came from. Behind HAProxy uvicorn puts X-Forwarded-For in its place, and 0 for the port."""
    host, port = scope.get("client") or ("", None)
    return f"forwarded for {host}" if port == 0 else host


async def _answer(response: HttpResponse, send: Send, *, length: bool) -> None:
    headers = [(name.encode(LATIN), value.encode(LATIN)) for name, value in response.headers.items()]
    if length:
        headers.append((b"content-length", str(len(response.body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
