"""The session's registry on Ray: it answers actors, feeds the progress, and whoever asks goes on without it when it is gone."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from batch.attempts import Attempt
from batch.registry import RemoteAttempts, Watch, start_registry
from tests.batch.killing import meanwhile
from tests.batch.workbench import Workbench, assert_each_row_once


def eventually(watch: Watch, rows: int) -> None:
    deadline = time.monotonic() + 30
    while (said := watch.rows_under_way()) != rows:
        assert time.monotonic() < deadline, f"{said} rows under way, not {rows}"
        time.sleep(0.05)


def test_actors_and_driver_see_the_same_attempts(ray_cluster: Any) -> None:
    node = ray_cluster.get_runtime_context().get_node_id()
    registry = start_registry()
    one, other, watch = RemoteAttempts(registry), RemoteAttempts(registry), Watch()
    assert watch.rows_under_way() == 0  # the progress asks before there is a registry
    watch.follow(registry)
    first, second = Attempt("p1", node), Attempt("p2", node)
    assert one.begin(7, first) == 0
    one.rows(7, first, 500)
    eventually(watch, 500)
    assert other.begin(7, second) == 1
    other.rows(7, second, 300)
    eventually(watch, 300)
    other.end(7, second, scored=True)
    eventually(watch, 300)  # until the driver has the outcome
    watch.finished(7)
    assert watch.rows_under_way() == 0
    assert one.begin(8, Attempt("p3", "a-node-that-is-gone")) == 0
    assert one.begin(8, first) == 0  # a lost node does not count


def test_a_registry_that_is_gone_is_done_without(ray_cluster: Any) -> None:
    registry = start_registry()
    attempts, watch = RemoteAttempts(registry), Watch()
    watch.follow(registry)
    attempts.begin(7, Attempt("p1", "n"))
    ray_cluster.kill(registry)
    began = time.monotonic()
    assert attempts.begin(7, Attempt("p2", "n")) == 0
    attempts.rows(7, Attempt("p2", "n"), 5)
    attempts.end(7, Attempt("p2", "n"), scored=True)
    assert [watch.rows_under_way() for _ in range(5)] == [0] * 5
    assert time.monotonic() - began < 30


def test_a_job_outlives_its_registry(workbench: Workbench, ray_cluster: Any) -> None:
    for i in range(8):
        workbench.write(f"{i}.parquet", i * 4000, 4000)
    killed: list[int] = []

    def kill(over: threading.Event) -> None:
        while not killed and not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if any(word.startswith("ray::Attempts") for word in process.cmdline()):
                        process.kill()
                        killed.append(process.pid)

    with meanwhile(kill):
        summary = workbench.run(actors=2)
    assert killed
    assert_each_row_once(summary.folder, 32_000)
