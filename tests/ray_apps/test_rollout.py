"""Rollouts of the Serve form without Ray: replicas' reports become windows, and those that count are judged."""

from __future__ import annotations

import asyncio
import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ray_apps import rollout
from ray_apps.rollout import LATE, MOST_KEPT, Gathering, Judges, Report, Seen, coarser
from tests.canaries import Released, build
from tests.ray_apps.load import until
from triform.errors import StoreError
from triform.releases import Canary
from triform.rollout.policy import Errors, Guards, Policy, ScoreShift, Step
from triform.rollout.windows import Arm, Sketch, Window
from triform.rollout_log import RolloutLog
from triform.settings import Settings

POLICY = Policy(
    steps=(Step(weight=0.2, min_requests=30, min_seconds=1), Step(weight=0.5, min_requests=60, min_seconds=1)),
    guards=Guards(errors=Errors(increase=0.3), latency=None),
)


def window(requests: int = 10, errors: int = 0) -> Window:
    times = Sketch.of([0.01] * requests)
    return Window(
        step=0,
        seconds=1.0,
        stable=Arm(requests=requests, request_seconds=times),
        canary=Arm(requests=requests, errors=errors, request_seconds=times),
    )


def report(replica: str, slot: int, revision: int = 5, cut: str | None = None, requests: int = 10) -> Report:
    return Report(replica, "m", slot, revision, cut, window(requests))


def shapes(seen: Seen) -> list[tuple[int, int, int, int]]:
    """Revision, replicas that reported, those expected, the canary's requests."""
    return [(revision, w.reported, w.expected, w.canary.requests) for revision, w in seen.windows]


class TestGathering:
    def test_a_window_is_whole_when_all_have_reported(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7))
        assert not gathering.due(7.9)
        gathering.close(8.0, 2)
        assert shapes(gathering.take()) == []
        gathering.add(report("b", 7))
        gathering.close(8.1, 2)
        assert shapes(gathering.take()) == [(5, 2, 2, 20)]
        assert shapes(gathering.take()) == []

    def test_one_that_waits_for_no_more_is_not_whole(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7))
        gathering.close(8.0 + LATE + 0.01, 2)
        ((_, told),) = gathering.take().windows
        assert (told.reported, told.expected, told.complete) == (1, 2, False)

    def test_revisions_are_not_mixed(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7, revision=5))
        gathering.add(report("b", 7, revision=6))
        gathering.close(10.0, 2)
        assert shapes(gathering.take()) == [(5, 1, 2, 10), (6, 1, 2, 10)]

    def test_a_replica_that_reports_twice_is_one(self) -> None:
        gathering = Gathering()
        for _ in range(2):
            gathering.add(report("a", 7))
        gathering.close(10.0, 2)
        assert shapes(gathering.take()) == [(5, 1, 2, 20)]

    def test_a_breaker_waits_for_nobody(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7, cut="three in a row"))
        assert gathering.due(7.1)
        gathering.close(7.1, 4)
        seen = gathering.take()
        assert (shapes(seen), seen.cut) == ([(5, 1, 4, 10)], (5, "three in a row"))

    def test_nobody_knows_how_many_there_are(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7))
        gathering.close(8.0, None)
        assert shapes(gathering.take()) == []
        gathering.close(8.0 + LATE + 0.01, None)
        ((_, told),) = gathering.take().windows
        assert not told.complete

    def test_other_bins_than_most_cost_a_report_its_scores_alone(self) -> None:
        gathering = Gathering()
        for replica, scores in ("a", (1, 2, 0)), ("b", (3, 4, 0)), ("c", (5, 6, 7, 0)):
            seen = window()
            arm = msgspec.structs.replace(seen.canary, scores=scores)
            gathering.add(Report(replica, "m", 7, 5, None, msgspec.structs.replace(seen, canary=arm)))
        gathering.close(8.0, 3)
        ((_, told),) = gathering.take().windows
        assert (told.canary.requests, told.canary.scores, told.complete) == (30, (4, 6, 0), True)

    def test_reports_that_nobody_judges_are_bounded(self) -> None:
        gathering = Gathering()
        for slot in range(10 * MOST_KEPT):
            gathering.add(report("a", slot))
        gathering.close(1e6, 1)
        assert len(gathering.take().windows) == MOST_KEPT

    def test_what_could_not_be_judged_is_kept(self) -> None:
        gathering = Gathering()
        gathering.add(report("a", 7, cut="three in a row"))
        gathering.close(8.0, 1)
        gathering.put_back(gathering.take())
        gathering.add(report("a", 8))
        gathering.close(9.0, 1)
        seen = gathering.take()
        assert (len(seen.windows), seen.cut) == (2, (5, "three in a row"))


