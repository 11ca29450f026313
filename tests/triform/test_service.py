"""The models a host serves, and the record that each request leaves: one, whatever becomes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.models import surface
from triform.errors import AliasNotFound, DeadlineExceeded, InvalidRequest, ModelNotFound, VersionNotFound
from triform.http import HttpRequest, HttpSurface, Limits
from triform.models import Models, Served
from triform.predictor import Predictor
from triform.protocols.bodies import Call, Encoded
from triform.repository import ModelRepository, open_repository
from triform.service import InferenceService, Ran, run_here
from triform.signature import Array
from triform.telemetry import InferenceRecord, LoadRecord
from triform.testing import RecordingTelemetry

GOOD = b'{"instances": [[1, 2, 3], [4, 5, 6]]}'


@pytest.fixture
def opened(three_versions: Path) -> ModelRepository:
    return open_repository(three_versions)


def loader(repository: ModelRepository, version: int = 1) -> Callable[[], Predictor]:
    return lambda: Predictor.load(repository.package("linear", version))


def test_an_answered_request_leaves_one_record(online_models: Path) -> None:
    telemetry = RecordingTelemetry()
    surface(online_models, telemetry=telemetry).handle(
        HttpRequest("POST", "/v1/models/linear:predict", (), GOOD), request_id="r-1"
    )
    (record,) = telemetry.records
    assert (record.form, record.model, record.version, record.variant) == ("serve", "linear", 1, "stable")
    assert (record.code, record.rows, record.batch_rows, record.request_id) == ("ok", 2, 2, "r-1")
    assert set(record.stages) == {"decode", "execute", "encode"}
    assert 0 < sum(record.stages.values()) <= record.seconds


@pytest.mark.parametrize(
    ("path", "headers", "body", "code", "model"),
    [
        ("/v1/models/linear:predict", (), b"{", "invalid_request", "linear"),
        ("/v1/models/linear:predict", (), b'{"instances": [[1]]}', "invalid_input", "linear"),
        ("/v1/models/linear:predict", (("content-type", "text/csv"),), GOOD, "unsupported_media_type", "linear"),
        ("/v1/models/linear:predict", (("content-encoding", "gzip"),), GOOD, "invalid_request", "linear"),
        ("/v1/models/linear:predict", (), GOOD.ljust(201), "payload_too_large", "linear"),
        ("/v1/models/linear:predict", (), b'{"instances":[%s]}' % b",".join([b"[1,1,1]"] * 20), "answer_too_large", "linear"),
        ("/v1/models/lookup:predict", (), b'{"instances": [99]}', "run_failed", "lookup"),
        ("/v1/models/nobody:predict", (), GOOD, "model_not_found", "unknown"),
        ("/v2/models/linear/versions/9/infer", (), GOOD, "version_not_found", "unknown"),
        ("/v1/models/linear/labels/x:predict", (), GOOD, "alias_not_found", "unknown"),
        ("/invocations", (("accept", "image/png"),), GOOD, "not_acceptable", "linear"),
    ],
)
def test_a_refused_request_leaves_one_record_too(
    online_models: Path, path: str, headers: tuple[tuple[str, str], ...], body: bytes, code: str, model: str
) -> None:
    telemetry = RecordingTelemetry()
    to = surface(online_models, telemetry=telemetry, limits=Limits(request=200, unpacked=400, response=100))
    to.handle(HttpRequest("POST", path, headers, body))
    assert [(r.code, r.model, r.rows) for r in telemetry.records] == [(code, model, 0)]


def test_a_fault_of_ours_leaves_one_record_too() -> None:
    telemetry = RecordingTelemetry()
    service = InferenceService(Models(form="lambda", telemetry=telemetry))
    for fault in RuntimeError, KeyboardInterrupt:
        with pytest.raises(fault), service.exchange("r"):
            raise fault
    assert [(r.code, r.form) for r in telemetry.records] == [("internal", "lambda"), ("cancelled", "lambda")]


def test_what_asks_for_no_inference_leaves_none(online_models: Path) -> None:
    telemetry = RecordingTelemetry()
    to = surface(online_models, telemetry=telemetry)
    for path in (
        "/v2",
        "/v2/health/ready",
        "/v2/models/linear",
        "/v2/models/nobody",
        "/v1/models/linear",
        "/ping",
        "/openapi.json",
    ):
        for method in "GET", "HEAD":
            to.handle(HttpRequest(method, path))
    assert telemetry.records == []


def test_versions_and_aliases(opened: ModelRepository) -> None:
    models = Models(form="serve")
    models.add("linear", 1, loader(opened, 1))
    models.add("linear", 2, loader(opened, 2), aliases=("canary",))
    assert models.get("linear").manifest.version == 1
    assert models.get("linear", version=2).variant == "canary"
    assert models.get("linear", alias="canary").manifest.version == 2
    assert models.states("linear", alias="canary") == {2: True}
    assert models.states("linear") == {1: True, 2: True}
    assert models.versions("linear") == [1, 2]
    models.add("linear", 3, loader(opened, 3))
    assert models.get("linear").manifest.version == 3, "stable moved"
    with pytest.raises(VersionNotFound, match="no version 9"):
        models.get("linear", version=9)
    with pytest.raises(AliasNotFound, match="no alias 'shadow'"):
        models.get("linear", alias="shadow")
    with pytest.raises(ModelNotFound, match="there is: linear"):
        models.get("nobody")


def test_a_models_versions_are_replaced_all_at_once(opened: ModelRepository) -> None:
    telemetry = RecordingTelemetry()
    models = Models(form="serve", telemetry=telemetry)
    one, two, three = (loader(opened, version)() for version in (1, 2, 3))
    models.replace("linear", {1: one, 2: two}, {"stable": 1, "canary": 2})
    before = models.get("linear", version=2)
    models.replace("linear", {2: two, 3: three}, {"stable": 2, "shadow": 3})
    assert (models.versions("linear"), models.get("linear").variant, before.variant) == ([2, 3], "stable", "canary")
    assert models.get("linear").predictor is two
    assert models.predictors() == [two, three]
    with pytest.raises(VersionNotFound):
        models.get("linear", version=1)
    telemetry.loads.clear()
    models.replace("linear", {2: two, 3: three}, {"stable": 2, "shadow": 3})
    assert telemetry.loads == [], "nothing came or went"


def test_no_request_waits_while_a_version_is_told_of(opened: ModelRepository) -> None:
    """Telling may take its time, and a new version is served only then."""

    class Asking(RecordingTelemetry):
        def loaded(self, load: LoadRecord) -> None:
            super().loaded(load)
            if models.names():
                answers.append(pool.submit(models.get, "linear").result(10).predictor)

    answers: list[Predictor] = []
    telemetry = Asking()
    models = Models(form="serve", telemetry=telemetry)
    one, again, two = loader(opened)(), loader(opened)(), loader(opened, 2)()
    with ThreadPoolExecutor(1) as pool:
        models.replace("linear", {1: one}, {"stable": 1})
        models.replace("linear", {1: again}, {"stable": 1})
        models.replace("linear", {2: two}, {"stable": 2})
    assert answers == [one, again, two]
    assert [(load.version, load.code) for load in telemetry.loads] == [(1, "ok"), (1, "ok"), (2, "ok"), (1, "freed")]


class Restless(Models):
    """Each look at a model's versions is followed by a release: 1, then 2, then 1 again."""

    def _versions(self, model: str) -> Any:
        found = super()._versions(model)
        ((version, slot),) = found.slots.items()
        other = 3 - version
        self.replace(model, {other: slot.get().predictor}, {"stable": other})
        return found


