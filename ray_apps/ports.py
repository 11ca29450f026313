"""Ports for a Ray Serve that shares its machine with others: what tests and the demo start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ray_apps.environment import serve_environment


class Ports(NamedTuple):
    """Of HTTP, gRPC, HAProxy's metrics and its own page; those of the replicas follow from the first two."""

    http: int
    grpc: int
    metrics: int
    stats: int

    @property
    def replicas(self) -> tuple[range, range]:
        """Where replicas listen, for HTTP and for gRPC."""
        http, grpc = self.http % 4000 + 10_000, self.grpc % 4000 + 15_000
        return range(http, http + 1000), range(grpc, grpc + 1000)

    def environment(self, folder: Path) -> dict[str, str]:
        """What must stand in the environment before Ray starts. Replicas that end do so at once: nobody waits for them here."""
        begin = self.replicas[0].start, self.replicas[1].start
        settings = serve_environment(folder, metrics_port=self.metrics, stats_port=self.stats, replica_ports=begin)
        return settings | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}  # else each shutdown takes half a minute


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that the kernel gives out: between now and their use no connection takes one."""
    held: list[socket.socket] = []
    while len(held) < count:
        with suppress(OSError):
            held.append(socket.create_server(("", random.randrange(22_000, 32_000))))  # noqa: S311 - no secret
    ports = [s.getsockname()[1] for s in held]
    for server in held:
        server.close()
    return ports
