"""The short way of an HTTP request from uvicorn to our application, past what Serve does for requests of any application.

    uvicorn -> spared.py -> Straight -> one of the replica's places -> asgi.py, writing.py -> counted where Serve counts
                               |
                               no place is free, Serve's own paths, a time limit of Serve's -> all of Serve's steps
                               as many as may wait for one already: refused, in the words of all other refusals
                               a probe is answered without a place: who is busy is not ill

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
from ray_apps.places import is_full
from ray_apps.writing import direct
from triform.routes import EVERYBODYS

log = logging.getLogger(__name__)
Asgi = Callable[[Any, Any, Any], Awaitable[None]]

SERVES: Final = "/-/"  # how Serve's own paths begin
TIME_LIMIT: Final = b"x-request-timeout-seconds"  # Serve ends a request after that
# What is used of a replica, and of what counts for it.
REPLICAS: Final = (
    "_semaphore", "_num_queued_requests", "max_queued_requests", "_metrics_manager", "_http_options", "_route_prefix",
    "_deployment_id", "_user_callable_wrapper",
)  # fmt: skip
COUNTS: Final = (
    "inc_num_ongoing_requests", "dec_num_ongoing_requests", "record_request_metrics", "record_ingress_request_metrics",
)  # fmt: skip


class Straight:
    """A replica's. `takes` a request, or leaves it to Serve."""

    def __init__(self, replica: Any, app: AsgiApp) -> None:
        from ray.serve._private.common import RequestMetadata, RequestProtocol

        self._app = direct(app)  # which tells the request's id itself
        self._replica = replica  # whose prefix may change
        self._places = replica._semaphore
        self._counts = replica._metrics_manager
        self._protocol = RequestProtocol.HTTP
        self._named = {"app_name": replica._deployment_id.app_name, "deployment_name": replica._deployment_id.name}
        self._kind = RequestMetadata("", "", _request_protocol=self._protocol, is_direct_ingress=True)

    @classmethod
    def of(cls, below: Asgi) -> Straight | None:
        """That of the replica which a middleware stands before; None where it is none of ours, or Serve acts on every request."""
        replica: Any = getattr(getattr(below, "_app", None), "__self__", None)  # within what gives requests their id
        app = getattr(replica, "_user_callable_asgi_app", None)
        app = getattr(app, "app", app)
        if not isinstance(app, AsgiApp):
            return None
        try:
            return None if _acts_on_all(replica) else cls(replica, app)
        except (ImportError, AttributeError, TypeError) as error:
            log.warning("this version of Ray Serve counts in another way than 2.60 (%s): each request takes its long way", error)
            return None

    def takes(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether there is a place for the request, or none to wait for, and nothing in it that Serve itself acts on."""
        path: str = scope["path"][len(scope.get("root_path", "")) :]
        if not path.startswith(self._replica._route_prefix or "") or path.startswith(SERVES):
            return False
        if self._places.locked():
            return self._probes(scope) or is_full(self._replica)
        return TIME_LIMIT not in [name for name, _ in scope["headers"]]

    def _probes(self, scope: MutableMapping[str, Any]) -> bool:
        below: str = scope.get("root_path", "") + (self._replica._route_prefix or "").rstrip("/")
        path: str = scope["path"]
        return path.removeprefix(below) in EVERYBODYS and scope["method"] in ("GET", "HEAD")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Of a request that it takes, in the same turn of the event loop. Raises what the application does."""
        started, status, failed = time.time(), 500, None
        prefix: str = self._replica._route_prefix or ""
        places = None if self._places.locked() else self._places
        if places is None and not self._probes(scope):
            status = await self._app.full(scope, send)
            self._count_ingress(prefix, scope["method"], str(status), (time.time() - started) * 1e3)
            return
        if prefix != "/":
            scope["root_path"] = scope.get("root_path", "") + prefix
        if places is not None:
            await places.acquire()
        try:
            self._counts.inc_num_ongoing_requests(self._kind)
            try:
                status = await self._app.http(scope, receive, send)
            except BaseException as error:
                failed = type(error).__name__
                if isinstance(error, Exception):  # what uvicorn would say of it nobody sees in Serve
                    log.exception("a request failed")
                raise
            finally:
                self._counts.dec_num_ongoing_requests(self._kind)
                self._count(prefix, scope["method"], str(status), (time.time() - started) * 1e3, failed)
        finally:
            if places is not None:
                places.release()

    def _count(self, route: str, method: str, status: str, milliseconds: float, failed: str | None) -> None:
        self._counts.record_request_metrics(
            route=route, latency_ms=milliseconds, is_error=failed is not None, exception_type=failed
        )
        self._count_ingress(route, method, status, milliseconds)

    def _count_ingress(self, route: str, method: str, status: str, milliseconds: float) -> None:
        self._counts.record_ingress_request_metrics(
            protocol=self._protocol, method=method, route=route, latency_ms=milliseconds, is_error=status[0] in "45",
            status_code=status, **self._named,
        )  # fmt: skip


def _acts_on_all(replica: Any) -> bool:
    """Whether Serve does something with each request that it alone can. Raises `AttributeError`, `ImportError`."""
    from ray.serve._private.tracing_utils import is_tracing_enabled

    for name in REPLICAS:
        getattr(replica, name)
    for name in COUNTS:
        getattr(replica._metrics_manager, name)
    elsewhere: bool = replica._user_callable_wrapper._run_user_code_in_separate_thread  # ours belongs to one event loop
    return elsewhere or is_tracing_enabled() or replica._http_options.request_timeout_s is not None
