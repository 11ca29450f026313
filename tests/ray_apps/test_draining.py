"""A node that has to go, as a pod of Kubernetes has: its replica answers what it has got, and nobody notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_apps.environment import DRAINING
from tests.ray_apps.hosts import served
from tests.ray_apps.load import Asked, load, until

LINEAR = "/v1/models/linear:predict"
BODY = b'{"instances": [[1, 2, 3]]}'
PERIOD, DRAIN, GRACE = 2, 5, 20  # seconds: still reachable, then for what is in flight; of the whole node


@contextmanager
def joined(ray_cluster: Any, folder: Path, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """A second node of the session's cluster, as infra/ray/serving starts its workers."""
    address = ray_cluster.get_runtime_context().gcs_address
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--address", address, "--num-cpus", str(cpus)]
    command += ["--object-store-memory", "100000000", "--dashboard-agent-listen-port", "0"]
    environment = {**os.environ, DRAINING: str(PERIOD), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE)}
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as node:
        try:
            until(lambda: sum(n["Alive"] for n in ray_cluster.nodes()) == 2 or node.poll() is not None)
            assert node.poll() is None, (folder / "log").read_text()
            yield node
        finally:
            node.kill()
            until(lambda: sum(n["Alive"] for n in ray_cluster.nodes()) == 1)


def states(application: str) -> dict[str, int]:
    from ray import serve

    return {str(s): n for s, n in serve.status().applications[application].deployments["predict"].replica_states.items()}


def replicas_of(node: subprocess.Popen[bytes]) -> int:
    found = 0
    for process in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += process.name().startswith("ray::ServeRepl")
    return found


@pytest.mark.slow  # a node comes, and takes its time to go
@pytest.mark.parametrize("cpus", [2, 4], ids=["another node has room", "no other node has room"])
def test_a_node_that_is_drained_loses_no_request(
    ray_cluster: Any, online_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """The session's own node has four CPUs: for one replica of each size, and for a second of the small one."""
    monkeypatch.setenv(DRAINING, str(PERIOD))
    name = uuid.uuid4().hex[:8]
    options = {"models": ["linear"], "num_replicas": 2, "num_cpus": cpus, "drain_s": DRAIN, "timeout_s": 60}
    with (
        joined(ray_cluster, tmp_path, cpus) as node,
        served(online_models, f"/{name}", name, **options) as address,
        load(address, f"/{name}{LINEAR}", BODY, 8) as asking,
    ):
        assert replicas_of(node) == 1
        held = [Asked(address[1], f"/{name}{LINEAR}", BODY) for _ in range(20)]
        asking.until(lambda seen: len(seen) > 100)
        node.send_signal(signal.SIGTERM)
        until(lambda: "STOPPING" in states(name))
        assert [one.finish() for one in held] == [200] * 20
        node.wait(2 * GRACE)
        asking.until(lambda seen: len(seen) > 100)
        until(lambda: states(name).get("RUNNING") == (2 if cpus == 2 else 1))
        assert "finished draining" in (tmp_path / "log").read_text()
    print(f"{len(asking.seen)} answers, the slowest after {max(s.seconds for s in asking.seen):.2f} s")
    assert Counter(s.status for s in asking.seen) == {200: len(asking.seen)}
