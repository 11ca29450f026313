"""A session that died is noticed in bounded time, and its replica replaced. Its stand-in is one that hangs or lies."""

from __future__ import annotations

import asyncio
import http.client
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from ray_apps.arguments import Arguments
from ray_apps.health import Health
from ray_apps.hosting import host
from tests.canaries import build
from tests.ray_apps.hosts import CACHE, served
from tests.ray_apps.load import until
from triform.errors import DeadlineExceeded, RunFailed
from triform.http import HttpRequest, HttpSurface
from triform.models import Models
from triform.predictor import Predictor
from triform.releases import Canary, Shadow
from triform.repository import open_repository
from triform.service import InferenceService
from triform.telemetry import Silent


class Hangs:
    """As a session on a device that answers no more."""

    def __init__(self) -> None:
        self.runs = 0
        self.released = threading.Event()

    def run(self, *_: object) -> Any:
        self.runs += 1
        assert self.released.wait(60)
        raise RuntimeError("the device is gone")


@pytest.fixture
def models(online_models: Path) -> Models:
    repository = open_repository(online_models)
    models = Models(form="serve")
    for name in "linear", "lookup":
        models.replace(name, {1: Predictor.load(repository.package(name, 1))}, {"stable": 1})
    return models


def check(health: Health) -> None:
    asyncio.run(asyncio.wait_for(health.check(), 60))


def test_sessions_that_answer_are_well(models: Models) -> None:
    health = Health(models, seconds=30)
    for _ in range(3):
        check(health)


def test_a_session_that_fails_or_lies_is_named(models: Models) -> None:
    linear, lookup = (models.get(name).predictor for name in ("linear", "lookup"))
    health, good = Health(models, seconds=30), linear._session
    linear._session = None
    with pytest.raises(RunFailed, match="linear/1 does not answer its golden row"):
        check(health)
    linear._session = good
    check(health)
    lookup._sample.outputs["y"][:] += 1  # type: ignore[union-attr]  # it was loaded
    with pytest.raises(RunFailed, match=r"lookup/1 .* differs from the recorded answer"):
        check(Health(models, seconds=30))


@pytest.mark.parametrize("release", [{"canary": Canary(2, 0.5)}, {"canary": Canary(2, 0.0)}, {"shadow": Shadow(2, 0.0)}])
def test_one_beside_stable_costs_no_replica(tmp_path: Path, release: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Whether it has keys, or samples, or none."""
    released = build(tmp_path)
    released.log("lookup").rollback()
    released.log("lookup").set(**release)
    arguments = Arguments.of({"repository": str(released.root), "models": ["lookup"], "allow_anonymous": True})
    hosted = host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE}), Silent())
    models = hosted.surface.service.models
    models.get("lookup", version=2).predictor._session = None
    check(hosted.health)
    assert "does not answer its golden row" in caplog.text
    models.get("lookup", version=1).predictor._session = None
    with pytest.raises(RunFailed, match="lookup/1 does not answer"):
        check(Health(models, seconds=30))


def test_a_session_that_hangs_is_noticed_in_time_and_asked_once(models: Models) -> None:
    hangs, predictor, health = Hangs(), models.get("linear").predictor, Health(models, seconds=0.2)
    predictor._session = hangs
    for _ in range(3):
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            check(health)
    assert hangs.runs == 1
    hangs.released.set()
    with pytest.raises((RunFailed, DeadlineExceeded)):  # what became of that look
        check(health)


def test_a_host_that_is_about_to_end_is_not_ready_and_answers(models: Models) -> None:
    surface = HttpSurface(InferenceService(models))
    paths = ["/v2/health/ready", "/ping", "/v2/health/live", "/v2/models/linear/ready"]
    assert [surface.handle(HttpRequest("GET", path)).status for path in paths] == [200] * 4
    models.leaving = True
    assert [surface.handle(HttpRequest("GET", path)).status for path in paths] == [503, 503, 200, 200]
    assert surface.handle(HttpRequest("POST", "/v1/models/linear:predict", (), b'{"instances": [[1, 2, 3]]}')).status == 200


def kill_the_session(replica: Any) -> None:
    """Run inside a replica: from now on its model hangs."""
    models = replica._replica_impl._user_callable_wrapper._callable.surface.service.models
    models.get("linear").predictor._session = Hangs()


@pytest.mark.slow  # a replica dies by three looks, and another starts
def test_serve_replaces_a_replica_whose_session_died(ray_cluster: Any, online_models: Path) -> None:
    prefix = f"/{uuid.uuid4().hex[:8]}"

    def replicas() -> list[str]:
        actors = ray_cluster.util.list_named_actors(all_namespaces=True)
        return [a["name"] for a in actors if prefix[1:] in a["name"] and "REPLICA" in a["name"]]

    def answer(address: tuple[str, int]) -> int:
        connection = http.client.HTTPConnection(*address, timeout=5)
        try:
            connection.request("POST", f"{prefix}/v1/models/linear:predict", b'{"instances": [[1, 2, 3]]}')
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    options = {"models": ["linear"], "health_period_s": 0.3, "health_timeout_s": 1.0, "name": prefix[1:]}
    with served(online_models, prefix, **options) as address:
        assert answer(address) == 200
        (before,) = replicas()
        ray_cluster.get(ray_cluster.get_actor(before, namespace="serve").__ray_call__.remote(kill_the_session), timeout=60)
        until(lambda: before not in replicas() and len(replicas()) == 1)
        until(lambda: answer(address) == 200)
