"""A server that answers as it is told to, over HTTP and gRPC, and counts what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

Answer = Callable[[int], tuple[int, bytes] | None]  # of the request with that number: status and body, or hang up


class Stub(ThreadingHTTPServer):
    """`heads`: the headers of each request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.counting = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Stub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.counting:
            self.server.heads.append({name.lower(): value for name, value in self.headers.items()})
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            number = len(self.server.heads) - 1
        answer = self.server.answer(number)
        if answer is None:
            self.close_connection = True
            return
        self.send_response_only(answer[0])
        self.send_header("content-length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def stub(answer: Answer) -> Iterator[Stub]:
    server = Stub(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def predicted(value: float, seconds: float = 0.0) -> tuple[int, bytes]:
    """A row's answer, after so many seconds."""
    time.sleep(seconds)
    return 200, json.dumps({"predictions": [{"p_late": value}]}).encode()


@contextmanager
def grpc_stub(
    path: str, answer: Callable[[int, grpc.ServicerContext], bytes]
) -> Iterator[tuple[str, list[dict[str, str | bytes]]]]:
    """name:port of a gRPC server with one method, and the metadata of each request to it."""
    asked: list[dict[str, str | bytes]] = []
    counting = threading.Lock()

    def handle(_: bytes, context: grpc.ServicerContext) -> bytes:
        with counting:
            asked.append({one.key: one.value for one in context.invocation_metadata()})
            number = len(asked) - 1
        return answer(number, context)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(handle) if details.method == path else None

    server = grpc.server(ThreadPoolExecutor(8), handlers=(Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", asked
    finally:
        server.stop(None).wait(10)
