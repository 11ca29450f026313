"""The Serve form for tests: its ASGI application on an event loop of its own, and the application on a running Ray cluster."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from ray_apps.arguments import Arguments
from ray_apps.asgi import AsgiApp
from ray_apps.hosting import host
from ray_apps.spared import Spared
from tests.conformance.models import DEFAULT
from tests.ray_apps.ports import SERVE_PORTS
from triform.routes import LIVE
from triform.telemetry import Silent, Telemetry

Headers = Sequence[tuple[bytes, bytes]]
CACHE = tempfile.mkdtemp(prefix="cache-")  # no test writes into the developer's own


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class RunningApp:
    """An ASGI application on an event loop in a thread."""

    def __init__(self, app: AsgiApp, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.loop = loop

    def request(self, method: str, path: str, headers: Headers = (), body: Sequence[bytes] = (b"",), **scope: Any) -> Response:
        """The answer to a body that comes in these pieces."""
        return self.begin(method, path, headers, body, **scope).result(60)

    def begin(
        self, method: str, path: str, headers: Headers = (), body: Sequence[bytes] = (b"",), **scope: Any
    ) -> Future[Response]:
        """The same, still to come."""
        return asyncio.run_coroutine_threadsafe(call_app(self.app, method, path, headers, body, **scope), self.loop)


async def call_app(
    app: AsgiApp, method: str, path: str, headers: Headers = (), body: Sequence[bytes] = (b"",), **scope: Any
) -> Response:
    sent: list[Any] = []
    pieces = iter(body)
    left = len(body)

    async def receive() -> Any:
        nonlocal left
        if left == 0:
            await asyncio.Event().wait()  # the caller stays
        left -= 1
        return {"type": "http.request", "body": next(pieces), "more_body": left > 0}

    async def send(message: Any) -> None:
        sent.append(message)

    base = {"type": "http", "method": method, "path": path, "raw_path": path.encode("latin-1"), "headers": list(headers)}
    await app({**base, **scope}, receive, send)
    start, *rest = sent
    told = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return Response(start["status"], told, b"".join(m["body"] for m in rest))


@contextmanager
def on_uvicorn(app: AsgiApp) -> Iterator[tuple[str, int]]:
    """The application behind the server that Ray Serve has, and what we put before it there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # whoever reads slowly is soon waited for
        server = uvicorn.Server(uvicorn.Config(Spared(app), log_level="critical", lifespan="off", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[:2]
        server.should_exit = True
        thread.join(30)


@contextmanager
def running(
    repository: Path, telemetry: Telemetry | None = None, environ: Mapping[str, str] | None = None, **args: Any
) -> Iterator[RunningApp]:
    arguments = Arguments.of({"repository": str(repository), "default_model": DEFAULT, "allow_anonymous": True, **args})
    hosted = host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE, **(environ or {})}), telemetry or Silent())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        loop.call_soon_threadsafe(hosted.live.start)
        room = arguments.room()
        yield RunningApp(AsgiApp(hosted.surface, timeout=arguments.timeout_s, room=room, at_end=hosted.drain), loop)
        asyncio.run_coroutine_threadsafe(hosted.drain(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def _await_forgotten(prefix: str, seconds: float = 60.0) -> None:
    """Until HAProxy knows of the application no more, some time after Serve does: who comes next may be the only one again."""
    deadline = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", SERVE_PORTS.http, timeout=10)
        try:
            connection.request("GET", f"{prefix}{LIVE}")
            if connection.getresponse().status == 404:
                return
        except OSError:
            pass  # it changes its configuration
        finally:
            connection.close()
        assert time.monotonic() < deadline, f"{prefix} is still there"
        time.sleep(0.1)


@contextmanager
def grpc_client(seconds: float = 60.0) -> Iterator[Any]:
    """tritonclient's, once HAProxy knows of one application alone: until then it wants to be told which."""
    import tritonclient.grpc as triton

    deadline = time.monotonic() + seconds
    with triton.InferenceServerClient(f"127.0.0.1:{SERVE_PORTS.grpc}") as client:
        while True:
            try:
                client.is_server_live()
                break
            except triton.InferenceServerException:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
        yield client


def metrics_port(ray_cluster: Any) -> int:
    """Where Ray exports what the processes of the session's node count."""
    return next(int(node["MetricsExportPort"]) for node in ray_cluster.nodes() if node["Alive"])


def counted(ray_cluster: Any, model: str) -> Counter[str]:
    """The requests to the replica that has the model by their outcome, as Ray exports them: of what was refused unread nobody
    knows for which model it was."""
    port = metrics_port(ray_cluster)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    told = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines if line.startswith("ray_triform_requests_total{")]
    counts = [int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("ray_triform_requests_total{")]
    replicas = {labels["WorkerId"] for labels in told if labels["model"] == model}
    found: Counter[str] = Counter()
    for labels, count in zip(told, counts, strict=True):
        if labels["WorkerId"] in replicas:
            found[labels["code"]] += count
    return found


@contextmanager
def served(repository: Path, prefix: str = "/", name: str | None = None, **args: Any) -> Iterator[tuple[str, int]]:
    """Host and port of the application on the cluster that this process is connected to, below a prefix of its own.

    Several with gRPC need the application's name in a request's metadata.
    """
    from ray import serve

    from ray_apps.predict import GRPC, build_app

    name = name or f"predict-{uuid.uuid4().hex[:8]}"
    loopback = {"num_cpus": 0, "drain_s": 0, "allow_anonymous": True}
    given = {"repository": str(repository), "default_model": DEFAULT, **loopback, **args}
    serve.start(
        proxy_location="HeadOnly",  # a test's second node has the same host
        http_options={"host": "127.0.0.1", "port": SERVE_PORTS.http},
        grpc_options={"port": SERVE_PORTS.grpc, "grpc_servicer_functions": [GRPC], "enable_reflection": False},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIFORM_CACHE", CACHE)
        app = build_app(given)
    serve.run(app, name=name, route_prefix=prefix)
    try:
        yield "127.0.0.1", SERVE_PORTS.http
    finally:
        serve.delete(name)
        if prefix != "/":
            _await_forgotten(prefix)
