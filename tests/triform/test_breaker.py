"""When a canary's share is cut to 0: what counts as its failure, and what does not."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.calls import calls_of
from tests.canaries import USERS, Host, Released, answers, build, host, records, take
from triform import testing
from triform.canary import IN_A_ROW
from triform.errors import DeadlineExceeded, DigestMismatch, TriformError
from triform.http import HttpRequest, HttpResponse, HttpSurface
from triform.models import Models, Served
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog
from triform.repository import open_repository
from triform.service import InferenceService, Ran, run_here
from triform.signature import Array
from triform.splitting import KeyRule
from triform.testing import RecordingTelemetry


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


@pytest.fixture
def here(released: Released) -> Host:
    return host(released)


def test_the_canary_is_cut_off_by_failures_in_a_row_that_stable_does_not_share(
    here: Host, released: Released, caplog: pytest.LogCaptureFixture
) -> None:
    keys = released.keys_of(2, "lookup", wanted=IN_A_ROW)
    assert [here.look_up(key, 50) for key in keys] == [422] * IN_A_ROW, "who has failed is told so"
    assert [here.look_up(key, 50) for key in keys] == [200] * IN_A_ROW
    assert {r.variant for r in here.telemetry.records[IN_A_ROW:]} == {"stable"}
    assert here.predict("lookup", [5], "/labels/canary").headers["x-triform-model"] == "lookup/2", "who names it still gets it"
    (line,) = [r for r in caplog.records if r.name == "triform.splits"]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        f"the canary lookup/2 gets no more keys here: it has failed {IN_A_ROW} requests in a row that stable could answer, "
        "the last with run_failed"
    )
    cut = here.telemetry.splits[-1]
    assert (cut.model, cut.stable, cut.canary, cut.weight, cut.cut) == ("lookup", 1, 2, 0.0, True)
    assert here.predict("scored", records(USERS)).headers["x-triform-model"] == "scored/1, scored/2", "other models go on"


def test_an_answer_in_between_begins_the_count_anew(here: Host, released: Released) -> None:
    (key,) = released.keys_of(2, "lookup", wanted=1)
    for _ in range(3):
        assert [here.look_up(key, x) for x in [50] * (IN_A_ROW - 1) + [5]] == [422] * (IN_A_ROW - 1) + [200]
    assert "lookup" in here.models.splits.live


BAD: list[tuple[list[Any], int]] = [
    ([1000], 422),  # stable cannot either
    ([50, 1000], 422),
    (["text"], 400),
    ([2**63], 400),
    ([[1, 2], [3]], 400),
    ([None], 400),
]


@pytest.mark.parametrize(("rows", "status"), BAD)
def test_what_stable_would_refuse_too_is_no_failure_of_the_canary(
    here: Host, released: Released, rows: list[Any], status: int
) -> None:
    for key in released.keys_of(2, "lookup", wanted=2 * IN_A_ROW):
        assert here.predict("lookup", rows, x_request_id=key).status == status
    assert {r.variant for r in here.telemetry.records} == {"canary"}
    assert "lookup" in here.models.splits.live
    assert here.models.splits.live["lookup"].failures == 0


def test_invalid_input_is_not_asked_of_stable(here: Host, released: Released) -> None:
    """Or callers could make a host work twice for nothing."""
    (key,) = released.keys_of(2, "lookup", wanted=1)
    validate = type(here.models.get("lookup").signature).validate
    assert calls_of(validate, lambda: here.predict("lookup", [50], x_request_id=key)) == 2
    assert calls_of(validate, lambda: here.predict("lookup", ["text"], x_request_id=key)) == 1


def test_a_new_revision_gives_the_canary_its_share_again(here: Host, released: Released) -> None:
    def fails() -> list[int]:
        return [here.look_up(key, 50) for key in released.keys_of(2, "lookup", wanted=IN_A_ROW + 1)]

    assert fails() == [422] * IN_A_ROW + [200]
    released.log("lookup").set(canary=Canary(2, 0.5), reason="once more")
    take(here.models, released, "lookup")
    assert fails() == [422] * IN_A_ROW + [200]
    assert [(s.weight, s.cut) for s in here.telemetry.splits if s.model == "lookup"] == [(0.5, False), (0.0, True)] * 2


def test_the_canarys_end_is_told(released: Released) -> None:
    here = host(released)
    log = ReleaseLog(released.repository, "scored")
    log.set(stable=2)
    try:
        take(here.models, released, "scored")
        assert here.predict("scored", records(USERS)).headers["x-triform-model"] == "scored/2"
        last = here.telemetry.splits[-1]
        assert (last.stable, last.canary, last.weight, last.cut) == (2, 2, 0.0, False)
    finally:
        log.set(stable=1, canary=Canary(2, 0.5))


class Faulty:
    """Runs models; those of some versions end with `error`."""

    def __init__(self, error: Exception, versions: tuple[int, ...] = (2,)) -> None:
        self.error = error
        self.versions = versions
        self.asked: list[int] = []

    async def __call__(self, served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        self.asked.append(served.manifest.version)
        if served.manifest.version in self.versions:
            raise self.error
        return await run_here(served, inputs, deadline)


@pytest.mark.parametrize(
    ("error", "asked"),
    [(DeadlineExceeded("too late"), []), (TriformError("a fault"), [1]), (ZeroDivisionError(), [1]), (MemoryError(), [1])],
    ids=lambda value: type(value).__name__,
)
def test_every_way_to_fail_counts(released: Released, error: Exception, asked: list[int]) -> None:
    """Where time is up stable is not asked: it would have none. That it has answered others meanwhile is enough."""
    execute = Faulty(error)
    here = host(released, execute)
    for key, others in zip(*(released.keys_of(version, "lookup", wanted=IN_A_ROW) for version in (2, 1)), strict=True):
        assert here.look_up(others, 5) == 200
        assert here.look_up(key, 5) >= 500
    assert execute.asked == [1, 2, *asked] * IN_A_ROW
    assert "lookup" not in here.models.splits.live
    seen = Counter(r.variant for r in here.telemetry.records)
    assert seen == {"canary": IN_A_ROW, "stable": IN_A_ROW}, "that stable was asked is no request"


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_canary_that_runs_out_of_time_is_cut_off_whatever_the_keys(released: Released, weight: float) -> None:
    """Keys in a column; and where none is stable's, which could answer nobody meanwhile."""
    log = released.log()
    log.set(canary=Canary(2, weight, KeyRule(column="user")))
    try:
        here = host(released, Faulty(DeadlineExceeded("too late")))
        versions = {user: released.split().choose(user.encode()) for user in USERS}
        its = [user for user, version in versions.items() if version == 2]
        for user in its[:IN_A_ROW]:
            assert "scored" in here.models.splits.live
            for other in [user for user, version in versions.items() if version == 1][:1]:
                assert here.predict("scored", records([other])).status == 200
            assert here.predict("scored", records([user])).status == 504
        assert "scored" not in here.models.splits.live
    finally:
        log.rollback()
        log.set(canary=Canary(2, 0.5))


