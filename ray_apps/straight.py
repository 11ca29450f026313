"""The short way of an HTTP request from uvicorn to our application, past what Serve does for requests of any application.

    uvicorn -> spared.py -> Straight -> one of the replica's places -> asgi.py -> counted where Serve counts
                               |
                               no place is free, Serve's own paths, a time limit of Serve's -> all of Serve's steps

Those steps (an id or two, a context for handles, closures around every message, a line for an access log that is off) take longer
than a small model. What is left of them here is what others rely on: `max_ongoing_requests`, the number of requests under way,
which autoscaling and draining look at, and the counts of Serve's dashboards. It is Ray's own code that counts (seen in Ray 2.60:
`Replica._direct_ingress_asgi` in ray/serve/_private/replica.py); where Ray has none of it, requests go the long way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from ray_apps.asgi import AsgiApp

log = logging.getLogger(__name__)
Asgi = Callable[[Any, Any, Any], Awaitable[None]]

SERVES: Final = "/-/"  # how Serve's own paths begin
TIME_LIMIT: Final = b"x-request-timeout-seconds"  # Serve ends a request after that
# What is used of a replica and of what counts for it.
REPLICAS: Final = ("_semaphore", "_metrics_manager", "_http_options", "_route_prefix", "_deployment_id")
COUNTS: Final = (
    "inc_num_ongoing_requests",
    "dec_num_ongoing_requests",
    "record_request_metrics",
    "record_ingress_request_metrics",
)


class Straight:
    """A replica's. `takes` a request, or leaves it to Serve."""

    def __init__(self, replica: Any, app: AsgiApp) -> None:
        from ray.serve._private.common import RequestMetadata, RequestProtocol

        self._app = AsgiApp(app.surface, timeout=app.timeout)  # which tells the request's id itself
        self._places = replica._semaphore
        self._counts = replica._metrics_manager
        self._prefix: str = replica._route_prefix or ""
        self._below = "" if self._prefix == "/" else self._prefix
        self._protocol = RequestProtocol.HTTP
        self._named = {"app_name": replica._deployment_id.app_name, "deployment_name": replica._deployment_id.name}
        self._kind = RequestMetadata("", "", _request_protocol=self._protocol, is_direct_ingress=True)

    @classmethod
    def of(cls, below: Asgi) -> Straight | None:
        """That of the replica which a middleware stands before; None where it is none of ours, or Serve acts on every request."""
        from ray.serve._private.tracing_utils import is_tracing_enabled

        replica = getattr(getattr(below, "_app", None), "__self__", None)  # within what gives requests their id
        app = getattr(replica, "_user_callable_asgi_app", None)
        app = getattr(app, "app", app)
        if not isinstance(app, AsgiApp):
            return None
        counts = getattr(replica, "_metrics_manager", None)
        if not all(hasattr(replica, name) for name in REPLICAS) or not all(hasattr(counts, name) for name in COUNTS):
            log.warning("this version of Ray Serve counts in another way than 2.60: each request takes its long way")
            return None
        options = replica._http_options  # type: ignore[union-attr]  # it has it
        if is_tracing_enabled() or options is None or options.request_timeout_s is not None:
            return None
        return cls(replica, app)

    def takes(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether there is a place for the request, and nothing in it that Serve itself acts on."""
        path: str = scope["path"][len(scope.get("root_path", "")) :]
        if not path.startswith(self._prefix) or path.startswith(SERVES) or self._places.locked():
            return False
        return all(name != TIME_LIMIT for name, _ in scope["headers"])

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Of a request that it takes, in the same turn of the event loop."""
        started = time.time()
        scope["root_path"] = scope.get("root_path", "") + self._below
        status, failed = 500, None
        await self._places.acquire()
        self._counts.inc_num_ongoing_requests(self._kind)
        try:
            status = await self._app.http(scope, receive, send)
        except BaseException as error:
            failed = type(error).__name__
            raise
        finally:
            self._counts.dec_num_ongoing_requests(self._kind)
            self._places.release()
            self._count(scope["method"], str(status), (time.time() - started) * 1e3, failed)

    def _count(self, method: str, status: str, milliseconds: float, failed: str | None) -> None:
        self._counts.record_request_metrics(
            route=self._prefix, latency_ms=milliseconds, is_error=failed is not None, exception_type=failed
        )
        self._counts.record_ingress_request_metrics(
            protocol=self._protocol, method=method, route=self._prefix, latency_ms=milliseconds, is_error=status[0] in "45",
            status_code=status, **self._named,
        )  # fmt: skip
