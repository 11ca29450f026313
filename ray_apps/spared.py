"""What Serve is spared for every HTTP request: to look in tasks of its own whether the caller is there, and to make an id.

    uvicorn -> Spared: two headers more -> Serve's replica -> asgi.py, which looks for the caller itself

Serve calls `middlewares` in each process that takes HTTP requests, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says
so (environment.py), for all applications of the cluster. Headers: seen in Ray 2.60 (`parse_disconnect_disabled_header`,
`RequestIdMiddleware`).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.middleware import Middleware

NOT_LOOKED_FOR: Final = (b"x-request-disconnect-disabled", b"?1")
REQUEST_ID: Final = b"x-request-id"


class Spared:
    """An ASGI middleware."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [*scope["headers"], NOT_LOOKED_FOR]
            if REQUEST_ID not in dict(headers):
                headers.append((REQUEST_ID, os.urandom(16).hex().encode()))
            scope["headers"] = headers
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve is to put before its applications."""
    return [Middleware(Spared)]