def test_what_holds_both_up_is_no_fault_of_the_canary(released: Released) -> None:
    here = host(released, Faulty(DeadlineExceeded("the node stands still"), (1, 2)))
    for key, others in zip(*(released.keys_of(version, "lookup", wanted=3 * IN_A_ROW) for version in (2, 1)), strict=True):
        assert [here.look_up(others, 5), here.look_up(key, 5)] == [504, 504]
    assert "lookup" in here.models.splits.live
    window = here.models.splits.collect("lookup")
    assert window is not None
    assert window.window.canary.errors == window.window.stable.errors == 3 * IN_A_ROW, "it counts, on either side"


def test_a_canary_that_refuses_what_stable_takes_has_failed_it(tmp_path: Path) -> None:
    """Version 2 wants a column more: nobody who does not send it yet is answered by it."""
    repository = open_repository(tmp_path / "models")
    for version, columns in (1, ["a", "b"]), (2, ["a", "b", "c"]):
        toml = tmp_path / f"{version}.toml"
        toml.write_text(f"[inputs.x]\ncolumns = {columns}\n")
        model = testing.linear(tmp_path / f"{version}.onnx", features=len(columns))
        package_model(model, name="wider", repository=repository, config=toml)
    ReleaseLog(repository, "wider").set(stable=1, canary=Canary(2, 0.5))
    released = Released(repository, tmp_path / "models")
    here = host(released)
    keys = iter(released.keys_of(2, "wider", wanted=2 * IN_A_ROW + 3))
    wide, narrow, neither = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}, {"a": 1, "b": "two"}
    said = [here.predict("wider", [row], x_request_id=next(keys)).status for row in [narrow] * 2 + [wide] + [neither] * 3]
    assert said == [400, 400, 200, 400, 400, 400]
    collected = here.models.splits.collect("wider")
    assert collected is not None
    assert (collected.window.canary.requests, collected.window.canary.errors, collected.cut_off) == (6, 2, None)
    assert [here.predict("wider", [narrow], x_request_id=next(keys)).status for _ in range(IN_A_ROW)] == [400] * IN_A_ROW
    assert here.predict("wider", [narrow], x_request_id=released.keys_of(2, "wider", wanted=1)[0]).status == 200, "stable's"
    collected = here.models.splits.collect("wider")
    assert collected is not None
    assert "with missing_value" in str(collected.cut_off)


