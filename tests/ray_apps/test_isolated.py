"""Canaries in a deployment of their own, on Ray Serve: what users see while they fail, hang, die, come and become stable."""

from __future__ import annotations

import http.client
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import orjson
import psutil
import pytest
from ray import serve

from ray_apps.messages import MESSAGES, SERVICE
from tests.canaries import USERS, Released, answers, build, records
from tests.ray_apps.hosts import served
from tests.ray_apps.load import load, until
from tests.ray_apps.ports import SERVE_PORTS
from tests.ray_apps.test_canary import rows_of, scored
from triform import testing
from triform.canary import IN_A_ROW
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog

WIDE = 256  # columns of `wide`
BINARY = {"inference-header-content-length": "0"}
SMALL, LARGE = bytes(4 * WIDE), bytes(4 * WIDE * 6000)  # one row, and 6 MB


class Application(NamedTuple):
    """`released`, and `wide`, whose canary has all keys."""

    released: Released
    name: str
    address: tuple[str, int]

    def ask(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            content = body if isinstance(body, bytes) else orjson.dumps({"instances": body})
            connection.request("POST", f"/{self.name}{path}", content, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheader("x-triform-model", ""), answer.read()
        finally:
            connection.close()

    def predict(self, model: str, rows: list[Any], headers: dict[str, str] | None = None) -> tuple[int, str, Any]:
        status, by, body = self.ask(f"/v1/models/{model}:predict", rows, headers)
        return status, by, orjson.loads(body)

    def wide(self, body: bytes = SMALL) -> tuple[int, str]:
        status, by, said = self.ask("/v2/models/wide/infer", body, BINARY)
        assert len(said) > len(body), said[:1000]
        return status, by

    def until_wide_is(self, ref: str) -> None:
        """Whoever answers meanwhile, everybody is answered."""

        def answered() -> bool:
            status, by = self.wide()
            assert status == 200
            return by == ref

        until(answered)

    def release_wide_anew(self) -> None:
        """Its canary gets its keys back."""
        ReleaseLog(self.released.repository, "wide").set(canary=Canary(2, 1.0))

    def canary(self) -> psutil.Process | None:
        """The one process of the canary's deployment, if it is there."""
        for process in psutil.Process().children(recursive=True):
            try:
                if f"ServeReplica:{self.name}:canary" in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    @contextmanager
    def hanging(self) -> Iterator[psutil.Process]:
        """The canary's process stands still meanwhile, as one that is slow beyond all limits."""
        process = self.canary()
        assert process is not None
        process.suspend()
        try:
            yield process
        finally:
            if process.is_running():
                process.resume()


@pytest.fixture(scope="module")
def application(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """Each model's canary is cut off by what a test does to it, so each test has its own, or releases it anew."""
    folder = tmp_path_factory.mktemp("isolated")
    released, name = build(folder), f"isolated-{uuid.uuid4().hex[:8]}"
    for layers in 1, 2:
        package_model(
            testing.slow(folder / f"{layers}.onnx", layers=layers, width=WIDE), name="wide", repository=released.repository
        )
    ReleaseLog(released.repository, "wide").set(stable=1, canary=Canary(2, 1.0))
    options = {"poll_s": 0.2, "timeout_s": 20, "health_period_s": 0.5, "canary": {"timeout_s": 1.5}}
    with served(released.root, f"/{name}", name, default_model="scored", **options) as address:
        made = Application(released, name, address)
        made.until_wide_is("wide/2")
        yield made


def loaded(replica: Any) -> list[str]:
    """Run inside a replica that answers callers."""
    predictors = replica._replica_impl._user_callable_wrapper._callable.surface.service.models.predictors()
    return sorted(predictor.manifest.ref for predictor in predictors)


def loaded_in(ray_cluster: Any, application: Application, deployment: str = "predict") -> list[str]:
    actors = ray_cluster.util.list_named_actors(all_namespaces=True)
    (replica,) = [a["name"] for a in actors if f"{application.name}#{deployment}#" in a["name"]]
    said: list[str] = ray_cluster.get(ray_cluster.get_actor(replica, namespace="serve").__ray_call__.remote(loaded), timeout=60)
    return said


def test_keys_mean_what_they_mean_in_process_over_http_and_grpc(application: Application, ray_cluster: Any) -> None:
    assert loaded_in(ray_cluster, application) == ["lookup/1", "scored/1", "wide/1"], "no canary"
    split = application.released.split()
    versions = [split.choose(user.encode()) for user in USERS]
    (canarys,) = application.released.keys_of(2, wanted=1)
    until(lambda: application.predict("scored", records([canarys]), {"x-user": canarys})[1] == "scored/2")
    with grpc.insecure_channel(f"{application.address[0]}:{SERVE_PORTS.grpc}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        to = ("application", application.name)
        for user, version in zip(USERS, versions, strict=True):
            status, by, said = application.predict("scored", records(["somebody"]), {"x-user": user})
            assert (status, by) == (200, f"scored/{version}")
            assert said["predictions"] == answers(["somebody"], [version])
            assert call(scored(["somebody"]), metadata=[to, ("x-user", user)], timeout=60).model_version == str(version)
        whole = answers(USERS, versions)
        assert application.predict("scored", records(USERS)) == (200, "scored/1, scored/2", {"predictions": whole})
        both = call(scored(USERS), metadata=[to], timeout=60)
        assert (both.model_version, rows_of(both)) == ("1,2", whole)


def test_a_canary_that_raises_is_answered_for_and_cut_off(application: Application) -> None:
    keys = application.released.keys_of(2, "lookup", wanted=IN_A_ROW + 2)
    until(lambda: application.predict("lookup", [5], {"x-request-id": keys[0]})[1] == "lookup/2")
    for key in keys:
        assert application.predict("lookup", [50], {"x-request-id": key}) == (200, "lookup/1", {"predictions": [500.0]})
    assert application.predict("lookup", [5], {"x-request-id": keys[0]})[1] == "lookup/1"
    status, by, said = application.ask("/v1/models/lookup/labels/canary:predict", [50])
    assert (status, by, orjson.loads(said)["code"]) == (422, "lookup/2", "run_failed"), "who names it gets its error"


def test_a_body_beyond_grpcs_usual_limit_gets_there_and_back(application: Application) -> None:
    assert application.wide(LARGE) == (200, "wide/2")


def test_a_canary_that_hangs_is_answered_for_and_cut_off(application: Application) -> None:
    with application.hanging(), ThreadPoolExecutor(IN_A_ROW) as users:
        asked = [users.submit(application.wide) for _ in range(IN_A_ROW)]
        assert [future.result() for future in asked] == [(200, "wide/1")] * IN_A_ROW
    assert application.wide() == (200, "wide/1"), "it is cut off until it is released again"
    until(lambda: application.ask("/v2/models/wide/versions/2/infer", SMALL, BINARY)[0] == 200)
    application.release_wide_anew()
    application.until_wide_is("wide/2")


def test_a_canary_that_dies_with_requests_in_flight_costs_none_of_them(application: Application) -> None:
    with application.hanging() as process, ThreadPoolExecutor(8) as users:
        asked = [users.submit(application.wide) for _ in range(8)]
        until(lambda: sum(future.running() for future in asked) == 8)
        os.kill(process.pid, signal.SIGKILL)
        assert [future.result() for future in asked] == [(200, "wide/1")] * 8
    assert application.wide() == (200, "wide/1")
    until(lambda: application.ask("/v2/models/wide/versions/2/infer", SMALL, BINARY)[0] == 200)
    assert application.canary() != process, "Serve has started another"
    application.release_wide_anew()
    application.until_wide_is("wide/2")


def test_a_canary_becomes_stable_under_load_and_fails_nobody(application: Application, ray_cluster: Any) -> None:
    log, path = application.released.log(), f"/{application.name}/v1/models/scored:predict"
    (key,) = application.released.keys_of(2, wanted=1)
    body = orjson.dumps({"instances": records(["somebody"])})

    def all_from(ref: str) -> Any:
        return lambda seen: len(seen) > 50 and {s.model for s in seen[-50:]} == {ref}

    with load(application.address, path, body, headers={"x-user": key}) as clients:
        clients.until(all_from("scored/2"))
        log.set(stable=2)
        until(lambda: "scored/2" in loaded_in(ray_cluster, application))
        clients.until(all_from("scored/2"))
        log.set(stable=1, canary=Canary(2, 0.5))
        until(lambda: "scored/2" not in loaded_in(ray_cluster, application))
        log.rollback()
        clients.until(all_from("scored/1"))
    said = {f"scored/{v}": orjson.dumps({"predictions": answers(["somebody"], [v])}) for v in (1, 2)}
    assert [s for s in clients.seen if s.status != 200 or s.body != said.get(s.model)] == []


@pytest.mark.slow  # replicas come and go, and Serve looks back twelve seconds
def test_the_canarys_deployment_goes_down_to_none_and_comes_back_with_a_canary(ray_cluster: Any, tmp_path: Path) -> None:
    released, name = build(tmp_path), f"scaled-{uuid.uuid4().hex[:8]}"
    log = released.log("lookup")
    for model in "lookup", "scored":
        released.log(model).rollback()

    def replicas() -> int:
        deployment = serve.status().applications[name].deployments["canary"]
        return int(deployment.replica_states.get("RUNNING", 0))

    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1, "to_zero_delay_s": 1}
    options = {"models": ["lookup"], "poll_s": 0.2, "canary": {"timeout_s": 5, "autoscaling": scaling}}
    with served(released.root, f"/{name}", name, default_model="lookup", **options) as address:
        application = Application(released, name, address)
        until(lambda: replicas() == 0)
        log.set(canary=Canary(2, 1.0))
        seen: list[tuple[int, str]] = []

        def answered_by_the_canary() -> bool:
            seen.append(application.predict("lookup", [5])[:2])
            return seen[-1][1] == "lookup/2"

        until(answered_by_the_canary)
        assert {status for status, _ in seen} == {200}
        assert seen[0] == (200, "lookup/1"), "nobody waits for a replica to start"
        time.sleep(15)  # for as long as Serve looks back
        assert replicas() == 1, "one stays while there is a canary, whether anybody asks for it or not"
        log.rollback()
        until(lambda: replicas() == 0)
