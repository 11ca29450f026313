"""A canary in the process that answers: what is recorded of it, and when its share is cut to 0."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson
import pytest

from tests.calls import calls_of
from tests.canaries import USERS, Released, answers, build, records, take
from triform import testing
from triform.canary import IN_A_ROW, LONGEST_USER, Split, Way
from triform.errors import DeadlineExceeded, DigestMismatch, TriformError
from triform.http import HttpRequest, HttpResponse, HttpSurface, Limits, at_once
from triform.models import Models, Served
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.protocols import tfs
from triform.protocols.bodies import Call, Encoded
from triform.releases import Canary, ReleaseLog
from triform.repository import open_repository
from triform.service import Execute, InferenceService, Ran, run_here
from triform.signature import Array
from triform.splitting import KeyRule, TrafficSplit
from triform.testing import RecordingTelemetry


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


class Host(NamedTuple):
    """Both models behind the surface, with stable and canary loaded."""

    surface: HttpSurface
    models: Models
    telemetry: RecordingTelemetry

    def predict(self, model: str, rows: list[Any], choice: str = "", **headers: str) -> HttpResponse:
        body = orjson.dumps({"instances": rows})
        given = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return self.surface.handle(HttpRequest("POST", f"/v1/models/{model}{choice}:predict", given, body))

    def look_up(self, key: str, *numbers: int) -> int:
        return self.predict("lookup", [*numbers], x_request_id=key).status

    def refs(self) -> list[tuple[str, str, str, int]]:
        return [(f"{r.model}/{r.version}", r.variant, r.code, r.rows) for r in self.telemetry.records]


def host(released: Released, execute: Execute = run_here) -> Host:
    telemetry = RecordingTelemetry()
    models = Models(form="serve", telemetry=telemetry)
    for model in released.repository.models():
        take(models, released, model)
    return Host(HttpSurface(InferenceService(models, execute)), models, telemetry)


@pytest.fixture
def here(released: Released) -> Host:
    return host(released)


def test_a_request_that_both_answer_is_recorded_for_each_with_its_rows(here: Host, released: Released) -> None:
    versions = [released.split().choose(user.encode()) for user in USERS]
    assert here.predict("scored", records(USERS)).status == 200
    assert here.refs() == [
        ("scored/1", "stable", "ok", versions.count(1)),
        ("scored/2", "canary", "ok", versions.count(2)),
    ]
    stable, canary = here.telemetry.records
    assert stable.seconds == canary.seconds > 0
    assert {*stable.stages} == {"decode", "execute"}
    assert {*canary.stages} == {"execute", "encode"}


def test_a_request_that_one_has_failed_is_recorded_for_that_one(here: Host, released: Released) -> None:
    (key,) = released.keys_of(2, "lookup", wanted=1)
    assert here.look_up(key, 50) == 422
    assert here.look_up(key, 5) == 200
    assert here.refs() == [("lookup/2", "canary", "run_failed", 0), ("lookup/2", "canary", "ok", 1)]


def test_the_override_and_aliases_pass_the_split_by(here: Host, released: Released) -> None:
    (key,) = released.keys_of(2, wanted=1)
    for choice, headers, version in [("", {"x_triform_version": "1"}, 1), ("/labels/stable", {}, 1), ("/versions/2", {}, 2)]:
        answer = here.predict("scored", records([key]), choice, x_user=key, **headers)
        assert orjson.loads(answer.body)["predictions"] == answers([key], [version])
        assert answer.headers["x-triform-model"] == f"scored/{version}"


def test_a_header_that_stands_twice_is_no_key(here: Host) -> None:
    twice = HttpRequest("POST", "/v1/models/scored:predict", [("x-user", "a"), ("X-User", "b")], b'{"instances": []}')
    assert orjson.loads(here.surface.handle(twice).body)["error"] == "the header x-user is given twice"


def test_who_comes_again_is_known(here: Host, released: Released) -> None:
    users = {version: released.keys_of(version, wanted=1)[0] for version in (1, 2)}

    def ask() -> None:
        for version, user in users.items():
            answer = here.predict("scored", records(["somebody"]), x_user=user)
            assert orjson.loads(answer.body)["predictions"] == answers(["somebody"], [version])
            assert answer.headers["x-triform-model"] == f"scored/{version}"

    assert [calls_of(TrafficSplit.choose, ask) for _ in range(3)] == [2, 0, 0]
    headers = [("x-user", users[2]), ("x-user", users[2])]
    assert here.surface.handle(HttpRequest("POST", "/v1/models/scored:predict", headers, b'{"instances": []}')).status == 400
    collected = here.models.splits.collect("scored")
    assert collected is not None
    assert (collected.window.stable.requests, collected.window.canary.requests) == (3, 3)


def test_one_who_is_known_is_no_longer_the_canarys_once_it_is_cut_off(released: Released) -> None:
    with keyed_by(released, KeyRule("x-user")):
        here, (user,) = host(released), released.keys_of(2, "lookup", wanted=1)
        assert [here.predict("lookup", [x], x_user=user).status for x in (5, *[50] * IN_A_ROW)] == [200, *[422] * IN_A_ROW]
        assert here.predict("lookup", [50], x_user=user).headers["x-triform-model"] == "lookup/1"


def test_a_blank_header_is_nobodys(released: Released) -> None:
    """Whatever counts as blank: else the first of them would choose for all."""
    with keyed_by(released, KeyRule("x-user")):
        here, split = host(released), released.split("lookup")
        for key in [*released.keys_of(1, "lookup", wanted=3), *released.keys_of(2, "lookup", wanted=3)]:
            for blank in ("", " ", "\t", "\xa0", "\x85"):
                answer = here.predict("lookup", [5], x_user=blank, x_request_id=key)
                assert answer.headers["x-triform-model"] == f"lookup/{split.choose(key.encode())}"


def test_the_known_are_few_and_short(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triform.canary.MOST_USERS", 5)
    with keyed_by(released, KeyRule("x-user")):
        here, split = host(released), released.split("lookup")
        for user in [*USERS, *(long := "u" * (LONGEST_USER + 1)), *USERS]:
            answer = here.predict("lookup", [5], x_user=user)
            assert answer.headers["x-triform-model"] == f"lookup/{split.choose(user.encode())}"
            assert len(here.models.splits.live["lookup"]._users) <= 5
        here.predict("lookup", [5], x_user=long)
        assert long not in here.models.splits.live["lookup"]._users


@contextmanager
def keyed_by(released: Released, rule: KeyRule) -> Iterator[None]:
    """A rollout of `lookup` with that key, and then the one that there was."""
    log = released.log("lookup")
    before = log.current()
    assert before is not None
    log.set(canary=Canary(2, 0.5, rule))
    try:
        yield
    finally:
        log.set(canary=before.canary)


def test_the_rollouts_own_key_stands_before_the_models(released: Released) -> None:
    log = released.log()
    before = log.current()
    assert before is not None
    log.set(canary=Canary(2, 0.5, KeyRule("x-session", "b")))
    try:
        made = log.set(canary=Canary(2, 0.6))
        assert made.canary == Canary(2, 0.6, KeyRule("x-session", "b")), "it stays for one rollout, as the salt does"
        assert made.salt == before.salt
        here, split = host(released), released.split()
        for user in USERS:
            ref = here.predict("scored", records(["somebody"]), x_session=user, x_user="somebody").headers["x-triform-model"]
            assert ref == f"scored/{split.choose(user.encode())}"
        rows = [{"a": 1, "b": number, "user": "somebody"} for number in range(20)]
        said = orjson.loads(here.predict("scored", rows).body)["predictions"]
        assert [row["label"] for row in said] == [split.choose(str(number).encode()) for number in range(20)]
    finally:
        log.set(canary=Canary(2, 0.5, KeyRule("X-User", "user")))


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


def test_without_a_canary_nothing_of_this_is_done(released: Released, tmp_path: Path) -> None:
    """One look-up tells a host that no keys are shared: nothing here is called."""
    models = Models(form="serve")
    models.replace("scored", {1: Predictor.load(released.repository.package("scored", 1))}, {"stable": 1})
    here = Host(HttpSurface(InferenceService(models)), models, RecordingTelemetry())

    def ask() -> None:
        assert here.predict("scored", records(USERS), x_user="ann").status == 200

    assert calls_of(Split.gives, ask) == calls_of(Split.answer, ask) == calls_of(KeyRule.keys, ask) == 0


def test_a_canary_without_weight_shares_nothing(released: Released) -> None:
    here = host(released)
    release = released.log().current()
    assert release is not None
    here.models.share("scored", msgspec.structs.replace(release, canary=Canary(2, 0.0)))
    assert not {"scored"} & here.models.splits.live.keys()
    assert here.predict("scored", records(USERS)).headers["x-triform-model"] == "scored/1"


def test_a_key_column_is_no_unknown_input_while_there_is_no_canary(here: Host, released: Released) -> None:
    """Who sends his keys is not refused between two rollouts."""
    inputs = [
        {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]},
        {"name": "user", "shape": [2, 1], "datatype": "INT64", "data": [7, 8]},
    ]
    body = orjson.dumps({"inputs": inputs})
    here.models.share("scored", None)
    answer = here.surface.handle(HttpRequest("POST", "/v2/models/scored/infer", (), body))
    assert orjson.loads(answer.body)["outputs"][0]["data"] == [3.0, 1.0, 7.0, 1.0]
    other = body.replace(b'"user"', b'"usher"')
    assert here.surface.handle(HttpRequest("POST", "/v2/models/scored/infer", (), other)).status == 400


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


def test_what_has_run_counts_though_nobody_gets_it(here: Host, released: Released) -> None:
    (key,) = released.keys_of(2, "lookup", wanted=1)
    tight = here._replace(surface=HttpSurface(here.surface.service, Limits(response=1)))
    assert tight.look_up(key, 5) == 413
    collected = here.models.splits.collect("lookup")
    assert collected is not None
    assert (collected.window.canary.requests, collected.window.canary.execute[0].total) == (1, 1)


def test_what_has_run_counts_though_its_caller_has_gone(here: Host, released: Released) -> None:
    async def run_and_go_away(way: Way, decode: Callable[[], Call], size: int) -> Encoded:
        await way.infer_checked(way.read(decode)[1])
        raise asyncio.CancelledError

    (key,) = released.keys_of(2, "lookup", wanted=1)
    exchange = InferenceService(here.models).exchange(key)
    exchange.choose("lookup")
    with pytest.raises(asyncio.CancelledError), exchange:
        at_once(
            here.models.splits.live["lookup"].answer(
                run_and_go_away, exchange, {}, partial(tfs.decode, b'{"instances": [5]}'), 18
            )
        )
    collected = here.models.splits.collect("lookup")
    assert collected is not None
    assert (collected.window.canary.requests, collected.window.canary.execute[0].total) == (0, 1)


@pytest.mark.parametrize("model", ["lookup", "scored"])
def test_a_failure_leaves_nothing_to_the_garbage_collector(released: Released, model: str) -> None:
    """Else the bodies of failed requests stay in memory for as long as it likes."""
    errors: list[weakref.ref[Exception]] = []

    def noted() -> TriformError:
        error = TriformError("once more")
        errors.append(weakref.ref(error))
        return error

    async def fail(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if served.manifest.version == 1:
            return await run_here(served, inputs, deadline)
        raise noted()  # without a name here, which would hold it

    here, (key,) = host(released, fail), released.keys_of(2, model, wanted=1)
    rows = [5] if model == "lookup" else records([key])
    logging.disable()  # the test's log would keep them
    gc.disable()
    try:
        assert here.predict(model, rows, x_request_id=key).status == 500
        assert [error() for error in errors] == [None]
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


def test_a_window_has_what_both_sides_were_given(here: Host, released: Released) -> None:
    stable, canary = released.keys_of(1, "lookup", wanted=4), released.keys_of(2, "lookup", wanted=3)
    for key in stable * 2:
        assert here.look_up(key, 50, 51, 52) == 200
    for key, number, status in [(canary[0], 5, 200), (canary[1], 50, 422), (canary[1], 50, 422), (canary[2], 5, 200)]:
        assert here.look_up(key, number) == status
    assert here.predict("lookup", ["text"], x_request_id=canary[0]).status == 400
    assert here.predict("lookup", [5], "/versions/2").status == 200, "who names a version is no part of it"
    collected = here.models.splits.collect("lookup", step=1)
    assert collected is not None
    revision, cut_off, window = collected
    release = released.log("lookup").current()
    assert release is not None
    assert (revision, cut_off, window.step, window.fault()) == (release.revision, None, 1, None)
    assert (window.stable.requests, window.stable.errors) == (8, 0)
    assert (window.canary.requests, window.canary.errors) == (5, 1), "a caller's mistake is no error, and a key fails once"
    assert {bucket: sketch.total for bucket, sketch in window.stable.execute.items()} == {2: 8}
    assert {bucket: sketch.total for bucket, sketch in window.canary.execute.items()} == {0: 2}
    assert sum(window.stable.scores) == 24, "asked again for the canary's sake, stable is not counted"
    assert window.stable.request_seconds.total == 8
    again = here.models.splits.collect("lookup")
    assert again is not None
    assert again.window.canary.requests == again.window.stable.requests == 0


def test_a_request_of_both_counts_on_both_sides(here: Host, released: Released) -> None:
    assert here.predict("scored", records(USERS)).status == 200
    collected = here.models.splits.collect("scored")
    assert collected is not None
    sides = collected.window.stable, collected.window.canary
    assert [(side.requests, side.errors) for side in sides] == [(1, 0), (1, 0)]
    assert sum(sum(side.scores) for side in sides) == 2 * len(USERS)


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
