"""A canary within the replicas of the Serve form: keys over gRPC, batches, health, and releases that arrive meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest

from ray_apps.health import Health
from ray_apps.messages import MESSAGES, SERVICE
from tests.canaries import USERS, Released, answers, build, records, take
from tests.gates import within
from tests.ray_apps.hosts import running, served
from tests.ray_apps.load import until
from tests.ray_apps.ports import SERVE_PORTS
from tests.ray_apps.test_grpc_alone import infer, serving
from triform.batched import Batched
from triform.canary import IN_A_ROW
from triform.errors import RunFailed
from triform.models import Models
from triform.predictor import Predictor
from triform.releases import Canary, Shadow
from triform.rollout.policy import Disagreement, Errors, Guards, Policy, Step
from triform.rollout.policy import Shadow as ShadowStep
from triform.rollout.windows import SHADOW, merge
from triform.rollout_log import RolloutLog
from triform.service import InferenceService
from triform.testing import RecordingTelemetry


@pytest.fixture
def released(tmp_path: Path) -> Released:
    return build(tmp_path)


@pytest.fixture
def telemetry() -> RecordingTelemetry:
    return RecordingTelemetry()


@pytest.fixture
def models(released: Released, telemetry: RecordingTelemetry) -> Models:
    models = Models(form="serve", telemetry=telemetry)
    for model in released.repository.models():
        take(models, released, model)
    return models


@pytest.fixture
def batched() -> Iterator[Batched]:
    with ThreadPoolExecutor(4) as threads:
        yield Batched(threads)


def scored(users: list[str], *, named: bool = True, **fields: Any) -> Any:
    """A request with a row for each user, whose tensor stands beside the column of the keys."""
    request = MESSAGES["ModelInferRequest"](model_name="scored", **fields)
    rows = records(users)
    request.inputs.add(name="x", datatype="FP32", shape=[len(rows), 2])
    request.raw_input_contents.append(struct.pack(f"<{2 * len(rows)}f", *(n for row in rows for n in (row["a"], row["b"]))))
    if named:
        request.inputs.add(name="user", datatype="BYTES", shape=[len(rows)])
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(user)) + user.encode() for user in users))
    return request


def rows_of(answer: Any) -> list[dict[str, float]]:
    """What it answers, as `answers` has it."""
    (raw,) = answer.raw_output_contents
    return [{"sum": pair[0], "label": pair[1]} for pair in struct.iter_unpack("<ff", raw)]


def test_over_grpc_keys_mean_the_versions_that_they_mean_everywhere(models: Models, batched: Batched, released: Released) -> None:
    split = released.split()
    versions = [split.choose(user.encode()) for user in USERS]

    async def test() -> None:
        async with serving(InferenceService(models, batched)) as channel:
            whole = await infer(channel, scored(USERS))
            assert (rows_of(whole), whole.model_version) == (answers(USERS, versions), "1,2")
            for user, version in zip(USERS, versions, strict=True):
                alone = await infer(channel, scored([user]))
                assert (rows_of(alone), alone.model_version) == (answers([user], [version]), str(version))
                by_id = await infer(channel, scored([user], named=False, id=user))
                assert by_id.model_version == str(version), "the request's id"

    within(test())


def test_over_grpc_the_header_is_metadata_and_a_version_is_obeyed(models: Models, batched: Batched, released: Released) -> None:
    async def asked(channel: grpc.aio.Channel, user: str, **fields: Any) -> str:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        answer = await call(scored(USERS, **fields), metadata=[("x-user", user)], wait_for_ready=True)
        return str(answer.model_version)

    async def test() -> None:
        async with serving(InferenceService(models, batched)) as channel:
            for version in 1, 2:
                (user,) = released.keys_of(version, wanted=1)
                assert await asked(channel, user) == str(version)
                assert await asked(channel, user, model_version=str(3 - version)) == str(3 - version)

    within(test())


def test_over_grpc_a_shadow_is_asked_what_stable_has_answered(released: Released, batched: Batched) -> None:
    log, models = released.log(), Models(form="serve")
    release = log.set(stable=1, shadow=Shadow(2, 1.0))
    loaded = {version: Predictor.load(released.repository.package("scored", version)) for version in (1, 2)}
    models.replace("scored", loaded, release.aliases(), release)
    seen = Counter[str]()

    async def test() -> None:
        async with serving(InferenceService(models, batched)) as channel:
            for user in USERS:
                answer = await infer(channel, scored([user, "somebody"]))
                assert (answer.model_version, rows_of(answer)) == ("1", answers([user, "somebody"], [1, 1]))
                assert (await infer(channel, scored([user], model_version="1"))).model_version == "1"
            while seen["canary"] < len(USERS):
                await asyncio.sleep(0.01)
                collected = models.splits.collect("scored", SHADOW)
                assert collected is not None
                window = collected.window
                seen.update(stable=window.stable.requests, canary=window.canary.requests, disagreed=window.shadowed.disagreed)

    within(test())
    assert seen == {"stable": len(USERS), "canary": len(USERS), "disagreed": 2 * len(USERS)}


def test_requests_that_fail_in_one_batch_count_each_by_itself(models: Models, batched: Batched, released: Released) -> None:
    """And those in it that are well are answered."""

    async def test() -> None:
        def lookup(key: str, number: int) -> Any:
            request = MESSAGES["ModelInferRequest"](model_name="lookup", id=key)
            request.inputs.add(name="x", datatype="INT64", shape=[1]).contents.int64_contents.append(number)
            return request

        async with serving(InferenceService(models, batched)) as channel:
            keys = released.keys_of(2, "lookup", wanted=8)
            together = [infer(channel, lookup(key, 50)) for key in keys]
            said = await asyncio.gather(*together, return_exceptions=True)
            failed = [error for error in said if isinstance(error, grpc.aio.AioRpcError)]
            assert {error.code() for error in failed} == {grpc.StatusCode.INVALID_ARGUMENT}
            assert len(failed) >= IN_A_ROW
            assert (await infer(channel, lookup(keys[0], 50))).model_version == "1"

    within(test())
    assert "lookup" not in models.splits.live


def test_a_dead_session_of_a_canary_costs_it_its_keys_and_not_the_replica(models: Models, telemetry: RecordingTelemetry) -> None:
    health = Health(models, seconds=30)
    models.get("lookup", alias="canary").predictor._session = None
    for _ in range(3):
        asyncio.run(health.check())
        health._next = 0.0  # now
    assert "lookup" not in models.splits.live
    assert [s.cut for s in telemetry.splits if s.model == "lookup"] == [False, True]
    models.get("scored").predictor._session = None
    with pytest.raises(RunFailed, match="scored/1 does not answer its golden row"):
        asyncio.run(Health(models, seconds=30).check())


def test_a_replica_follows_the_weight_and_a_new_revision_ends_the_cut(released: Released, telemetry: RecordingTelemetry) -> None:
    log = released.log("lookup")

    def weights() -> list[tuple[float, bool]]:
        return [(s.weight, s.cut) for s in telemetry.splits if s.model == "lookup"]

    with running(released.root, telemetry, default_model="scored", poll_s=0.05) as app:

        def ask(key: str, number: int) -> int:
            headers = [(b"x-request-id", key.encode())]
            return app.request("POST", "/v1/models/lookup:predict", headers, [b'{"instances": [%d]}' % number]).status

        assert [ask(key, 50) for key in released.keys_of(2, "lookup", wanted=IN_A_ROW + 1)] == [422] * IN_A_ROW + [200]
        assert weights() == [(0.5, False), (0.0, True)]
        log.set(canary=Canary(2, 0.75), reason="mended elsewhere")
        until(lambda: weights()[-1] == (0.75, False))
        keys = released.keys_of(2, "lookup", wanted=40)
        assert [ask(key, 5) for key in keys] == [200] * 40
        assert {r.variant for r in telemetry.records[-40:]} == {"canary"}
        log.rollback()
        until(lambda: weights()[-1] == (0.0, False))
        assert [ask(key, 50) for key in keys] == [200] * 40
        assert {r.variant for r in telemetry.records[-40:]} == {"stable"}


def test_a_reference_to_one_version_or_alias_shares_nothing(released: Released) -> None:
    for ref, version in ("scored@canary", 2), ("scored@stable", 1), ("scored/2", 2):
        with running(released.root, default_model="scored", models=[ref]) as app:
            for user in USERS:
                headers = [(b"x-user", user.encode())]
                answer = app.request("POST", "/v1/models/scored:predict", headers, [b'{"instances": [{"a": 1, "b": 2}]}'])
                assert answer.headers["x-triform-model"] == f"scored/{version}"


def test_on_ray_serve_a_key_is_answered_alike_over_http_and_grpc(ray_cluster: Any, released: Released) -> None:
    name = f"canary-{uuid.uuid4().hex[:8]}"
    split = released.split()
    versions = [split.choose(user.encode()) for user in USERS]
    with (
        served(released.root, f"/{name}", name, default_model="scored", num_replicas=2) as (host, port),
        grpc.insecure_channel(f"{host}:{SERVE_PORTS.grpc}") as channel,
    ):
        connection = http.client.HTTPConnection(host, port, timeout=60)

        def ask(headers: dict[str, str], users: list[str]) -> tuple[str | None, Any]:
            connection.request("POST", f"/{name}/v1/models/scored:predict", orjson.dumps({"instances": records(users)}), headers)
            answer = connection.getresponse()
            return answer.getheader("x-triform-model"), orjson.loads(answer.read())

        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        application = ("application", name)
        for user, version in zip(USERS, versions, strict=True):
            assert ask({"x-user": user}, ["somebody"])[0] == f"scored/{version}"
            assert call(scored(["somebody"]), metadata=[application, ("x-user", user)], timeout=60).model_version == str(version)
        whole = answers(USERS, versions)
        assert ask({}, USERS) == ("scored/1, scored/2", {"predictions": whole})
        both = call(scored(USERS), metadata=[application], timeout=60)
        assert (both.model_version, rows_of(both)) == ("1,2", whole)
        connection.close()


def test_on_ray_serve_a_shadow_that_agrees_becomes_a_canary(ray_cluster: Any, released: Released) -> None:
    """Asked over HTTP and gRPC what stable has answered: the first step of a rollout."""
    name = f"shadow-{uuid.uuid4().hex[:8]}"
    released.log("lookup").rollback()
    policy = Policy(
        shadow=ShadowStep(sample=1.0, min_requests=50, min_seconds=1),
        steps=(Step(weight=0.5),),
        guards=Guards(errors=Errors(increase=0.3), latency=None, disagreement=Disagreement(limit=0.3)),
    )
    rollouts = RolloutLog(released.repository, "lookup")
    rollout = rollouts.start(policy, 2)
    request = MESSAGES["ModelInferRequest"](model_name="lookup")
    request.inputs.add(name="x", datatype="INT64", shape=[2]).contents.int64_contents.extend([3, 4])
    with (
        served(released.root, f"/{name}", name, default_model="lookup", rollout_window_s=0.5, poll_s=0.2) as (host, port),
        grpc.insecure_channel(f"{host}:{SERVE_PORTS.grpc}") as channel,
    ):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )

        def goes_on() -> bool:
            for _ in range(10):
                connection.request("POST", f"/{name}/v1/models/lookup:predict", b'{"instances": [5]}')
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, b'{"predictions":[50.0]}')
                assert call(request, metadata=[("application", name)], timeout=60).outputs[0].shape == [2]
            return rollouts.follow(rollout).state.step >= 0

        until(goes_on, 60.0)
        connection.close()
    seen = merge([window for window in rollout.windows if window.step == SHADOW])
    assert (seen.canary.errors, seen.shadowed.disagreed) == (0, 0)
    assert seen.shadowed.requests == seen.canary.requests >= 50
    assert seen.shadowed.rows > seen.shadowed.requests, "those over gRPC have two"
    now = released.log("lookup").current()
    assert now is not None
    assert (now.shadow, now.canary) == (None, Canary(2, 0.5))
