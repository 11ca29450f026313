"""The hosts that the suite runs against. Another one is a line in `HOSTS`: a context manager that gives a `Send`."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from infra.local.gateway import local_gateway
from tests.conformance.models import surface
from tests.conformance.server import serve
from tests.ray_apps.hosts import running
from tests.ray_apps.ports import SERVE_PORTS
from triform.http import HttpRequest
from triform.telemetry import Telemetry


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Send(Protocol):
    def __call__(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer: ...


@contextmanager
def in_process(repository: Path, telemetry: Telemetry | None = None, **options: Any) -> Iterator[Send]:
    """`http.py` itself; options are those of `surface`."""
    handle = surface(repository, telemetry=telemetry, **options).handle

    def send(method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        path, _, query = path.partition("?")
        return Answer(*handle(HttpRequest(method, path, list((headers or {}).items()), body, query)))

    yield send


@contextmanager
def over_http(address: str) -> Iterator[Send]:
    """Whatever listens at `host:port`."""
    connection = http.client.HTTPConnection(address, timeout=60)

    def send(method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    yield send
    connection.close()


@contextmanager
def loopback(repository: Path, **options: Any) -> Iterator[Send]:
    """The same behind Python's HTTP server."""
    with serve(surface(repository, **options)) as address, over_http(address) as send:
        yield send


@contextmanager
def aws_lambda(repository: Path, event: str = "http-v2", **environ: str) -> Iterator[Send]:
    """The Lambda form: a local gateway with that kind of event before a real runtime client."""
    settings = {"TRIFORM_REPOSITORY": str(repository), "TRIFORM_DEFAULT_MODEL": "linear", **environ}
    with (
        local_gateway(event, environ=settings, max_concurrency=1) as gateway,
        over_http(gateway.url.removeprefix("http://")) as send,
    ):
        yield send


@contextmanager
def asgi(repository: Path, telemetry: Telemetry | None = None, **args: Any) -> Iterator[Send]:
    """The Serve form's ASGI application with dynamic batching, without a server; `args` are those of `build_app`."""
    with running(repository, telemetry, **args) as app:

        def send(method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
            raw = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()]
            path, _, query = path.partition("?")
            return Answer(*app.request(method, path, raw, [body], query_string=query.encode()))

        yield send


@contextmanager
def serve_form(repository: Path) -> Iterator[Send]:
    """The application on Ray Serve, behind HAProxy. It runs already: the fixture `serve_address`."""
    with over_http(f"127.0.0.1:{SERVE_PORTS.http}") as send:
        yield send


HOSTS: Mapping[str, Callable[[Path], AbstractContextManager[Send]]] = {
    "http.py": in_process,
    "loopback": loopback,
    "asgi": asgi,
    "serve": serve_form,
    "lambda": aws_lambda,
    "lambda-rest": partial(aws_lambda, event="rest"),
    "lambda-alb": partial(aws_lambda, event="alb"),
    "lambda-alb-multi": partial(aws_lambda, event="alb-multi"),
    "lambda-url": partial(aws_lambda, event="url"),
}
SLOW = [name for name in HOSTS if name.startswith("lambda-")]  # the same function behind other events
