"""Answers written to a connection of uvicorn at once, in the place of its two messages with their checks, which take as long as
a small model.

    AsgiApp.http -> Writing.wrote -> status line, headers and body -> the transport        -> uvicorn: the next request
                        |
                        uvicorn is to close the connection, the caller reads slowly, a HEAD, another server: by its messages

What uvicorn checks is that no header breaks out of its line: ours are made by `triform.http`, and of a caller's own words they
have none but an id that is clean (triform/headers.py). Fields: seen in uvicorn 0.54 (`RequestResponseCycle.send` in
uvicorn/protocols/http/httptools_impl.py); another version, or another parser of its, gets messages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from ray_apps.asgi import AsgiApp, Header, Message
from triform.http import HttpResponse

log = logging.getLogger(__name__)
KNOWN: Final = "0.54."  # how uvicorn's versions begin whose fields these are
_SMALL: Final = 64 << 10  # bytes of a body that is copied beside its head


def direct(app: AsgiApp) -> AsgiApp:
    """The application as it tells the request's id itself, and answers at once where uvicorn is one that is known."""
    if not uvicorn.__version__.startswith(KNOWN):
        log.warning("uvicorn %s is not known here (%s is): it is given answers by messages", uvicorn.__version__, KNOWN)
        return AsgiApp(app.surface, timeout=app.timeout, room=app.room)
    return Writing(app.surface, timeout=app.timeout, room=app.room)


class Writing(AsgiApp):
    """Of a server that is uvicorn."""

    def wrote(self, response: HttpResponse, headers: Sequence[Header], scope: Message, send: Any) -> bool:
        """Whether uvicorn had nothing to do itself."""
        cycle = getattr(send, "__self__", None)
        if (
            type(cycle) is not RequestResponseCycle
            or not cycle.keep_alive
            or cycle.response_started
            or cycle.disconnected
            or cycle.flow.write_paused
            or (cycle.access_log and cycle.access_logger.isEnabledFor(logging.INFO))
            or scope["method"] == "HEAD"
            or "connection" in response.headers
        ):
            return False
        lines = [STATUS_LINE[response.status]]
        for name, value in cycle.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines += (b"\r\n", response.body if len(response.body) <= _SMALL else b"")
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(b"".join(lines))
        if len(response.body) > _SMALL:
            cycle.transport.write(response.body)
        cycle.message_event.set()
        cycle.on_response()
        return True
