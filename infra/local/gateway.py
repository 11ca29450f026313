"""A local API Gateway before real Lambda processes: `python -m infra.local.gateway`.

    HTTP -> events.py -> event -> environments.py -> awslambdaric -> handlers.predict.handler -> answer -> events.py -> HTTP

Limits, throttling, deadlines and cold starts are as in the cloud as far as a handler can tell; see docs/lambda.md. As a context
manager (`local_gateway`) it serves tests, benchmarks and the demo. `POST /2015-03-31/functions/NAME/invocations` is Lambda's own
API: `boto3.client("lambda", endpoint_url=gateway.url)` invokes the function directly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from infra.local.environments import THROTTLED, Environments, FunctionConfig, Report
from infra.local.events import EVENTS, FAILED, BadAnswer, Request, Response, to_http
from infra.local.framing import Incoming, Refused, read_body
from infra.local.runtime_api import PAYLOAD_BYTES, Outcome

HTTP_BYTES: Final[Mapping[str, int]] = {
    "http-v2": 10 << 20,
    "rest": 10 << 20,
    "alb": 1 << 20,
    "alb-multi": 1 << 20,
    "url": 6 << 20,
}
ANSWER_BYTES: Final[Mapping[str, int]] = {"alb": 1 << 20, "alb-multi": 1 << 20}
BODY_SECONDS: Final = 30.0  # that a body may take to arrive
KEPT: Final = 100_000  # of reports and lines, each
INVOKE: Final = re.compile(r"/2015-03-31/functions/[^/]+/invocations")
HOP_BY_HOP: Final = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})


class Gateway:
    """Use `local_gateway`. `reports` has one of every invocation, `lines` what the function's processes wrote."""

    def __init__(self, kind: str, config: FunctionConfig, port: int = 0, *, echo: Callable[[str], None] | None = None) -> None:
        self.kind = kind
        self.reports: deque[Report] = deque(maxlen=KEPT)
        self.lines: deque[str] = deque(maxlen=KEPT)
        self._echo = echo
        self.environments = Environments(config, report=self._told, line=self._line)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.gateway = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _told(self, report: Report) -> None:
        self.reports.append(report)
        if self._echo is not None:
            self._echo(str(report))

    def _line(self, line: str) -> None:
        self.lines.append(line)
        if self._echo is not None:
            self._echo(line)

    def invoke(self, event: Any) -> Outcome:
        """Invokes the function directly with an event."""
        return self.environments.invoke(json.dumps(event).encode())

    def answer(self, request: Request) -> Response:
        """What a caller gets for an HTTP request."""
        payload = json.dumps(EVENTS[self.kind](request)).encode()
        if len(payload) > PAYLOAD_BYTES:
            return _message(413, "Request Too Long")
        outcome = self.environments.invoke(payload)
        if outcome.error == THROTTLED:
            return _message(429, "Too Many Requests")
        if outcome.error is not None:
            return self._failed(outcome.payload.decode(errors="replace"))
        if len(outcome.payload) > ANSWER_BYTES.get(self.kind, PAYLOAD_BYTES):
            return self._failed(f"the answer has {len(outcome.payload)} bytes, more than {self.kind} takes")
        try:
            return to_http(self.kind, outcome.payload)
        except BadAnswer as error:
            return self._failed(f"the answer is none that {self.kind} takes: {error}")

    def _failed(self, why: str) -> Response:
        """The caller is told nothing of why; the log is."""
        self._line(f"gateway: {why[:2000]}")
        status, body = FAILED[self.kind]
        return Response(status, [("content-type", "application/json" if body.startswith(b"{") else "text/html")], body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        self.environments.close()


@contextmanager
def local_gateway(
    kind: str = "http-v2",
    *,
    port: int = 0,
    environ: Mapping[str, str] | None = None,
    echo: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Gateway]:
    """A gateway on loopback, its provisioned environments started; every process ends with the block.

    `kind`: http-v2, rest, alb, alb-multi or url. `environ`: settings beside those of this process; there is no authorizer here,
    so callers are let in without one unless it says TRIFORM_ALLOW_ANONYMOUS=false. `options`: `FunctionConfig`'s.
    """
    config = FunctionConfig(environ={"TRIFORM_ALLOW_ANONYMOUS": "true", **os.environ, **(environ or {})}, **options)
    gateway = Gateway(kind, config, port, echo=echo)
    try:
        gateway.environments.provision()
        yield gateway
    finally:
        gateway.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    gateway: Gateway

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller who went away is no matter of the terminal's."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 300
    server: _Server

    def _serve(self) -> None:
        incoming = Incoming(self.connection, self.rfile, BODY_SECONDS)
        try:
            body = read_body(self.headers, incoming, HTTP_BYTES[self.server.gateway.kind])
        except Refused as refused:
            self.close_connection = True
            self._send(_message(refused.status, str(refused)))
            self.wfile.flush()
            incoming.linger()
            return
        self.connection.settimeout(self.timeout)
        path, _, query = self.path.partition("?")
        if self.command == "POST" and INVOKE.fullmatch(path):
            self._send(self._invoked(body))
            return
        request = Request(self.command, path, query, self.headers.items(), body, uuid.uuid4().hex)
        self._send(self.server.gateway.answer(request))

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = _serve  # noqa: N815 - http.server's

    def _invoked(self, body: bytes) -> Response:
        """Lambda's own Invoke."""
        if len(body) > PAYLOAD_BYTES:
            return _message(413, "Request Too Long")
        outcome = self.server.gateway.environments.invoke(body or b"{}")
        if outcome.error == THROTTLED:
            return _message(429, "Rate Exceeded.")
        extra = [("X-Amz-Function-Error", "Unhandled")] if outcome.error is not None else []
        return Response(200, [("content-type", "application/json"), *extra], outcome.payload)

    def _send(self, response: Response) -> None:
        self.send_response_only(response.status)
        for name, value in response.headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: reports say it."""


def _message(status: int, text: str) -> Response:
    return Response(status, [("content-type", "application/json")], json.dumps({"message": text}).encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.local.gateway", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--event", choices=[*EVENTS], default="http-v2", help="what the function gets its requests from")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--provisioned", type=int, default=0, metavar="N", help="environments that are started ahead")
    parser.add_argument("--max-concurrency", type=int, default=10, metavar="N", help="environments at most; beyond: 429")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="the function's")
    parser.add_argument("--memory", type=int, default=1769, metavar="MB", help="what the function is told that it has")
    parser.add_argument("--idle", type=float, default=300.0, metavar="SECONDS", help="after which an environment goes")
    parser.add_argument("--handler", default=FunctionConfig().handler)
    parser.add_argument("--repository", help="TRIFORM_REPOSITORY of the function")
    given = parser.parse_args()
    environ = {"TRIFORM_REPOSITORY": str(Path(given.repository).absolute())} if given.repository else {}
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    options = {"provisioned": given.provisioned, "max_concurrency": given.max_concurrency, "timeout": given.timeout}
    options |= {"memory_mb": given.memory, "idle": given.idle, "handler": given.handler}
    with local_gateway(given.event, port=given.port, environ=environ, echo=_say, **options) as gateway:
        _say(f"{given.event} at {gateway.url}, function {given.handler}; end it with Ctrl-C")
        stopped.wait()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # at once: of several threads' lines none ends within another
    sys.stdout.flush()


if __name__ == "__main__":
    main()