def test_a_canary_that_fails_its_rows_of_a_request_fails_the_request(released: Released) -> None:
    here = host(released, Faulty(TriformError("a fault")))
    for _ in range(IN_A_ROW):
        answer = here.predict("scored", records(USERS))
        assert (answer.status, answer.headers["x-triform-model"]) == (500, "scored/1, scored/2")
    assert {(r.variant, r.code) for r in here.telemetry.records} == {("canary", "internal")}
    assert orjson.loads(here.predict("scored", records(USERS)).body)["predictions"] == answers(USERS, [1] * len(USERS))


def test_a_canary_that_cannot_be_loaded_is_cut_off_at_once(released: Released) -> None:
    telemetry = RecordingTelemetry()
    models = Models(form="lambda", telemetry=telemetry)
    package = released.repository.package("lookup", 1)
    models.add("lookup", 1, lambda: Predictor.load(package))

    def load() -> Predictor:
        raise DigestMismatch("it is not what was packaged")

    models.add("lookup", 2, load, aliases=("canary",), now=False)
    models.share("lookup", released.log("lookup").current())
    here = Host(HttpSurface(InferenceService(models)), models, telemetry)
    (key,) = released.keys_of(2, "lookup", wanted=1)
    assert [here.look_up(key, 5) for _ in range(2)] == [503, 200]
    assert telemetry.splits[-1].cut


def test_a_caller_who_goes_away_is_no_failure(released: Released) -> None:
    began = asyncio.Event()

    async def hang(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        began.set()
        await asyncio.sleep(60)
        raise AssertionError("he has gone")

    here = host(released, hang)
    (key,) = released.keys_of(2, "lookup", wanted=1)

    async def go_away() -> None:
        for _ in range(IN_A_ROW):
            began.clear()
            request = HttpRequest("POST", "/v1/models/lookup:predict", [("x-request-id", key)], b'{"instances": [5]}')
            asking = asyncio.ensure_future(here.surface.handle_async(request))
            await began.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(go_away())
    assert [r.code for r in here.telemetry.records] == ["cancelled"] * IN_A_ROW
    assert "lookup" in here.models.splits.live


def test_why_a_canary_was_cut_off_is_collected_until_the_next_revision(here: Host, released: Released) -> None:
    for key in released.keys_of(2, "lookup", wanted=IN_A_ROW):
        here.look_up(key, 50)
    for _ in range(2):
        collected = here.models.splits.collect("lookup")
        assert collected is not None
        assert str(collected.cut_off).startswith("it has failed 3 requests in a row")
        assert here.models.splits.cuts() == {("lookup", collected.revision)}
    take(here.models, released, "lookup")
    assert here.models.splits.cuts() == set()
    collected = here.models.splits.collect("lookup")
    assert collected is not None
    assert collected.cut_off is None
    assert here.models.splits.collect("unknown") is None


def test_versions_whose_answers_are_no_one_answer_are_the_canarys_failure(tmp_path: Path) -> None:
    """Its outputs are others than stable's, so a request of both has none: each request alone is answered."""
    repository = testing.repository(tmp_path / "models", {"m": testing.linear(tmp_path / "m.onnx", features=2)})
    package_model(testing.linear(tmp_path / "n.onnx", features=2, outputs=2), name="m", repository=repository)
    log = ReleaseLog(repository, "m")
    log.set(stable=1, canary=Canary(2, 0.5, KeyRule(column="user")))
    inputs = [{"name": "x", "shape": [4, 2], "datatype": "FP32", "data": [0] * 8}]
    own = Released(repository, tmp_path / "models")
    users = [own.keys_of(v, "m", wanted=2) for v in (1, 2)]
    here = host(own)

    def ask(keys: list[str]) -> HttpResponse:
        given = [*inputs, {"name": "user", "shape": [4], "datatype": "BYTES", "data": keys}]
        return here.surface.handle(HttpRequest("POST", "/v2/models/m/infer", (), orjson.dumps({"inputs": given})))

    for v, keys in enumerate(users, 1):
        assert ask(keys * 2).headers["x-triform-model"] == f"m/{v}"
    for _ in range(IN_A_ROW):
        answer = ask(users[0] + users[1])
        assert answer.status == 400
        assert "versions 1, 2 give different outputs" in orjson.loads(answer.body)["error"]
    assert ask(users[0] + users[1]).headers["x-triform-model"] == "m/1"
