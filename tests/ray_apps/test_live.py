"""Releases that arrive while replicas answer: on Ray Serve behind HAProxy, and what hosts of one node share."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from onnx import helper

from ray_apps.arguments import Arguments
from ray_apps.hosting import host
from tests.faulty_proxy import FaultyProxy
from tests.ray_apps.hosts import CACHE, RunningApp, running, served
from tests.ray_apps.load import Seen, load, until
from triform import testing
from triform.errors import ConfigurationError, DigestMismatch, StoreError
from triform.following import Node
from triform.models import Models
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.testing import RecordingTelemetry

BODY = b'{"instances": [[1, 2, 3]]}'
HERE = {"allow_anonymous": True}
ANSWERS = {"linear/1": b'{"predictions":[[14.0]]}', "linear/2": b'{"predictions":[[28.0]]}'}


def twice(path: Path) -> Path:
    """y = 2 * x @ [1, 2, 3]."""
    weights = np.array([[2], [4], [6]], np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    tensors = [testing.value("x", "FP32", ["N", 3])], [testing.value("y", "FP32", ["N", 1])]
    return testing.save(path, [node], *tensors, {"w": weights})


@pytest.fixture
def versions(tmp_path: Path) -> ModelRepository:
    """`linear` with versions 1, which is released, 2, which answers twice as much, and 3, whose file is no good."""
    repository = testing.repository(tmp_path / "models", {"linear": testing.linear(tmp_path / "linear.onnx")})
    for version in 2, 3:
        package_model(twice(tmp_path / f"{version}.onnx"), name="linear", repository=repository)
    ReleaseLog(repository, "linear").set(stable=1)
    return repository


def spoil(repository: ModelRepository, model: str, version: int) -> None:
    file = Path(repository.location) / f"{model}/{version}/model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def release_unverified(log: ReleaseLog, version: int) -> None:
    """As it would be if the version was good when it was released, and is no more."""
    log._append(log._next(log.current(), version, None, None, "unverified", None))


def test_releases_good_and_bad_under_load_fail_no_request(ray_cluster: Any, versions: ModelRepository) -> None:
    log, prefix = ReleaseLog(versions, "linear"), f"/{uuid.uuid4().hex[:8]}"
    node = Node(versions, Path(CACHE), Models(form="serve"))

    def all_from(model: str) -> Any:
        return lambda seen: len(seen) > 50 and {s.model for s in seen[-50:]} == {model}

    with (
        served(Path(versions.location), prefix, num_replicas=2, poll_s=0.2) as address,
        load(address, f"{prefix}/v1/models/linear:predict", BODY) as clients,
    ):
        clients.until(all_from("linear/1"))
        log.set(stable=2)
        clients.until(all_from("linear/2"))
        spoil(versions, "linear", 3)
        release_unverified(log, 3)
        clients.until(lambda _: node.known("linear") is not None and node.known("linear").refusal is not None)
        clients.until(all_from("linear/2"))
        log.rollback()
        clients.until(all_from("linear/2"))
        log.set(stable=1, canary=Canary(2, 0.1))
        clients.until(all_from("linear/1"))
    assert failures(clients.seen) == []


def failures(seen: list[Seen]) -> list[Seen]:
    """Whatever is not the whole answer of the version that it names."""
    return [s for s in seen if s.status != 200 or s.body != ANSWERS.get(s.model)]


def test_a_repository_served_as_a_whole_gets_its_new_models(versions: ModelRepository, tmp_path: Path) -> None:
    with running(Path(versions.location), default_model="linear", poll_s=0.05) as app:
        assert app.request("POST", "/v1/models/other:predict", body=[BODY]).status == 404
        package_model(twice(tmp_path / "other.onnx"), name="other", repository=versions)
        until(lambda: app.request("POST", "/v1/models/other:predict", body=[BODY]).status == 200)
        ReleaseLog(versions, "linear").set(stable=2)
        until(lambda: app.request("POST", "/v1/models/linear:predict", body=[BODY]).body == ANSWERS["linear/2"])


def test_a_bad_model_keeps_no_other_from_being_served_unless_it_was_named(versions: ModelRepository, tmp_path: Path) -> None:
    package_model(twice(tmp_path / "bad.onnx"), name="bad", repository=versions)
    spoil(versions, "bad", 1)
    telemetry = RecordingTelemetry()
    with running(Path(versions.location), telemetry, default_model="linear", overrides={"bad": {"slots": 2}}) as app:
        assert app.request("POST", "/v1/models/linear:predict", body=[BODY]).status == 200
        ready = app.request("GET", "/v2/models/bad/ready")
        assert (ready.status, orjson.loads(ready.body)["ready"]) == (503, False)
        refused = app.request("POST", "/v1/models/bad:predict", body=[BODY])
        assert (refused.status, orjson.loads(refused.body)["code"]) == (503, "not_ready")
        assert "(digest_mismatch)" in orjson.loads(refused.body)["error"]
        assert app.request("GET", "/v2/health/ready").status == 200
    assert [(r.model, r.code) for r in telemetry.loads if r.code != "ok"] == [("bad", "digest_mismatch")]
    arguments = Arguments.of({**HERE, "repository": versions.location, "models": ["linear", "bad"]})
    with pytest.raises(DigestMismatch):
        host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE}), RecordingTelemetry())


def test_a_store_that_cannot_be_read_keeps_a_replica_from_starting(versions: ModelRepository, tmp_path: Path) -> None:
    """Serve tries again: one that began without a model would take the place of those that have it."""
    package_model(twice(tmp_path / "bad.onnx"), name="bad", repository=versions)
    ReleaseLog(versions, "bad").set(stable=1)
    (entry,) = (Path(versions.location) / "bad/releases").glob("*.json")
    entry.chmod(0o644)
    entry.write_bytes(entry.read_bytes()[:20])
    arguments = Arguments.of({**HERE, "repository": versions.location})
    with pytest.raises(StoreError, match="'bad' is damaged"):
        host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE}), RecordingTelemetry())


def test_a_second_model_leaves_the_first_half_of_the_places(versions: ModelRepository, tmp_path: Path) -> None:
    with running(Path(versions.location), default_model="linear", poll_s=0.05, max_ongoing_requests=8) as app:
        assert app.request("POST", "/v1/models/linear:predict", body=[BODY]).status == 200
        execute = app.app.surface.service.execute
        batcher = execute.batcher(app.app.surface.service.models.get("linear").predictor)
        assert batcher.max_requests == 8
        package_model(twice(tmp_path / "other.onnx"), name="other", repository=versions)
        until(lambda: app.request("POST", "/v1/models/other:predict", body=[BODY]).status == 200)
        assert batcher.max_requests == 4


def test_a_model_that_came_bad_is_served_once_it_can_be(versions: ModelRepository, tmp_path: Path) -> None:
    def bad(app: RunningApp) -> int:
        return app.request("GET", "/v2/models/bad/ready").status

    with running(Path(versions.location), default_model="linear", poll_s=0.05) as app:
        assert bad(app) == 404
        staged = testing.repository(tmp_path / "staged", {"bad": twice(tmp_path / "bad.onnx")})
        spoil(staged, "bad", 1)
        shutil.copytree(tmp_path / "staged/bad", Path(versions.location) / "bad")
        until(lambda: bad(app) == 503)
        package_model(twice(tmp_path / "good.onnx"), name="bad", repository=versions)
        ReleaseLog(versions, "bad").set(stable=2)
        until(lambda: bad(app) == 200)
        assert app.request("POST", "/v1/models/bad:predict", body=[BODY]).body == ANSWERS["linear/2"]


@pytest.mark.parametrize(
    ("models", "cache", "message"),
    [(["linear", "linear/1"], "cache", "'linear' is named twice"), ([], "file", "TRIFORM_CACHE: .*/file cannot be made")],
)
def test_a_start_that_cannot_be_meant_is_refused(
    versions: ModelRepository, tmp_path: Path, models: list[str], cache: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    arguments = Arguments.of({**HERE, "repository": versions.location, "models": models})
    with pytest.raises(ConfigurationError, match=message):
        host(arguments, arguments.settings({"TRIFORM_CACHE": str(tmp_path / cache)}), RecordingTelemetry())


def start_and_follow(location: str, cache: str, started: Any, released: Any) -> None:
    """A replica's process, as far as S3 is concerned."""
    arguments = Arguments.of({**HERE, "repository": location, "poll_s": 0.05})
    hosted = host(arguments, arguments.settings({"TRIFORM_CACHE": cache}), RecordingTelemetry())
    started.wait(60)
    released.wait(60)

    async def follow() -> None:
        hosted.live.start()
        deadline = time.monotonic() + 60
        while hosted.surface.service.models.versions("linear") != [2] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await hosted.drain()

    asyncio.run(follow())
    assert hosted.surface.service.models.versions("linear") == [2]