@pytest.mark.parametrize("lost", ["the answer", "the request"])
def test_a_window_is_on_record_once_though_the_store_does_not_answer(tmp_path: Path, lost: str) -> None:
    released = build(tmp_path)
    released.log().rollback()
    rollouts = RolloutLog(released.repository, "scored")
    rollouts.start(POLICY, 2)
    revision = rollouts.releases.in_force().revision
    judges = Judges(Settings.from_env({}, repository=str(released.root)))
    write, failures = judges._repository.create_note, [2]

    def unsure(*note: Any) -> bool:
        made = write(*note) if lost == "the answer" or not failures[0] else False
        if failures[0]:
            failures[0] -= 1
            raise StoreError("the store did not answer")
        return made

    judges._repository.create_note = unsure  # type: ignore[method-assign]
    gathering = Gathering()
    for number in range(1, 6):
        seen = Seen([*gathering.take().windows, (revision, window(number))], None)
        try:
            judges.look("scored", seen)
        except StoreError:
            gathering.put_back(seen)
    rollout = rollouts.latest()
    assert rollout is not None
    assert [w.canary.requests for w in rollout.windows] == [1, 2, 3, 4, 5]


def test_what_could_not_be_written_is_tried_again_before_the_next_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decided rollback does not wait for another report."""
    released = build(tmp_path)
    released.log().rollback()
    rollouts = RolloutLog(released.repository, "scored")
    rollouts.start(POLICY, 2)
    revision = rollouts.releases.in_force().revision
    for name, value in ("log_as_json", lambda: None), ("_replicas", lambda _: 1), ("AGAIN_SECONDS", 0.1):
        monkeypatch.setattr(rollout, name, value)
    controller = rollout.Controller("app", Settings.from_env({}, repository=str(released.root)), 600.0)
    write, failures = controller._judges._repository.create_release, [2]

    def unsure(*revision: Any) -> bool:
        if failures[0]:
            failures[0] -= 1
            raise StoreError("the store did not answer")
        return write(*revision)

    controller._judges._repository.create_release = unsure  # type: ignore[method-assign]

    async def test() -> None:
        slot = int(time.time() / 600.0) - 1
        await controller.report([Report("a", "scored", slot, revision, None, window(300, errors=250))])
        assert controller._task is not None
        deadline = time.monotonic() + 30
        while rollouts.releases.in_force().canary is not None:
            assert time.monotonic() < deadline
            assert not controller._task.done()
            await asyncio.sleep(0.05)
        controller._task.cancel()

    asyncio.run(test())
    ended = rollouts.latest()
    assert ended is not None
    assert (ended.state.phase, failures, len(ended.windows)) == ("rolled_back", [0], 1)


def test_a_controller_that_waits_judges_the_next_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is being gathered it does not look."""
    released = build(tmp_path)
    released.log().rollback()
    rollouts = RolloutLog(released.repository, "scored")
    begun = rollouts.start(POLICY, 2)
    revision = rollouts.releases.in_force().revision
    for name, value in ("log_as_json", lambda: None), ("_replicas", lambda _: 1):
        monkeypatch.setattr(rollout, name, value)
    controller = rollout.Controller("app", Settings.from_env({}, repository=str(released.root)), 600.0)

    async def test() -> None:
        slot = int(time.time() / 600.0) - 1
        for requests in 3, 4:
            await controller.report([Report("a", "scored", slot, revision, None, window(requests))])
            deadline = time.monotonic() + 30
            while controller._told.is_set():
                assert time.monotonic() < deadline
                assert controller._task is not None
                assert not controller._task.done()
                await asyncio.sleep(0.01)
        assert [w.canary.requests for w in rollouts.follow(begun).windows] == [3, 4]
        controller._task.cancel()

    asyncio.run(test())


