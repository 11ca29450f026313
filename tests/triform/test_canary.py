"""A canary in the process that answers: whom it answers, and what is counted and recorded of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import orjson
import pytest

from tests.calls import calls_of
from tests.canaries import USERS, Host, Released, answers, build, host, records
from triform.canary import IN_A_ROW, LONGEST_USER, Split, Way
from triform.errors import TriformError
from triform.http import HttpRequest, HttpSurface, Limits, at_once
from triform.models import Models, Served
from triform.predictor import Predictor
from triform.protocols import tfs
from triform.protocols.bodies import Call, Encoded
from triform.releases import Canary
from triform.service import InferenceService, Ran, run_here
from triform.signature import Array
from triform.splitting import KeyRule, TrafficSplit
from triform.testing import RecordingTelemetry


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


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
            for blank in ("", " ", "\t", "\xa0", "\x85", "\xc2\xa0", "\xe3\x80\x80"):
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


def test_without_a_canary_nothing_of_this_is_done(released: Released, tmp_path: Path) -> None:
    """One look-up tells a host that no keys are shared: nothing here is called."""
    models = Models(form="serve")
    models.replace("scored", {1: Predictor.load(released.repository.package("scored", 1))}, {"stable": 1})
    here = Host(HttpSurface(InferenceService(models)), models, RecordingTelemetry())

    def ask() -> None:
        assert here.predict("scored", records(USERS), x_user="ann").status == 200

    assert calls_of(Split.gives, ask) == calls_of(Split.answer, ask) == calls_of(KeyRule.of_request, ask) == 0


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
    assert (window.canary.requests, window.canary.errors) == (5, 2), "a caller's mistake is no error"
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
    assert sum(sum(side.scores) for side in sides) == len(USERS), "one a row"
