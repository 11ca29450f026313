"""What is asked: Ray Serve or the Lambda form on this machine, started and stopped here, or a deployment that is there already.

serve(...) | function(...) | deployed(...) -> Target: where to ask, what it is like right now, what it has counted
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import orjson

from examples.flights.serving import APP, LocalServe
from infra.local.gateway import Gateway, local_gateway
from loadtests.metrics import Endpoint
from triform.errors import ConfigurationError

GONE: Final = {"min_replicas": 0, "to_zero_delay_s": 12}  # of a burst: the last replica goes in its pause
IDLE: Final = 5.0  # seconds, of a burst: after which Lambda's environments go
COLD: Final = "  Init Duration: "  # in a REPORT line of a request that waited for a new environment
COUNTED: Final = '"triform_requests_total"'  # in a line of EMF


class Look(NamedTuple):
    """`serving`: replicas or environments; `starts`: of them since the target was begun; `queue`: seconds that a request waited
    for its model since the last look, NaN where nobody knows."""

    serving: int
    starts: int
    queue: float = math.nan


class Target(NamedTuple):
    """`host`: URL; `grpc`: name:port. `look`: raises `OSError` where it cannot be looked at. `counted`: requests by code that it
    says it was asked, with what is new since the last call. `exact`: whether that cannot miss any."""

    title: str
    unit: str  # of `serving`
    host: str
    grpc: str | None = None
    look: Callable[[], Look] | None = None
    counted: Callable[[], dict[str, int]] | None = None
    exact: Callable[[], bool] = lambda: True
    metrics: str | None = None  # its page for Prometheus


def serving(serve: LocalServe, model: str) -> Target:
    """Ray Serve in this process's Ray, once it is ready."""
    import ray
    from ray import serve as ray_serve

    endpoint = Endpoint(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", model)
    state = {"serving": 0, "starts": 0, "gone": 0}
    before = (0.0, 0.0)

    def look() -> Look:
        nonlocal before
        states = ray_serve.status().applications[APP].deployments["predict"].replica_states
        now = sum(count for name, count in states.items() if name == "RUNNING")
        state["starts"] += max(0, now - state["serving"])
        state["gone"] += max(0, state["serving"] - now)
        state["serving"] = now
        endpoint.read()
        since, before = [a - b for a, b in zip(endpoint.queued(), before, strict=True)], endpoint.queued()
        return Look(now, state["starts"], since[0] / since[1] if since[1] > 0 else math.nan)

    def counted() -> dict[str, int]:
        endpoint.read()
        return endpoint.requests()

    return Target(
        "Ray Serve on this machine",
        "replicas",
        f"http://{serve.http}",
        serve.grpc,
        look,
        counted,
        lambda: not state["gone"],  # one that went may have counted something after the last look
        endpoint.url,
    )


def serve_arguments(replicas: tuple[int, int], shape: str) -> dict[str, Any]:
    """For `build_app`: between so many replicas; in a burst they all go in its pause."""
    least, most = replicas
    if shape != "burst" and least == most:
        return {"num_replicas": most}
    scaling = {"min_replicas": least, "max_replicas": most, "target_queue_s": 0.05, "downscale_delay_s": 5}
    return {"autoscaling": {**scaling, **(GONE if shape == "burst" else {})}}


@contextmanager
def function(repository: Path, environments: int, shape: str) -> Iterator[Target]:
    """The Lambda form behind a local API Gateway, with so many environments at most; one is there
    already, but for a burst."""
    told = _Told()
    environ = {"TRIFORM_REPOSITORY": str(repository.absolute())}
    warm = {"idle": IDLE} if shape == "burst" else {"provisioned": 1}
    with local_gateway("http-v2", environ=environ, echo=told.line, max_concurrency=environments, **warm) as gateway:
        yield Target(
            "Lambda behind a local API Gateway", "environments", gateway.url, None, lambda: told.look(gateway), told.requests
        )


class _Told:
    """What the function's environments wrote and were reported, counted as it comes: the gateway keeps the latest only."""

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self._starts = 0
        self._requests: dict[str, int] = {}

    def line(self, line: str) -> None:
        if COLD in line:
            with self._counting:
                self._starts += 1
        elif COUNTED in line:
            try:
                told = orjson.loads(line)
                code, values = told["code"], told["triform_requests_total"]
            except (ValueError, KeyError, TypeError):
                return
            with self._counting:
                self._requests[code] = self._requests.get(code, 0) + round(sum(values))

    def look(self, gateway: Gateway) -> Look:
        with self._counting:
            return Look(gateway.environments.count(), self._starts)

    def requests(self) -> dict[str, int]:
        with self._counting:
            return dict(self._requests)


def deployed(host: str, grpc: str | None, metrics: str | None, model: str) -> Target:
    """What listens at a URL. Raises `ConfigurationError` where nothing does, or the URL is none."""
    url = urlsplit(host)
    try:
        port = url.port
    except ValueError as error:
        raise ConfigurationError(f"--host: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or url.username is not None:
        raise ConfigurationError(f"--host: expected http://name:port or https://name/path, got {host!r}")
    _check_answers("--host", url.hostname, port or (443 if url.scheme == "https" else 80))
    if grpc is not None:
        name, _, number = grpc.removeprefix("https://").rpartition(":")
        if not name or not number.isdecimal():
            raise ConfigurationError(f"--grpc: expected name:port, or https://name:port for TLS, got {grpc!r}")
        _check_answers("--grpc", name.strip("[]"), int(number))
    if metrics is None:
        return Target(host, "", host, grpc)
    endpoint = Endpoint(metrics, model)

    def counted() -> dict[str, int]:
        endpoint.read()
        return endpoint.requests()

    try:
        counted()
    except OSError as error:
        raise ConfigurationError(f"--metrics: {metrics} cannot be read: {error}") from error
    return Target(host, "", host, grpc, None, counted, metrics=metrics)


def _check_answers(option: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"{option}: {host}, port {port}, does not answer: {error}") from error
