"""The surface behind Python's own HTTP server, on loopback: for clients that speak over a socket.

with serve(surface) as address:      # "127.0.0.1:43210"
    tritonclient.http.InferenceServerClient(address)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from triform.http import HttpRequest, HttpSurface


class _Handler(BaseHTTPRequestHandler):
    """One request after another on a connection that is kept."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: an answer leaves in one piece
    timeout = 30
    surface: HttpSurface

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path, _, query = self.path.partition("?")
        request = HttpRequest(self.command, path, list(self.headers.items()), body, query, self.client_address[0])
        answer = self.surface.handle(request)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_QUERY = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serve(surface: HttpSurface) -> Iterator[str]:
    """`host:port` of a server that answers until the block is left."""
    handler = type("Handler", (_Handler,), {"surface": surface})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