def test_a_rollout_that_nobody_reports_of_any_more_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes its canary off, and no replica counts anything of it; of another model they report all the time."""
    released = build(tmp_path)
    released.log().rollback()
    rollouts = RolloutLog(released.repository, "scored")
    begun = rollouts.start(POLICY, 2)
    for name, value in ("log_as_json", lambda: None), ("_replicas", lambda _: 1), ("HEARTBEAT_SECONDS", 0.2):
        monkeypatch.setattr(rollout, name, value)
    controller = rollout.Controller("app", Settings.from_env({}, repository=str(released.root)), 600.0)

    async def test() -> None:
        slot = int(time.time() / 600.0) - 1
        await controller.report([Report("a", "scored", slot, rollouts.releases.in_force().revision, None, window(3))])
        deadline = time.monotonic() + 30
        while not rollouts.follow(begun).windows:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        released.log().rollback()
        while not rollouts.follow(begun).ended:
            assert time.monotonic() < deadline
            await controller.report([Report("a", "lookup", slot, 1, None, window(3))])
            await asyncio.sleep(0.01)
        assert controller._task is not None
        controller._task.cancel()

    asyncio.run(test())
    assert begun.state.phase == "superseded"


def test_windows_become_longer_as_a_rollout_becomes_older() -> None:
    """Whole ones with whole ones; nothing is lost or doubled."""
    missing = msgspec.structs.replace(window(), expected=2)
    assert coarser([window(1), window(2)], 0.5, 0.5) == ([window(1), window(2)], None)
    ready, left = coarser([window(1), window(2), window(4), missing, window(8)], 2.0, 2.0)
    assert left is not None
    assert [(w.canary.requests, w.seconds, w.complete) for w in [*ready, left]] == [
        (3, 2.0, True), (4, 1.0, True), (10, 1.0, False), (8, 1.0, True),
    ]  # fmt: skip


def test_where_stable_had_no_request_a_window_waits_for_one() -> None:
    """Its errors would count nowhere, as there is nothing to compare them with."""
    alone = msgspec.structs.replace(window(3, errors=3), stable=Arm())
    ready, left = coarser([alone, alone, window(4), alone], 1.0, 60.0)
    assert [(w.canary.errors, w.canary.requests, w.stable.requests, w.seconds) for w in ready] == [(6, 10, 4, 3.0)]
    assert left == alone
    ready, left = coarser([alone] * 5, 1.0, 2.0)
    assert ([w.seconds for w in ready], left) == ([2.0, 2.0], alone), "but not for ever"
    empty = msgspec.structs.replace(window(0), stable=Arm(requests=5))
    assert coarser([empty], 1.0, 60.0) == ([empty], None), "stable's need no canary's"


@pytest.fixture
def released(tmp_path: Path) -> Released:
    """Both models with version 1 alone in force."""
    made = build(tmp_path)
    for model in made.repository.models():
        made.log(model).rollback()
    return made


@pytest.fixture
def judges(released: Released) -> Judges:
    return Judges(Settings.from_env({}, repository=str(released.root)))


class TestJudges:
    def test_windows_of_the_revision_in_force_count(self, released: Released, judges: Judges) -> None:
        log = RolloutLog(released.repository, "scored")
        assert judges.look("scored", Seen([(2, window())], None)) == {}, "there is no rollout"
        log.start(POLICY, 2)
        judges.look("scored", Seen([(2, window(1)), (3, window(20)), (4, window(300))], None))
        rollout = log.latest()
        assert rollout is not None
        assert [w.canary.requests for w in rollout.windows] == [20]
        judges.look("scored", Seen([(3, window(20))], (2, "of another revision")))
        assert log.follow(rollout).state.step == 1
        judges.look("scored", Seen([(3, window(300)), (4, window(7))], None))
        assert [(w.step, w.canary.requests) for w in log.follow(rollout).windows] == [(0, 20), (0, 20), (1, 7)]

    def test_a_breaker_takes_the_canary_off(self, released: Released, judges: Judges) -> None:
        RolloutLog(released.repository, "scored").start(POLICY, 2)
        judges.look("scored", Seen([(3, window(3, errors=3))], (3, "three in a row")))
        now = released.log().current()
        assert now is not None
        assert (now.canary, now.stable) == (None, 1)
        assert "a replica gives it no more keys: three in a row" in now.reason

    def test_what_was_decided_is_on_record(self, released: Released, tmp_path: Path) -> None:
        """A look that decides nothing is not, nor does a log that cannot be written keep a bad canary."""
        path = tmp_path / "audit.jsonl"
        judges = Judges(Settings.from_env({}, repository=str(released.root), audit=str(path)))
        RolloutLog(released.repository, "scored").start(POLICY, 2)
        judges.look("scored", Seen([(3, window(20))], None))
        judges.look("scored", Seen([(3, window(20))], None))
        judges.look("scored", Seen([(4, window(3))], None))
        (line,) = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        assert (line["what"], line["target"], line["where"]) == ("rollout.step", "scored", "controller")
        assert line["note"].startswith("version 2, 40 requests in 2 seconds")
        path.unlink()
        path.mkdir()
        judges.look("scored", Seen([(4, window(3, errors=3))], (4, "three in a row")))
        assert released.log().in_force().canary is None

    def test_a_log_that_hangs_keeps_no_bad_canary(self, released: Released, tmp_path: Path) -> None:
        """Somebody has its lock, and does not give it back until the canary is off."""
        path = tmp_path / "audit.jsonl"
        judges = Judges(Settings.from_env({}, repository=str(released.root), audit=str(path)))
        RolloutLog(released.repository, "scored").start(POLICY, 2)
        looking = threading.Thread(
            target=judges.look, args=("scored", Seen([(3, window(3, errors=3))], (3, "three in a row"))), daemon=True
        )
        with path.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            looking.start()
            looking.join(60)
            assert not looking.is_alive()
            assert released.log().in_force().canary is None
        until(lambda: path.read_bytes().endswith(b"\n"))
        line = msgspec.json.decode(path.read_bytes())
        assert (line["what"], line["note"].startswith("done at ")) == ("rollout.rolled_back", True)

    def test_what_is_over_touches_no_later_release(self, released: Released, judges: Judges) -> None:
        log = RolloutLog(released.repository, "scored")
        rollout = log.start(POLICY, 2)
        for command in ("promote", "promote"):
            log.look(rollout)
            log.look(rollout, command=command)
        assert log.follow(rollout).state.phase == "promoted"
        released.log().rollback()
        released.log().set(canary=Canary(2, POLICY.steps[-1].weight), reason="by hand")
        by_hand = released.log().current()
        assert by_hand is not None
        judges.look("scored", Seen([(by_hand.revision, window(30))], (by_hand.revision, "three in a row")))
        assert released.log().current() == by_hand

    def test_a_canary_without_a_rollout_is_a_persons(self, released: Released, judges: Judges) -> None:
        released.log().set(canary=Canary(2, 0.5))
        assert judges.look("scored", Seen([(3, window(30, errors=30))], (3, "three in a row"))) == {}
        now = released.log().current()
        assert now is not None
        assert now.canary == Canary(2, 0.5)

    def test_the_policys_bins_are_told(self, released: Released, judges: Judges) -> None:
        shift = ScoreShift(edges=(0.0, 10.0))
        policy = msgspec.structs.replace(POLICY, guards=Guards(latency=None, score_shift=shift))
        RolloutLog(released.repository, "scored").start(policy, 2)
        assert judges.look("scored", Seen([(3, window())], None)) == {"scored": (0.0, 10.0)}
