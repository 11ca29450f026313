"""A replica without a place for a request, or one to wait for it, refuses it in our words and counts it: Serve would do neither.

    HTTP  straight.py ─┐
                       ├─► is_full ──► no_place() ──► 429 or RESOURCE_EXHAUSTED ──► triform_requests_total{code="overloaded"}
    gRPC  Handlers ────┘        └─no─► Serve's own steps

Probes over gRPC are answered without a place, as over HTTP. Seen in Ray 2.60: `_can_accept_request`, and the factory that Serve's
gRPC server makes handlers by (ray/serve/_private/replica.py, grpc_util.py). Where Ray has none of it, Serve refuses as it does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from triform.errors import Overloaded

log = logging.getLogger(__name__)

# What is used of a replica.
REPLICAS: Final = ("_semaphore", "_num_queued_requests", "max_queued_requests", "_deployment_id")
PROBES: Final = ("ServerLive", "ServerReady")


def no_place() -> Overloaded:
    return Overloaded("as many requests are under way, and wait, as may: send the request again later")


def is_full(replica: Any) -> bool:
    """Whether Serve, too, would refuse."""
    most: int = replica.max_queued_requests
    waiting: int = replica._num_queued_requests
    return 0 <= most <= waiting


@contextmanager
def refusing(server: Any) -> Iterator[None]:
    """Handlers that Serve's gRPC server makes in this block refuse as we do, where it is the server of a replica of ours: other
    applications' replicas, and Serve's proxy in Python, have such servers, too."""
    factory = getattr(server, "service_handler_factory", None)
    handlers = None if factory is None else Handlers.of(factory)
    if handlers is None:
        yield
        return
    server.service_handler_factory = handlers
    try:
        yield
    finally:
        server.service_handler_factory = factory


class Handlers:
    """Makes a replica's handlers of gRPC calls, before those that Serve's own `factory` makes."""

    def __init__(self, replica: Any, application: Any, factory: Callable[..., Any]) -> None:
        self._replica = replica
        self._application = application
        self._factory = factory
        self._places = replica._semaphore
        self._named = replica._deployment_id.app_name

    @classmethod
    def of(cls, factory: Callable[..., Any]) -> Handlers | None:
        """None where the factory is none of ours, or Ray's replica another than we know."""
        from ray_apps.grpc import OpenInference

        replica: Any = getattr(factory, "__self__", None)
        wrapper: Any = getattr(replica, "_user_callable_wrapper", None)
        application = getattr(wrapper, "_callable", None)
        if not isinstance(application, OpenInference) or wrapper._run_user_code_in_separate_thread:
            return None
        if lacking := [name for name in REPLICAS if not hasattr(replica, name)]:
            log.warning("this version of Ray Serve is another than 2.60 (no %s): it refuses gRPC calls itself", lacking[0])
            return None
        return cls(replica, application, factory)

    def __call__(self, *, service_method: str, streaming_type: Any) -> Callable[..., Any]:
        """As Serve asks for it."""
        handler = self._factory(service_method=service_method, streaming_type=streaming_type)
        if streaming_type.name == "UNARY_UNARY":
            return self._unary(service_method.rpartition("/")[2], handler)
        return self._stream(handler) if streaming_type.name == "STREAM_STREAM" else handler

    def _unary(self, rpc: str, handler: Callable[[Any, Any], Awaitable[bytes]]) -> Callable[[Any, Any], Awaitable[bytes]]:
        async def call(request: Any, context: Any) -> bytes:
            if rpc in PROBES and self._is_busy(context):
                answer: bytes = (await getattr(self._application, rpc)(request, context)).SerializeToString()
                return answer
            return b"" if self._refuses(context) else await handler(request, context)

        return call

    def _stream(self, handler: Callable[[Any, Any], AsyncIterator[bytes]]) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        async def call(requests: Any, context: Any) -> AsyncIterator[bytes]:
            if not self._refuses(context):
                async for answer in handler(requests, context):
                    yield answer

        return call

    def _is_busy(self, context: Any) -> bool:
        return (self._places.locked() or is_full(self._replica)) and self._is_meant(context)

    def _refuses(self, context: Any) -> bool:
        """Whether it has refused the call."""
        full = is_full(self._replica) and self._is_meant(context)
        if full:
            self._application.full(context)
        return full

    def _is_meant(self, context: Any) -> bool:
        """Whether the call is for this application, as far as its caller says: it is Serve that says no to others."""
        given = [value for name, value in context.invocation_metadata() if name == "application" and value]
        return not given or given[0] == self._named