@pytest.mark.parametrize("path", ["/v1/models/linear", "/v1/models/linear/labels/stable"])
def test_the_status_of_versions_is_that_of_one_moment(opened: ModelRepository, path: str) -> None:
    models = Restless(form="serve")
    models.replace("linear", {1: loader(opened)()}, {"stable": 1})
    answer = HttpSurface(InferenceService(models)).handle(HttpRequest("GET", path))
    assert (answer.status, answer.body.count(b'"AVAILABLE"')) == (200, 1)


def test_without_a_stable_alias_the_highest_version_answers(opened: ModelRepository) -> None:
    models = Models(form="serve")
    models.add("linear", 2, loader(opened, 2), aliases=())
    models.add("linear", 1, loader(opened, 1), aliases=())
    assert models.get("linear").manifest.version == 2


def test_the_default_model(opened: ModelRepository) -> None:
    models = Models(form="serve")
    with pytest.raises(InvalidRequest, match="models here: none"):
        models.the_default()
    models.add("linear", 1, loader(opened))
    assert models.the_default() == "linear"
    models.add("other", 1, loader(opened))
    with pytest.raises(InvalidRequest, match="linear, other"):
        models.the_default()
    models.default = "other"
    assert models.the_default() == "other"


def test_a_model_is_loaded_once_by_all_who_want_it_first(opened: ModelRepository) -> None:
    telemetry, loads = RecordingTelemetry(), []
    everybody = threading.Barrier(8)

    def load() -> Predictor:
        loads.append(1)
        return loader(opened)()

    models = Models(form="serve", telemetry=telemetry)
    models.add("linear", 1, load, now=False)
    assert (loads, telemetry.loads, models.is_ready("linear")) == ([], [], True)

    def get(_: int) -> Predictor:
        everybody.wait(30)
        return models.get("linear").predictor

    with ThreadPoolExecutor(8) as pool:
        assert len({id(p) for p in pool.map(get, range(8))}) == 1
    assert len(loads) == 1
    assert [(load.model, load.version, load.variant) for load in telemetry.loads] == [("linear", 1, "stable")]


