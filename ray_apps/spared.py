"""What Serve is spared for every HTTP request: to look in tasks of its own whether the caller is there, and to make an id.

An id that may not stand in a log or a header is replaced here, as Serve adds what it finds to the answer.

    uvicorn -> Spared -> straight.py -> asgi.py, which looks for the caller itself
                  two headers more -> Serve's replica, for what goes its way -> asgi.py

Serve calls `middlewares` in each process that takes HTTP requests, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says
so (environment.py), for all applications of the cluster. Headers: seen in Ray 2.60 (`parse_disconnect_disabled_header`,
`RequestIdMiddleware`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.middleware import Middleware

from ray_apps.straight import Straight
from triform.headers import REQUEST_ID, request_id

NOT_LOOKED_FOR: Final = (b"x-request-disconnect-disabled", b"?1")
ID: Final = REQUEST_ID.encode()


class Spared:
    """An ASGI middleware."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._app = app
        self._straight: Straight | None = None
        self._looked = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._looked:  # the first request comes once all is made
            self._straight, self._looked = Straight.of(self._app), True
        if self._straight is not None and scope["type"] == "http" and self._straight.takes(scope):
            await self._straight(scope, receive, send)
            return
        if scope["type"] in ("http", "websocket"):
            given = [value.decode("latin-1").strip(" \t") for name, value in scope["headers"] if name == ID]
            headers = [header for header in scope["headers"] if header[0] != ID] if given else scope["headers"]
            scope["headers"] = [*headers, NOT_LOOKED_FOR, (ID, request_id(given).encode())]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve is to put before its applications."""
    return [Middleware(Spared)]