def test_a_node_downloads_each_version_once_however_many_replicas_it_has(
    s3_bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = open_repository(f"s3://{s3_bucket}/models", cache=tmp_path / "builder")
    for build in testing.linear, twice:
        package_model(build(tmp_path / "model.onnx"), name="linear", repository=repository)
    log = ReleaseLog(repository, "linear")
    log.set(stable=1)
    proxy.fail()
    proxy.seen.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    context = multiprocessing.get_context("spawn")
    started, released = context.Barrier(4), context.Barrier(4)
    arguments = (repository.location, str(tmp_path / "cache"), started, released)
    replicas = [context.Process(target=start_and_follow, args=arguments) for _ in range(3)]
    for replica in replicas:
        replica.start()
    started.wait(60)
    log.set(stable=2)
    released.wait(60)
    for replica in replicas:
        replica.join(90)
    assert [replica.exitcode for replica in replicas] == [0, 0, 0]
    fetched = [request for request in proxy.seen if request.startswith("GET") and "/blobs/" in request]
    assert len(fetched) == len(set(fetched)), "nothing came twice"
    models = [
        entry.sha256 for version in (1, 2) for entry in [repository.package("linear", version).manifest.files["model.onnx"]]
    ]
    assert all(any(digest in request for request in fetched) for digest in models)
