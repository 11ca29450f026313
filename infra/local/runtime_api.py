"""The Lambda Runtime API for one environment, on loopback: what `awslambdaric` asks for work and tells its answers.

    Environment.invoke -> give -> GET  .../invocation/next            (the first one says: initialised)
    outcome            <-         POST .../invocation/{id}/response | error, .../init/error

Source: AWS, "Using the Lambda runtime API". Answers are buffered and Nagle's algorithm is off: with it, a small answer waits for
the other side's delayed acknowledgement, and each call seems to take 40 ms.
"""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple

VERSION: Final = "/2018-06-01/runtime"
PAYLOAD_BYTES: Final = 6 << 20
MOST_BYTES: Final = 64 << 20  # what is read of an answer at all
TOO_LARGE: Final = "Function.ResponseSizeTooLarge"


class Work(NamedTuple):
    """One invocation as the runtime is given it. `deadline_ms`: Unix time."""

    request_id: str
    payload: bytes
    deadline_ms: int
    arn: str
    trace_id: str


class Outcome(NamedTuple):
    """What came of it: the function's answer, or (`error` is a type such as Runtime.ExitError) what is told of the error."""

    payload: bytes
    error: str | None = None


class RuntimeApi:
    """The endpoint of one environment. `address`: host:port."""

    def __init__(self) -> None:
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.started = threading.Event()  # initialised, or never will be
        self.init_error: Outcome | None = None
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.api = self
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def give(self, work: Work) -> None:
        self._work.put(work)

    def next(self) -> Work | None:
        """The next invocation, waited for; None when the environment ends."""
        self.started.set()
        return self._work.get()

    def fail_init(self, outcome: Outcome) -> None:
        self.init_error = self.init_error or outcome
        self.started.set()

    def close(self) -> None:
        self._work.put(None)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    api: RuntimeApi

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that was killed breaks its connection: that is its outcome's business, not the terminal's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def do_GET(self) -> None:
        if self.path == f"{VERSION}/restore/next":  # of a snapshot: here it is taken and restored at once
            self._answer(200, b"")
            return
        if self.path != f"{VERSION}/invocation/next":
            self._answer(404, b"{}")
            return
        work = self.server.api.next()
        if work is None:
            self.close_connection = True
            return
        self._answer(
            200,
            work.payload,
            {
                "Content-Type": "application/json",
                "Lambda-Runtime-Aws-Request-Id": work.request_id,
                "Lambda-Runtime-Deadline-Ms": str(work.deadline_ms),
                "Lambda-Runtime-Invoked-Function-Arn": work.arn,
                "Lambda-Runtime-Trace-Id": work.trace_id,
            },
        )

    def do_POST(self) -> None:
        api, length = self.server.api, int(self.headers.get("Content-Length", 0))
        kind = self.headers.get("Lambda-Runtime-Function-Error-Type", "Unhandled")
        if length > PAYLOAD_BYTES and self.path.endswith("/response"):
            self._drain(length)
            message = f"Response payload size exceeded maximum allowed payload size ({PAYLOAD_BYTES} bytes)."
            api.outcomes.put(Outcome(json.dumps({"errorMessage": message, "errorType": TOO_LARGE}).encode(), TOO_LARGE))
            self._answer(413, b'{"status": "error"}')
            return
        payload = self.rfile.read(length)
        if self.path == f"{VERSION}/init/error":
            api.fail_init(Outcome(payload, kind))
        elif self.path.endswith("/error"):
            api.outcomes.put(Outcome(payload, kind))
        elif self.path.endswith("/response"):
            api.outcomes.put(Outcome(payload))
        self._answer(202, b'{"status": "OK"}')

    def _drain(self, length: int) -> None:
        while length > 0 and (chunk := self.rfile.read(min(length, 1 << 20))):
            length -= len(chunk)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: reports say it."""
