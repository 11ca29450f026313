"""`triform.http` as an ASGI application: no framework, of a body no more is kept than its limit.

    scope -> HttpRequest -> HttpSurface.greet -> receive -> HttpSurface.handle_async -> HttpResponse -> send

That holds for what is here: Ray Serve itself takes in all that a caller sends, as fast as it comes, before it is asked for it
(`ASGIDIReceiveProxy`), until the request is answered.

A caller who goes away is the server's to notice: it cancels the call, and with it what waits for the model. Specification: ASGI
3.0, HTTP connection scope and lifespan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import quote

from triform.errors import BodyTimeout
from triform.headers import Headers
from triform.http import REQUEST_ID, HttpRequest, HttpResponse, HttpSurface

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Hook = Callable[[], Awaitable[None]]

LATIN: Final = "latin-1"


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
        headers = Headers((name.decode(LATIN), value.decode(LATIN)) for name, value in scope["headers"])
        query = scope.get("query_string", b"").decode(LATIN)
        response = await self.surface.greet(HttpRequest(scope["method"], _path(scope), headers, b"", query, _client(scope)))
        if isinstance(response, HttpRequest):
            answered = await self._handle(response, receive, deadline)
            if answered is None:
                return
            response = answered
        if self._told_by_server and (REQUEST_ID, response.headers[REQUEST_ID]) in headers:
            del response.headers[REQUEST_ID]
        await _answer(response, send, length=scope["method"] != "HEAD")

    async def _handle(self, request: HttpRequest, receive: Receive, deadline: float) -> HttpResponse | None:
        """The answer to a request whose body is still to come; None: the caller has gone."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                body = await _read(receive, self.surface.limits.request)
        except TimeoutError:
            error = BodyTimeout(f"the body did not come within {self.timeout:g} s")
            response = self.surface.refuse(error, request.headers)
            self.surface.service.refused(response.headers[REQUEST_ID], error, started)
            response.headers["connection"] = "close"  # what would still come is not read
            return response
        return None if body is None else await self.surface.handle_async(request._replace(body=body), deadline=deadline)

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
