"""How many replicas are wanted, and that Serve gets the signals and follows."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from ray_apps.arguments import Arguments
from ray_apps.autoscaling import NEEDED, QUEUE, LoadPolicy
from tests.ray_apps.hosts import served
from tests.ray_apps.load import load, until
from triform import testing
from triform.errors import ConfigurationError


def wanted(running: int, requests: float, *waits: float, target: int | None = None, needed: float | None = None) -> float:
    """By a policy of 10 requests a replica and 0.1 s of waiting."""
    unused = dict.fromkeys(("deployment_id", "deployment_name", "app_name", "last_scale_up_time", "last_scale_down_time"))
    ctx = AutoscalingContext(
        **unused,  # type: ignore[arg-type]  # the policy looks at none of them
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={QUEUE: dict(enumerate(waits))} if waits else None,  # type: ignore[dict-item]  # any key will do
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=10),
    )
    if needed is not None:
        ctx.aggregated_metrics[NEEDED] = {"a": needed, "b": 0.0}
    return LoadPolicy(target_queue_s=0.1)(ctx)[0]


@pytest.mark.parametrize(
    ("running", "requests", "waits", "replicas"),
    [
        (2, 20, (), 2),
        (2, 35, (0.0, 0.0), 3.5),
        (2, 80, (0.0, 0.0), 8),
        (4, 4, (0.11, 0.11, 0.11, 0.11), 4 * 1.1),
        (4, 4, (9.0, 9.0, 9.0, 9.0), 8),
        (4, 90, (9.0, 9.0, 9.0, 9.0), 9),
        (4, 4, (0.3, 0.0, 0.0, 0.0), 4),
        (4, 4, (0.06, 0.06, 0.06, 0.06), 4),
        (4, 4, (0.01, 0.01, 0.01, 0.01), 3),
        (4, 0, (), 3),
        (1, 0, (0.0,), 0),
        (1, 1, (0.0,), 0.1),
    ],
)
def test_replicas_that_are_wanted(running: int, requests: float, waits: tuple[float, ...], replicas: float) -> None:
    assert wanted(running, requests, *waits) == pytest.approx(replicas)


def test_one_stays_where_it_is_needed_though_nobody_asks() -> None:
    assert wanted(1, 0, 0.0) == wanted(1, 0, 0.0, needed=0.0) == 0
    assert wanted(1, 0, 0.0, needed=1.0) == wanted(2, 0, 0.0, needed=1.0) == 1
    assert wanted(3, 35, 0.0, needed=1.0) == 3.5


def test_without_replicas_it_leaves_the_word_to_serve() -> None:
    assert wanted(0, 5, target=0) == 0
    assert wanted(0, 5, target=2) == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"autoscaling": {"max_replicas": 2}, "num_replicas": 2}, "num_replicas and autoscaling"),
        ({"autoscaling": {"max_replicas": 2, "min_replicas": 3}}, "min_replicas 3"),
        ({"autoscaling": {}}, "max_replicas"),
        ({"autoscaling": {"max_replicas": 2, "upscale_delay": 1}}, "upscale_delay"),
        ({"autoscaling": {"max_replicas": 2, "target_queue_s": 0}}, "target_queue_s"),
    ],
)
def test_a_scaling_that_cannot_be_meant_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Arguments.of({"repository": "x", **args})


@pytest.mark.slow  # replicas come and go, and Serve looks back twelve seconds
def test_replicas_come_where_requests_wait_and_go_down_to_none(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve

    repository = tmp_path / "models"
    testing.repository(repository, {"slow": testing.slow(tmp_path / "slow.onnx")})
    name = uuid.uuid4().hex[:8]
    scaling = {
        "max_replicas": 2, "min_replicas": 0, "target_ongoing_requests": 10_000, "target_queue_s": 0.02, "upscale_delay_s": 0.5,
        "downscale_delay_s": 1, "to_zero_delay_s": 1,
    }  # fmt: skip

    def running() -> int:
        return int(serve.status().applications[name].deployments["predict"].replica_states.get("RUNNING", 0))

    binary = {"inference-header-content-length": "0"}
    with served(repository, f"/{name}", name, default_model="slow", autoscaling=scaling) as address:
        assert running() == 1
        with load(address, f"/{name}/v2/models/slow/infer", bytes(1024 * 500), clients=8, headers=binary) as clients:
            until(lambda: running() == 2)
        assert {seen.status for seen in clients.seen} == {200}
        until(lambda: running() == 0)
        with load(address, f"/{name}/v2/models/slow/infer", bytes(1024), clients=1, headers=binary) as clients:
            clients.until(lambda seen: len(seen) > 3)
        assert {seen.status for seen in clients.seen} == {200}, "who comes first waits for a replica"
