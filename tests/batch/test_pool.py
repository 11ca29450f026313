"""The pool fits the cluster: never more actors than it has room for, and it says where it is not what was asked."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from batch.pool import STARTS, Cluster, Pool, Resources, _start, size_pool
from tests.batch.killing import meanwhile, pause_the_first_until_there_are_two
from tests.batch.workbench import Workbench, assert_each_row_once
from triform.errors import ConfigurationError, JobError

ROOT = Path(__file__).parents[2]
FOUR_CPUS = Resources(4.0, 0.0)


def size(actors: str | int | None, *, node: Resources = FOUR_CPUS, **more: Any) -> Pool:
    options = {"parts": 100, "cpus": 1.0, "gpus": 0.0} | more
    return size_pool(actors, cluster=[node], **options)


@pytest.mark.parametrize(
    ("pool", "smallest", "largest"),
    [
        (size(None), 4, 4),
        (size(None, node=Resources(4.9, 0)), 4, 4),
        (size(None, parts=3), 3, 3),
        (size(None, cpus=2), 2, 2),
        (size(None, cpus=0.5), 8, 8),
        (size(None, cpus=0.1, node=Resources(0.3, 0)), 3, 3),
        (size(4), 4, 4),
        (size("1:3"), 1, 3),
        (size("2:4", parts=1), 1, 1),
        (size(None, gpus=0.25, node=Resources(16, 2)), 8, 8),
        (size(None, gpus=0.1, node=Resources(16, 1)), 10, 10),
        (size(None, gpus=0.25, cpus=4, node=Resources(16, 2)), 4, 4),
        (size(3, gpus=1, node=Resources(16, 8)), 3, 3),
    ],
)
def test_as_many_as_asked_for_and_no_more_than_fit(pool: Pool, smallest: int, largest: int) -> None:
    assert (pool.smallest, pool.largest, pool.note) == (smallest, largest, "")


@pytest.mark.parametrize(
    ("actors", "options"),
    [(5, {}), ("1:9", {}), (4, {"cpus": 2}), (3, {"gpus": 1, "node": Resources(4, 2)}), (5, {"may_grow": True})],
)
def test_more_than_fit_is_adapted_and_said(actors: str | int, options: dict[str, Any]) -> None:
    pool = size(actors, **options)
    assert pool.smallest <= pool.largest
    assert pool.note.endswith(f"going on with {pool.largest}")
    assert pool.largest * pool.cpus <= 4


def test_a_cluster_that_may_grow_keeps_the_largest_that_was_asked_for() -> None:
    grown = size("2:40", may_grow=True)
    assert (grown.smallest, grown.largest, grown.note) == (2, 40, "")
    assert size("2:40", may_grow=True, parts=7).largest == 7
    assert size("6:40", may_grow=True, parts=3) == size("3:3")
    assert size(None, may_grow=True).largest == 4
    with pytest.raises(ConfigurationError, match="5 actors do not fit"):
        size("5:40", may_grow=True)


@pytest.mark.parametrize(
    "options",
    [
        {"node": Resources(0, 0)},
        {"cpus": 5},
        {"gpus": 0.5},
        {"gpus": 2, "node": Resources(4, 1)},
        {"cpus": 5, "may_grow": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("actors", [None, 1, "1:3"])
def test_where_not_one_fits_the_start_is_refused(actors: str | int | None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="no actor fits"):
        size(actors, **options)


def test_an_actor_does_not_span_nodes() -> None:
    nodes = [Resources(3.0, 0.5)] * 4
    assert size_pool(None, parts=100, cpus=2.0, gpus=0.0, cluster=nodes).largest == 4
    assert size_pool(None, parts=100, cpus=1.0, gpus=0.4, cluster=nodes).largest == 4


def actors_started() -> int:
    """The actors that have ever run in this cluster, those that still wait for a node left out."""
    import ray
    from ray.util.state import list_actors

    there = ray.get_runtime_context().gcs_address
    return sum(bool(actor.pid) for actor in list_actors(there, limit=1000) if "PartScorer" in actor.class_name)


@pytest.mark.slow
def test_a_pool_grows_with_its_work_and_waits_for_no_node(workbench: Workbench, ray_cluster: Any) -> None:
    """From one actor to what the cluster has; MAX is beyond that, as in a cluster whose autoscaler may add nodes."""
    workbench.write_some(200)
    before = actors_started()
    with meanwhile(pause_the_first_until_there_are_two(lambda: any(workbench.output.glob("run=*/_parts/[0-9]*.json")))):
        summary = workbench.run(actors="1:40", address=ray_cluster.get_runtime_context().gcs_address)
    assert_each_row_once(summary.folder, 20_000)
    assert 2 <= actors_started() - before <= 4
    assert "asked for" not in workbench.said


FRACTIONS = """
import sys
import ray
from pathlib import Path
from tests.batch.killing import meanwhile, pause_the_first_until_there_are_two
from tests.batch.workbench import Workbench, assert_each_row_once
from tests.batch.test_pool import actors_started

ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=True, object_store_memory=150_000_000, log_to_driver=False)
bench = Workbench(Path(sys.argv[1]), Path(sys.argv[2])).write_some(6)
assert_each_row_once(bench.run(gpus=0.4, cpus=0.5, provider="cpu").folder, 600)
assert actors_started() == 2, actors_started()  # 8 would fit by CPUs
"""


@pytest.mark.slow
def test_actors_share_a_gpu_by_fractions(workbench: Workbench) -> None:
    """In a cluster of its own, with a GPU that only Ray believes in."""
    command = [sys.executable, "-c", FRACTIONS, workbench.root, workbench.repository]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("late", "said"), [(1, ""), (STARTS, "this machine is too busy")])
def test_a_ray_that_starts_too_slowly_is_started_once_more(monkeypatch: pytest.MonkeyPatch, late: int, said: str) -> None:
    import ray

    starts: list[str] = []

    def init(**options: Any) -> None:
        starts.append(options["address"])
        if len(starts) <= late:
            raise Exception("The current node timed out during startup. ...")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(JobError, match=said) if said else nullcontext():
        _start()
    assert starts == ["local"] * STARTS


def test_a_cluster_that_is_there_is_used_and_left_running(ray_cluster: Any) -> None:
    with Cluster(None) as cluster:
        assert cluster.nodes() == [Resources(4.0, 0.0)]
    assert ray_cluster.is_initialized()
