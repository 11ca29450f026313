"""The surface as a WSGI application (PEP 3333): for tools that call one in their own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from triform.http import HttpRequest, HttpSurface


def application(surface: HttpSurface) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        headers = [(k[5:].replace("_", "-"), v) for k, v in environ.items() if k.startswith("HTTP_")]
        headers += [(k.replace("_", "-"), environ[k]) for k in ("CONTENT_TYPE",) if environ.get(k)]
        path = (environ.get("REQUEST_URI") or environ["PATH_INFO"]).partition("?")[0]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        got = surface.handle(HttpRequest(environ["REQUEST_METHOD"], path, headers, body))
        start_response(f"{got.status} {HTTPStatus(got.status).phrase}", list(got.headers.items()))
        return [got.body]

    return answer