def test_a_version_may_be_added_while_requests_are_answered(opened: ModelRepository) -> None:
    models = Models(form="serve")
    models.add("linear", 1, loader(opened))
    done = threading.Event()

    def read() -> int:
        seen = 0
        while not done.is_set():
            seen += len(models.names()) + models.get("linear").manifest.version
            models.all_ready()
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        predictor = models.get("linear").predictor
        for i in range(300):
            models.add(f"m{i}", 1, lambda: predictor)
        done.set()
        assert all(reader.result(30) > 0 for reader in readers)


@pytest.mark.parametrize("late", ["decode", "execute", "encode", None])
def test_no_stage_is_begun_after_the_deadline_and_no_answer_sent(opened: ModelRepository, late: str | None) -> None:
    """Time runs out in a stage, which ends all the same; then the caller is told."""
    telemetry, begun = RecordingTelemetry(), []
    models = Models(form="lambda", telemetry=telemetry)
    models.add("linear", 1, loader(opened))

    def begin(stage: str) -> None:
        begun.append(stage)
        if stage == late:
            exchange.deadline = time.monotonic()

    async def execute(served: Served, inputs: Mapping[str, Array], _: float | None) -> Ran:
        begin("execute")
        return await run_here(served, inputs, None)

    def encode(outputs: Mapping[str, Array]) -> Encoded:
        begin("encode")
        return Encoded(outputs["y"].tobytes())

    def decode() -> Call:
        begin("decode")
        return Call({"x": np.ones((1, 3), np.float32)}, encode)

    surface = HttpSurface(InferenceService(models, execute))
    with suppress(DeadlineExceeded), surface.service.exchange("r", deadline=time.monotonic() + 3600) as exchange:
        exchange.choose("linear")
        assert asyncio.run(surface.answer(exchange, decode)).body == np.float32(6).tobytes()
        assert late is None
    stages = ["decode", "execute", "encode"]
    assert begun == (stages if late is None else stages[: stages.index(late) + 1])
    assert [r.code for r in telemetry.records] == ["ok" if late is None else "deadline_exceeded"]


def test_nothing_is_read_after_the_deadline(online_models: Path) -> None:
    telemetry = RecordingTelemetry()
    to = surface(online_models, telemetry=telemetry)
    answer = to.handle(HttpRequest("POST", "/v1/models/linear:predict", (), b"{"), deadline=time.monotonic())
    assert answer.status == 504
    assert [(r.code, r.model, dict(r.stages)) for r in telemetry.records] == [("deadline_exceeded", "linear", {})]


def test_an_exchange_by_hand(opened: ModelRepository) -> None:
    """How a host that is not HTTP uses it: SQS, gRPC."""
    telemetry = RecordingTelemetry()
    models = Models(form="lambda", telemetry=telemetry)
    models.add("linear", 1, loader(opened))
    with InferenceService(models).exchange("message-1") as exchange:
        exchange.choose(None)
        outputs = asyncio.run(exchange.infer({"x": np.ones((4, 3), np.float32)}))
    assert outputs["y"].tolist() == [[6.0]] * 4
    (record,) = telemetry.records
    assert isinstance(record, InferenceRecord)
    assert (record.rows, record.code, record.request_id) == (4, "ok", "message-1")
