"""A canary that runs elsewhere: stable answers what it does not, users never pay for it, and it is counted all the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.canaries import USERS, Host, Released, answers, build, records
from triform import testing
from triform.canary import IN_A_ROW
from triform.errors import DeadlineExceeded, GoldenMismatch, NotReady, Overloaded, RunFailed, TriformError, Unavailable
from triform.http import HttpRequest, HttpSurface
from triform.models import Elsewhere, Models, Served
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog
from triform.rollout.windows import Arm
from triform.service import InferenceService, Ran, run_here
from triform.signature import Array
from triform.telemetry import observations
from triform.testing import RecordingTelemetry


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


class There:
    """An `Execute`: the canary's process, with its own session, or what becomes of a call of it."""

    def __init__(self, released: Released) -> None:
        self.error: Exception | None = None
        self.asked: list[str] = []
        self._released = released
        self._loaded: dict[str, Predictor] = {}

    async def __call__(self, served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if not served.elsewhere:
            return await run_here(served, inputs, deadline)
        manifest = served.manifest
        self.asked.append(manifest.ref)
        if self.error is not None:
            raise self.error
        if manifest.ref not in self._loaded:
            self._loaded[manifest.ref] = Predictor.load(self._released.repository.package(manifest.name, manifest.version))
        return Ran(self._loaded[manifest.ref].run(inputs, deadline=deadline), 1)


def host(released: Released, there: There) -> Host:
    telemetry = RecordingTelemetry()
    models = Models(form="serve", telemetry=telemetry)
    for name in released.repository.models():
        take(models, released, name)
    return Host(HttpSurface(InferenceService(models, there)), models, telemetry)


def take(models: Models, released: Released, name: str) -> None:
    release = released.log(name).current()
    assert release is not None
    stable, canary = (released.repository.package(name, version) for version in (1, 2))
    held = {1: Predictor.load(stable), 2: Elsewhere(canary.manifest, lambda: True)}
    models.replace(name, held, release.aliases(), release)


@pytest.fixture
def there(released: Released) -> There:
    return There(released)


@pytest.fixture
def here(released: Released, there: There) -> Host:
    return host(released, there)


def sides(here: Host, model: str) -> tuple[Arm, Arm]:
    collected = here.models.splits.collect(model)
    assert collected is not None
    return collected.window.stable, collected.window.canary


def counted(arm: Arm) -> tuple[int, int]:
    return arm.requests, arm.errors


def test_keys_mean_what_they_mean_in_process(here: Host, released: Released) -> None:
    versions = [released.split().choose(user.encode()) for user in USERS]
    for user, version in zip(USERS, versions, strict=True):
        answer = here.predict("scored", records([user]), x_user=user)
        assert answer.headers["x-triform-model"] == f"scored/{version}"
        assert orjson.loads(answer.body)["predictions"] == answers([user], [version])
    both = here.predict("scored", records(USERS))
    assert both.headers["x-triform-model"] == "scored/1, scored/2"
    assert orjson.loads(both.body)["predictions"] == answers(USERS, versions)
    stable, canary = sides(here, "scored")
    assert counted(stable) == (versions.count(1) + 1, 0)
    assert counted(canary) == (versions.count(2) + 1, 0)
    assert sum(canary.scores) == 2 * versions.count(2)


ERRORS: list[Exception] = [
    TriformError("a fault"),
    RunFailed("it raised"),
    DeadlineExceeded("too slow"),
    Overloaded("too much"),
    Unavailable("its process died"),
    GoldenMismatch("it was refused"),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_the_canary_fails_stable_answers_and_three_in_a_row_cut_it_off(
    here: Host, there: There, released: Released, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    there.error = error
    for key in released.keys_of(2, "lookup", wanted=IN_A_ROW + 2):
        answer = here.predict("lookup", [5], x_request_id=key)
        assert (answer.status, answer.headers["x-triform-model"]) == (200, "lookup/1")
        assert orjson.loads(answer.body)["predictions"] == [50.0]
    assert there.asked == ["lookup/2"] * IN_A_ROW
    assert here.refs() == [("lookup/1", "stable", "ok", 1)] * (IN_A_ROW + 2), "one record a request, of who answered it"
    code = error.code if isinstance(error, TriformError) else "internal"
    assert [r.instead_of for r in here.telemetry.records] == [(2, code)] * IN_A_ROW + [None] * 2
    failures = [labels for r in here.telemetry.records for metric, labels, _ in observations(r) if "failures" in metric.name]
    labels = {"model": "lookup", "version": "2", "variant": "canary", "form": "serve", "code": code}
    assert failures == [labels] * IN_A_ROW
    assert here.telemetry.splits[-1].cut
    lines = [r for r in caplog.records if r.name in ("triform.canary", "triform.splits") and r.levelno == logging.WARNING]
    assert len(lines) == IN_A_ROW + 1
    assert all(line.exc_info is not None and line.exc_info[1] is error for line in lines[:-1]), "the log knows why"
    stable, canary = sides(here, "lookup")
    assert (counted(stable), counted(canary)) == ((0, 0), (IN_A_ROW, IN_A_ROW)), "the gate counts them; cut off it has no more"


def test_an_answer_in_between_begins_the_count_anew(here: Host, released: Released) -> None:
    (key,) = released.keys_of(2, "lookup", wanted=1)
    for _ in range(3):
        assert [here.look_up(key, x) for x in [50] * (IN_A_ROW - 1) + [5]] == [200] * IN_A_ROW
    assert "lookup" in here.models.splits.live


def test_the_rows_of_a_canary_that_fails_are_stables_with_the_rest(here: Host, there: There, released: Released) -> None:
    there.error = Unavailable("its process died")
    answer = here.predict("scored", records(USERS))
    assert (answer.status, answer.headers["x-triform-model"]) == (200, "scored/1")
    assert orjson.loads(answer.body)["predictions"] == answers(USERS, [1] * len(USERS))
    assert here.refs() == [("scored/1", "stable", "ok", len(USERS))]
    oip = [{"name": "x", "shape": [len(USERS), 2], "datatype": "FP32", "data": [1] * (2 * len(USERS))}]
    oip.append({"name": "user", "shape": [len(USERS)], "datatype": "BYTES", "data": USERS})
    said = here.surface.handle(HttpRequest("POST", "/v2/models/scored/infer", (), orjson.dumps({"inputs": oip})))
    assert orjson.loads(said.body)["model_version"] == "1"


def test_what_neither_answers_is_the_callers_and_gets_stables_error(here: Host, released: Released) -> None:
    for key in released.keys_of(2, "lookup", wanted=2 * IN_A_ROW):
        answer = here.predict("lookup", [1000], x_request_id=key)
        assert (answer.status, answer.headers["x-triform-model"]) == (422, "lookup/1")
        assert here.predict("lookup", ["text"], x_request_id=key).status == 400
    assert "lookup" in here.models.splits.live
    assert {r.instead_of for r in here.telemetry.records} == {None}
    stable, canary = sides(here, "lookup")
    assert counted(stable) == (0, 0)
    assert counted(canary) == (4 * IN_A_ROW, 2 * IN_A_ROW), "as in process: a run that failed is an error, a refusal is none"


def test_a_canary_that_is_still_to_come_is_not_held_against_it(here: Host, there: There, released: Released) -> None:
    there.error = NotReady("still loading")
    for key in released.keys_of(2, "lookup", wanted=2 * IN_A_ROW):
        assert here.predict("lookup", [5], x_request_id=key).headers["x-triform-model"] == "lookup/1"
    there.error = None
    assert here.predict("lookup", [5], x_request_id=key).headers["x-triform-model"] == "lookup/2"
    assert {r.instead_of for r in here.telemetry.records} == {None}
    stable, canary = sides(here, "lookup")
    assert (counted(stable), counted(canary)) == ((0, 0), (1, 0))


def test_who_names_the_canary_gets_its_error(here: Host, there: There) -> None:
    there.error = Unavailable("its process died")
    for choice, headers in ("/labels/canary", {}), ("/versions/2", {}), ("", {"x_triform_version": "2"}):
        answer = here.predict("lookup", [5], choice, **headers)
        assert (answer.status, orjson.loads(answer.body)["code"]) == (503, "unavailable")
    assert here.models.splits.live["lookup"].failures == 0


def test_a_canary_that_takes_other_inputs_costs_nobody_his_answer(tmp_path: Path) -> None:
    """What its signature refuses and stable answers is its failure: callers send what stable takes."""
    repository = testing.repository(tmp_path / "models", {"m": testing.linear(tmp_path / "m.onnx", features=2)})
    package_model(testing.linear(tmp_path / "n.onnx", features=3), name="m", repository=repository)
    ReleaseLog(repository, "m").set(stable=1, canary=Canary(2, 1.0))
    released = Released(repository, tmp_path / "models")
    here = host(released, There(released))
    for _ in range(IN_A_ROW + 1):
        answer = here.predict("m", [[1, 2]])
        assert (answer.status, answer.headers["x-triform-model"]) == (200, "m/1")
    assert [r.instead_of for r in here.telemetry.records] == [(2, "invalid_input")] * IN_A_ROW + [None]


def test_a_caller_who_goes_away_while_the_canary_runs_is_no_failure(here: Host, there: There, released: Released) -> None:
    (key,) = released.keys_of(2, "lookup", wanted=1)

    async def go_away() -> None:
        began = asyncio.Event()

        async def hang(served: Served, inputs: Any, deadline: float | None) -> Ran:
            began.set()
            await asyncio.sleep(60)
            raise AssertionError("he has gone")

        surface = HttpSurface(InferenceService(here.models, hang))
        request = HttpRequest("POST", "/v1/models/lookup:predict", [("x-request-id", key)], b'{"instances": [5]}')
        asking = asyncio.ensure_future(surface.handle_async(request))
        await began.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(go_away())
    assert [r.code for r in here.telemetry.records] == ["cancelled"]
    assert here.models.splits.live["lookup"].failures == 0


def test_readiness_is_that_of_where_it_runs(released: Released) -> None:
    held: set[int] = set()
    models = Models(form="serve")
    package = released.repository.package("lookup", 2)
    stable = Predictor.load(released.repository.package("lookup", 1))
    canary = Elsewhere(package.manifest, lambda: 2 in held)
    models.replace("lookup", {1: stable, 2: canary}, {"stable": 1, "canary": 2})
    assert (models.states("lookup"), models.all_ready()) == ({1: True, 2: False}, True)
    held.add(2)
    assert models.states("lookup") == {1: True, 2: True}
    assert (models.predictors(), models.elsewhere()) == ([stable], [canary])
