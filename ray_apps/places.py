"""A replica without a place for a request, or one to wait for it, refuses it in our words and counts it: Serve would do neither.

    HTTP  straight.py ─┐
                       ├─► is_full ──► no_place() ──► 429 or RESOURCE_EXHAUSTED ──► triform_requests_total{code="overloaded"}
    gRPC  handlers ────┘        └─no─► Serve's own steps

Probes over gRPC are answered without a place, as over HTTP. Seen in Ray 2.60: `_can_accept_request`, and the factory that
`start_grpc_server` makes handlers by, in ray/serve/_private. Where Ray has none of it, Serve refuses as it does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from triform.errors import Overloaded

log = logging.getLogger(__name__)

COUNTED: Final = ("_semaphore", "_num_queued_requests", "max_queued_requests", "_user_callable_wrapper")  # of a replica
PROBES: Final = ("ServerLive", "ServerReady")


def no_place() -> Overloaded:
    return Overloaded("as many requests are under way, and wait, as may: send the request again later")


def is_full(replica: Any) -> bool:
    """Whether Serve, too, would refuse."""
    most: int = replica.max_queued_requests
    waiting: int = replica._num_queued_requests
    return 0 <= most <= waiting


def refusing(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Serve's factory of gRPC handlers, whose handlers refuse as we do. That of what is no replica stays as it is."""
    replica = getattr(factory, "__self__", None)
    if not hasattr(replica, "_can_accept_request"):  # Serve's proxy in Python has such a factory, too
        return factory
    if lacking := [name for name in COUNTED if not hasattr(replica, name)]:
        log.warning("this version of Ray Serve counts in another way than 2.60 (%s): it refuses gRPC calls itself", lacking[0])
        return factory

    def made(*, service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler, rpc = factory(service_method=service_method, streaming_type=streaming_type), service_method.rpartition("/")[2]
        if streaming_type.name == "UNARY_UNARY":
            return _unary(replica, rpc, handler)
        return _stream(replica, handler) if streaming_type.name == "STREAM_STREAM" else handler

    return made


def _unary(replica: Any, rpc: str, handler: Callable[[Any, Any], Awaitable[bytes]]) -> Callable[[Any, Any], Awaitable[bytes]]:
    async def call(request: Any, context: Any) -> bytes:
        if rpc in PROBES and replica._semaphore.locked():
            answer: bytes = (await getattr(_application(replica), rpc)(request, context)).SerializeToString()
            return answer
        if is_full(replica):
            _application(replica).full(context)
            return b""
        return await handler(request, context)

    return call


def _stream(replica: Any, handler: Callable[[Any, Any], AsyncIterator[bytes]]) -> Callable[[Any, Any], AsyncIterator[bytes]]:
    async def call(requests: Any, context: Any) -> AsyncIterator[bytes]:
        if is_full(replica):
            _application(replica).full(context)
            return
        async for answer in handler(requests, context):
            yield answer

    return call


def _application(replica: Any) -> Any:
    """The `grpc.OpenInference` that it hosts."""
    return replica._user_callable_wrapper._callable
