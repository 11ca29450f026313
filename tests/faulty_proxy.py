"""An HTTP proxy on loopback that fails as it is told: what stands between a client and S3 on a bad day."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "403", "reset", "cut", "stall", "flip", "late"]
STALL_SECONDS = 3.0


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `upstream`; each request whose "METHOD /path" holds `where` takes the next of `faults`, if there is one.

    After 503, 403 and reset nothing was done upstream; after cut and stall it was, and the answer is lost, or half of it.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.where = self.method = ""
        self.stall_seconds = STALL_SECONDS
        self.faults: deque[Fault] = deque()
        self.taken: list[Fault] = []
        self.seen: list[str] = []  # method and path of each request
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, *faults: Fault, where: str = "", method: str = "") -> None:
        """The next requests of that method (any) whose path holds `where` take the faults, one each."""
        self.faults, self.where, self.method, self.taken = deque(faults), where, method, []

    @property
    def requests(self) -> int:
        return len(self.seen)

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append(f"{method} {path}")
            if self.where not in self.seen[-1] or not method.startswith(self.method) or not self.faults:
                return None
            self.taken.append(self.faults.popleft())
            return self.taken[-1]


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for its head to be acknowledged
    server: FaultyProxy

    def _forward(self) -> None:
        body = self._body()
        fault = self.server.next_fault(self.command, self.path)
        if fault == "403":
            denied = b"<Error><Code>AccessDenied</Code><Message>test-secret may not</Message></Error>"
            self._answer(403, {"Content-Length": str(len(denied)), "Content-Type": "application/xml"}, denied)
            return
        if fault == "503":
            self._answer(503, {"Content-Length": "0"}, b"")
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "late":
            time.sleep(0.05)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        upstream.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        )
        answer = upstream.getresponse()
        content = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date", "server")}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        upstream.close()
        if fault == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
            headers = {k: v for k, v in headers.items() if "checksum" not in k.lower()}
        if fault in ("cut", "stall") and len(content) < 2:  # there is nothing to cut: the whole answer is lost
            time.sleep(self.server.stall_seconds if fault == "stall" else 0)
            self._reset()
            return
        self._answer(answer.status, headers, content, fault)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: dict[str, str], content: bytes, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(self.server.stall_seconds if fault == "stall" else 0)
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Tests have their own output."""
