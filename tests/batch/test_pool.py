"""The pool fits the cluster: never more actors than it has room for, and it says where it is not what was asked."""

from __future__ import annotations

from typing import Any

import pytest

from batch.pool import Cluster, Pool, Resources, size_pool
from triform.errors import ConfigurationError


def size(actors: str | int | None, *, cpus: float = 4, gpus: float = 0, cluster_gpus: float = 0, **more: Any) -> Pool:
    options = {"parts": 100, "threads": 1} | more
    return size_pool(actors, gpus=gpus, cluster=[Resources(cpus, cluster_gpus)], **options)


@pytest.mark.parametrize(
    ("pool", "smallest", "largest"),
    [
        (size(None), 4, 4),
        (size(None, cpus=4.9), 4, 4),
        (size(None, parts=3), 3, 3),
        (size(None, threads=2), 2, 2),
        (size(4), 4, 4),
        (size("1:3"), 1, 3),
        (size("2:4", parts=1), 1, 1),
        (size(None, cpus=16, gpus=0.25, cluster_gpus=2), 8, 8),
        (size(None, cpus=16, gpus=0.1, cluster_gpus=1), 10, 10),
        (size(3, cpus=16, gpus=1, cluster_gpus=8), 3, 3),
    ],
)
def test_as_many_as_asked_for_and_no_more_than_fit(pool: Pool, smallest: int, largest: int) -> None:
    assert (pool.smallest, pool.largest, pool.note) == (smallest, largest, "")


@pytest.mark.parametrize(("actors", "options"), [(5, {}), ("1:9", {}), (4, {"threads": 2}), (3, {"gpus": 1, "cluster_gpus": 2})])
def test_more_than_fit_is_adapted_and_said(actors: str | int, options: dict[str, Any]) -> None:
    pool = size(actors, **options)
    assert pool.smallest <= pool.largest
    assert pool.note.endswith(f"going on with {pool.largest}")
    assert pool.largest * pool.cpus <= 4


@pytest.mark.parametrize("options", [{"cpus": 0}, {"threads": 5}, {"gpus": 0.5}, {"gpus": 2, "cluster_gpus": 1}])
def test_where_not_one_fits_the_start_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="no actor fits"):
        size(None, **options)


def test_an_actor_does_not_span_nodes() -> None:
    nodes = [Resources(3.0, 0.5)] * 4
    assert size_pool(None, parts=100, threads=2, gpus=0.0, cluster=nodes).largest == 4
    assert size_pool(None, parts=100, threads=1, gpus=0.4, cluster=nodes).largest == 4


def test_a_cluster_that_is_there_is_used_and_left_running(ray_cluster: Any) -> None:
    with Cluster(None) as cluster:
        assert cluster.nodes() == [Resources(4.0, 0.0)]
    assert ray_cluster.is_initialized()
