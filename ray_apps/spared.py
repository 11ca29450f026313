"""What Serve is spared for every HTTP request: to look in tasks of its own whether the caller is there, and to make an id.

An id that may not stand in a log or a header is replaced here, as Serve adds what it finds to the answer.

    uvicorn -> Spared: two headers more -> Serve's replica -> asgi.py, which looks for the caller itself

Serve calls `middlewares` in each process that takes HTTP requests, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says
so (environment.py), for all applications of the cluster. Headers: seen in Ray 2.60 (`parse_disconnect_disabled_header`,
`RequestIdMiddleware`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.middleware import Middleware

from triform.headers import REQUEST_ID, request_id

NOT_LOOKED_FOR: Final = (b"x-request-disconnect-disabled", b"?1")
ID: Final = REQUEST_ID.encode()


class Spared:
    """An ASGI middleware."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            given = [value.decode("latin-1").strip(" \t") for name, value in scope["headers"] if name == ID]
            headers = [header for header in scope["headers"] if header[0] != ID] if given else scope["headers"]
            scope["headers"] = [*headers, NOT_LOOKED_FOR, (ID, request_id(given).encode())]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve is to put before its applications."""
    return [Middleware(Spared)]
