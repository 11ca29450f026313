"""Rollouts kept in a repository of each kind: one at a time, nothing judged twice, and going on after a kill at any write."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from tests.triform.rollout.traffic import of_a_run, windows
from triform.errors import DigestMismatch, InvalidRequest, ReleaseConflict, StoreError, VersionNotFound
from triform.releases import Canary, Release, ReleaseLog, Shadow
from triform.repository import ModelRepository
from triform.rollout.evidence import replay
from triform.rollout.gate import judge
from triform.rollout.policy import Errors, Guards, Policy, ScoreShift, Step
from triform.rollout.policy import Shadow as ShadowStep
from triform.rollout.windows import SHADOW, Arm, Window
from triform.rollout_log import HEARTBEAT_SECONDS, Rollout, RolloutLog
from triform.splitting import KeyRule

POLICY = Policy(
    steps=(Step(weight=0.1, min_requests=50, min_seconds=60), Step(weight=0.5, min_requests=100, min_seconds=60)),
    guards=Guards(errors=Errors(increase=0.05), latency=None),
    key=KeyRule(header="x-user-id"),
)
WITH_SHADOW = msgspec.structs.replace(POLICY, shadow=ShadowStep(sample=0.2, min_requests=50, min_seconds=60))


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(store: ModelRepository, publish: Callable[..., None], clock: Clock) -> RolloutLog:
    """Of `linear`, with versions 1 (stable), 2 and 3."""
    publish(1, 2, 3)
    ReleaseLog(store, "linear").set(stable=1)
    return RolloutLog(store, "linear", clock)


def good(step: int, number: int = 4) -> list[Window]:
    return windows(POLICY, step, number=number)


def bad(step: int) -> list[Window]:
    return windows(POLICY, step, number=4, errors=0.6)


def now(log: RolloutLog) -> Release:
    found = log.releases.current()
    assert found is not None
    return found


def each(log: RolloutLog, rollout: Rollout, seen: Sequence[Window]) -> None:
    for window in seen:
        log.look(rollout, windows=[window])


def test_a_good_canary_goes_step_by_step(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2, reason="retrained", by="ann")
    assert now(log).canary == Canary(2, 0.1, KeyRule(header="x-user-id"))
    each(log, rollout, good(0))
    assert now(log).canary == Canary(2, 0.5, KeyRule(header="x-user-id"))
    each(log, rollout, good(1))
    assert (now(log).stable, now(log).canary, now(log).previous) == (2, None, 1)
    assert (rollout.state.phase, rollout.ended) == ("promoted", True)
    assert len({entry.nonce for entry in rollout.entries}) == len(rollout.entries)
    assert rollout.entries[0].reason == "retrained"
    assert rollout.entries[0].by == "ann"


def test_a_shadow_goes_first(log: RolloutLog) -> None:
    rollout = log.start(WITH_SHADOW, 2)
    assert (now(log).shadow, now(log).canary) == (Shadow(2, 0.2), None)
    each(log, rollout, windows(WITH_SHADOW, SHADOW, number=4))
    assert (now(log).shadow, now(log).canary) == (None, Canary(2, 0.1, KeyRule(header="x-user-id")))


def test_a_batch_run_stands_for_the_shadow(log: RolloutLog) -> None:
    evidence = of_a_run(log.repository, WITH_SHADOW)
    rollout = log.start(WITH_SHADOW, 2, shadowed=evidence, reason="retrained")
    assert (now(log).shadow, now(log).canary) == (None, Canary(2, 0.1, KeyRule(header="x-user-id")))
    assert now(log).reason == f"rollout 1: {rollout.state.reason}"
    rows = sum(w.shadowed.rows for w in evidence.windows)
    assert rollout.state.reason == f"shadowed by a batch run: {rows:,} rows, 2026-11-29T02:00:00Z"
    assert [w.shadowed for w in log.read(1).windows] == [w.shadowed for w in evidence.windows]
    each(log, rollout, good(0))
    each(log, rollout, good(1))
    assert rollout.state.phase == "promoted"
    assert not replay(rollout.evidence(rollout.judged[-1])).differences


def test_a_file_says_nothing_of_how_traffic_varies(log: RolloutLog) -> None:
    """Its windows are large, and the spread of their errors would hide those of the canary."""
    evidence = of_a_run(log.repository, WITH_SHADOW, number=50)
    rows = 10_000
    spotty = [
        msgspec.structs.replace(w, stable=Arm(requests=rows), canary=Arm(requests=rows, errors=200 if number == 7 else 0))
        for number, w in enumerate(evidence.windows)
    ]
    rollout = log.start(WITH_SHADOW, 2, shadowed=msgspec.structs.replace(evidence, windows=tuple(spotty)))
    each(log, rollout, bad(0))
    assert rollout.state.phase == "rolled_back"
    alone = next(n for n in range(1, 5) if judge(WITH_SHADOW, bad(0)[:n], 0, 0.0).decision == "ROLLBACK")
    assert len(rollout.windows) == len(spotty) + alone, "as soon as without a file"


BINS = msgspec.structs.replace(WITH_SHADOW, guards=Guards(latency=None, score_shift=ScoreShift(edges=(0.5,))))
WRONG: dict[str, tuple[dict[str, Any], Policy, str]] = {
    "another canary": ({"canary": 3}, WITH_SHADOW, "the evidence is of 'linear', 3 beside 1: this is 'linear', 2 beside 1"),
    "another model": ({"model": "other"}, WITH_SHADOW, "the evidence is of 'other'"),
    "other packages": ({"digests": ("a", "b")}, WITH_SHADOW, "other packages than this repository has"),
    "a rollout's": ({"digests": None}, WITH_SHADOW, "the evidence names no packages"),
    "too many": ({"windows": tuple(windows(WITH_SHADOW, SHADOW, number=1)) * 1001}, WITH_SHADOW, "has 1001 windows"),
    "impossible": ({"windows": (Window(step=SHADOW, seconds=-1.0),)}, WITH_SHADOW, "a window that cannot be: seconds: expected"),
    "other bins": ({}, BINS, "has scores in other bins than the policy's"),
    "no windows": ({"windows": ()}, WITH_SHADOW, "does not stand for the policy's [shadow] step: errors: no data"),
    "of traffic": ({"windows": tuple(good(0))}, WITH_SHADOW, "of a canary with traffic"),
    "no such step": ({}, POLICY, "the policy has no [shadow] step"),
}


@pytest.mark.parametrize(("changes", "policy", "says"), WRONG.values(), ids=WRONG)
def test_evidence_of_something_else_begins_nothing(log: RolloutLog, changes: dict[str, Any], policy: Policy, says: str) -> None:
    evidence = msgspec.structs.replace(of_a_run(log.repository, WITH_SHADOW), **changes)
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        log.start(policy, 2, shadowed=evidence)
    assert (log.latest(), now(log).revision) == (None, 1)


def test_a_run_that_speaks_against_a_version_begins_nothing(log: RolloutLog) -> None:
    """Whatever the evidence says of itself."""
    found = of_a_run(log.repository, WITH_SHADOW, errors=0.6)
    kind = msgspec.structs.replace(found, verdict=msgspec.structs.replace(found.verdict, decision="PROMOTE"))
    with pytest.raises(InvalidRequest, match=r"\[shadow\] step: errors: beyond its limit"):
        log.start(WITH_SHADOW, 2, shadowed=kind)
    assert log.latest() is None


def test_a_bad_canary_is_taken_off(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    each(log, rollout, bad(0))
    assert (rollout.state.phase, now(log).stable, now(log).canary) == ("rolled_back", 1, None)
    assert "errors: beyond its limit" in now(log).reason
    verdicts = [rollout.evidence(number) for number in rollout.judged]
    assert [(evidence.verdict.decision, len(evidence.windows)) for evidence in verdicts][-1] == ("ROLLBACK", len(verdicts))
    assert [replay(evidence).differences for evidence in verdicts] == [()] * len(verdicts)


def test_what_comes_after_the_end_changes_nothing(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    each(log, rollout, bad(0))
    entries, revision = len(rollout.entries), now(log).revision
    each(log, rollout, good(0))
    log.look(rollout, cut="late")
    with pytest.raises(InvalidRequest, match="is over: rolled_back"):
        log.look(rollout, command="promote")
    assert (len(rollout.entries), now(log).revision) == (entries, revision)


def test_a_breaker_that_opened_ends_it(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout, windows=good(0)[:1], cut="three in a row")
    assert (rollout.state.phase, now(log).canary) == ("rolled_back", None)
    assert "three in a row" in now(log).reason


def test_one_at_a_time(log: RolloutLog) -> None:
    log.start(POLICY, 2)
    with pytest.raises(ReleaseConflict, match="rollout 1 of 'linear' is running, at step 1, of version 2: one at a time"):
        log.start(POLICY, 3)
    rollout = log.latest()
    assert rollout is not None
    log.look(rollout, command="abort", by="ann")
    assert log.start(POLICY, 3).number == 2
    assert now(log).canary == Canary(3, 0.1, KeyRule(header="x-user-id"))


def test_of_many_who_begin_one_does(log: RolloutLog) -> None:
    barrier, results = threading.Barrier(4), []

    def begin() -> None:
        barrier.wait()
        try:
            results.append(log.start(POLICY, 2).number)
        except ReleaseConflict as error:
            results.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(1) == 1
    assert sum("at a time" in str(result) for result in results) == 3, "they meet its entry, or already its canary"
    assert now(log).revision == 2


@pytest.mark.parametrize(("version", "error"), [(1, InvalidRequest), (9, VersionNotFound)])
def test_what_cannot_be_a_canary(log: RolloutLog, version: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        log.start(POLICY, version)
    assert log.latest() is None
    assert now(log).revision == 1


def test_a_damaged_version_begins_nothing(log: RolloutLog, store: ModelRepository) -> None:
    path = store.package("linear", 2).folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DigestMismatch):
        log.start(POLICY, 2)
    assert log.latest() is None


def test_beside_a_canary_that_somebody_set_there_is_no_rollout(log: RolloutLog) -> None:
    log.releases.set(canary=Canary(3, 0.1))
    with pytest.raises(ReleaseConflict, match="has a canary or shadow already"):
        log.start(POLICY, 2)


def test_a_model_that_was_never_released(store: ModelRepository, publish: Callable[..., None]) -> None:
    publish(1, 2)
    with pytest.raises(InvalidRequest, match="never released"):
        RolloutLog(store, "linear").start(POLICY, 2)


def test_pause_resume_promote_abort(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout)
    log.look(rollout, command="pause")
    each(log, rollout, good(0))
    assert (rollout.state.phase, now(log).canary) == ("paused", Canary(2, 0.1, KeyRule(header="x-user-id")))
    with pytest.raises(InvalidRequest, match="is paused, at step 1: it cannot pause now"):
        log.look(rollout, command="pause")
    log.look(rollout, command="resume")
    log.look(rollout)
    assert now(log).canary == Canary(2, 0.5, KeyRule(header="x-user-id"))
    log.look(rollout)
    log.look(rollout, command="promote", by="ann")
    assert (now(log).stable, now(log).changed_by) == (2, "ann")


def test_a_foreign_release_wins(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout)
    log.releases.set(stable=3, reason="hotfix", changed_by="bob")
    each(log, rollout, bad(0))
    assert (rollout.state.phase, now(log).stable, now(log).changed_by) == ("superseded", 3, "bob")


def test_hours_without_news_are_kept_in_few_entries(log: RolloutLog, clock: Clock) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout)
    before = len(rollout.entries)
    for _ in range(60):
        clock.now += 10.0
        log.look(rollout)
    assert len(rollout.entries) - before == 600 / HEARTBEAT_SECONDS
    again = log.latest()
    assert again is not None
    assert again.state.watched == pytest.approx(600.0)


class Killed(Exception):
    """Of the process, in its n-th write."""


def killed(log: RolloutLog, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
    """The n-th write from now on is the process's last act: it has happened, or (`after=False`) not."""
    store: Any = log.repository
    left = [at]
    for name in "create_note", "create_release":
        write = getattr(store, name)

        def wrapped(*args: Any, write: Any = write) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Killed
            made = write(*args)
            if left[0] == 0:
                raise Killed
            return made

        monkeypatch.setattr(store, name, wrapped)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("seen", [good, bad])
def test_killed_at_any_write_another_goes_on(
    log: RolloutLog, monkeypatch: pytest.MonkeyPatch, seen: Callable[[int], list[Window]], after: bool
) -> None:
    """The one who goes on knows the log alone; a window whose entry was not written is gone, as that of a killed controller."""
    log.start(POLICY, 2)
    for kills in range(1, 40):
        rollout = log.latest()
        assert rollout is not None
        if rollout.ended and not (now(log).canary or now(log).shadow):
            break
        with monkeypatch.context() as patched:
            killed(log, patched, 1 + kills % 5, after=after)
            with contextlib.suppress(Killed):
                each(log, rollout, seen(max(0, rollout.state.step)))
    assert (now(log).stable, now(log).canary) == ((2, None) if seen is good else (1, None))
    weights = [r.canary.weight for r in reversed(log.releases.history()) if r.canary]
    assert weights == ([0.1, 0.5] if seen is good else [0.1]), "no step is written twice"


def test_an_abort_whose_second_write_was_lost_is_done_by_the_next(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = log.start(POLICY, 2)
    monkeypatch.setattr(log.repository, "create_release", killing)
    with pytest.raises(Killed):
        log.look(rollout, command="abort")
    monkeypatch.undo()
    assert now(log).canary is not None
    again = log.latest()
    assert again is not None
    assert again.state.phase == "rolled_back"
    log.look(again, command="abort")
    assert now(log).canary is None
    with pytest.raises(InvalidRequest, match="is over"):
        log.look(again, command="abort")


def test_what_is_over_leaves_a_later_canary_alone(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout, command="abort")
    log.releases.set(canary=Canary(2, 0.1), reason="once more, by hand")
    revision = now(log).revision
    log.look(rollout)
    assert (now(log).revision, now(log).canary is not None) == (revision, True)


def test_a_rollback_whose_write_was_lost_takes_off_what_others_left_beside(
    log: RolloutLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another revision comes between that has the canary still, be it a person's or that of a slower writer of the rollout."""
    for between in Canary(2, 0.1, POLICY.key), Canary(2, 0.5, POLICY.key):
        rollout = log.start(POLICY, 2)
        with monkeypatch.context() as lost:
            lost.setattr(log.repository, "create_release", killing)
            with pytest.raises(Killed):
                each(log, rollout, bad(0))
        assert rollout.state.phase == "rolled_back"
        log.releases.set(canary=between, reason="with another reason")
        again = log.latest()
        assert again is not None
        log.look(again)
        assert now(log).canary is None


def test_a_step_that_is_written_after_the_end_is_taken_off(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins it is slow, and somebody aborts it meanwhile."""
    write = log.releases.set
    faster = RolloutLog(log.repository, log.model)

    def slow(**wanted: Any) -> Release:
        monkeypatch.undo()
        rollout = faster.latest()
        assert rollout is not None
        faster.look(rollout, command="abort")
        return write(**wanted)

    monkeypatch.setattr(log.releases, "set", slow)
    rollout = log.start(POLICY, 2)
    assert (rollout.state.phase, now(log).canary) == ("rolled_back", None)
    assert [release.canary is not None for release in log.releases.history(3)] == [False, True, False]


def test_windows_that_may_be_on_record_are_known_again(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.look(rollout, windows=good(0)[:1], nonce="a")
    for _ in range(2):
        log.look(rollout, windows=good(0)[:1], nonce="a")
    log.look(rollout, windows=good(0)[1:2], nonce="b")
    assert rollout.windows == good(0)[:2]


def killing(*_: object) -> bool:
    raise Killed


def decided_and_not_written(log: RolloutLog, monkeypatch: pytest.MonkeyPatch, step: int) -> Rollout:
    """A good rollout, up to the writing of what follows on that step."""
    rollout = log.start(POLICY, 2)
    for before in range(step):
        each(log, rollout, good(before))
    with monkeypatch.context() as lost:
        lost.setattr(log.repository, "create_release", killing)
        with pytest.raises(Killed):
            each(log, rollout, good(step))
    return log.read(1)


def test_a_step_that_was_decided_is_taken_though_somebody_pauses(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = decided_and_not_written(log, monkeypatch, 0)
    assert (rollout.state.step, rollout.state.begun) == (1, False)
    log.look(rollout, command="pause")
    assert now(log).canary == Canary(2, 0.5, KeyRule(header="x-user-id"))
    log.look(rollout, windows=bad(1))
    assert (rollout.state.phase, now(log).canary) == ("rolled_back", None)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("cut", [None, "three in a row"])
def test_a_canary_that_turns_bad_before_the_decision_is_written_is_taken_off(
    log: RolloutLog, monkeypatch: pytest.MonkeyPatch, step: int, cut: str | None
) -> None:
    """The store fails after the entry, or the controller is killed: the next one sees what is in force."""
    rollout = decided_and_not_written(log, monkeypatch, step)
    assert (rollout.state.phase, rollout.state.step) == (("promoted", 1) if step else ("running", 1))
    assert now(log).canary == Canary(2, POLICY.steps[step].weight, POLICY.key)
    log.look(rollout, windows=[] if cut else bad(step), cut=cut)
    assert (rollout.state.phase, now(log).stable, now(log).canary) == ("rolled_back", 1, None)
    assert rollout.entries[-1].cut == cut


@pytest.mark.parametrize("command", ["pause", "resume", "promote"])
def test_a_promotion_whose_write_was_lost_is_no_ones_to_stop_but_by_an_abort(
    log: RolloutLog, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    rollout = decided_and_not_written(log, monkeypatch, 1)
    with pytest.raises(InvalidRequest, match="is over: promoted"):
        log.look(rollout, command=command, reason="stop it, please")
    assert (now(log).stable, now(log).canary) == (2, None), "and it is done"
    assert "please" not in now(log).reason
    assert {entry.command for entry in rollout.entries} == {None}


def test_a_promotion_whose_write_was_lost_is_aborted(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = decided_and_not_written(log, monkeypatch, 1)
    log.look(rollout, command="abort")
    assert (rollout.state.phase, now(log).stable, now(log).canary) == ("rolled_back", 1, None)


@pytest.mark.parametrize("command", ["abort", "pause", "promote", None])
def test_a_release_that_ends_a_rollout_which_nobody_looks_at_is_no_obstacle(log: RolloutLog, command: Any) -> None:
    rollout = log.start(POLICY, 2)
    each(log, rollout, good(0)[:1])
    log.releases.rollback(reason="on call: off with it")
    if command is not None:
        with pytest.raises(InvalidRequest, match=f"is superseded, at step 1: it cannot {command} now"):
            log.look(log.read(1), command=command)
        assert log.read(1).state.phase == "superseded"
    assert log.start(POLICY, 3).number == 2
    assert now(log).canary == Canary(3, 0.1, POLICY.key)


def test_a_rollback_before_the_first_look_is_not_undone(log: RolloutLog) -> None:
    rollout = log.start(POLICY, 2)
    log.releases.rollback(reason="on call: off with it")
    revision = now(log).revision
    log.look(rollout, windows=bad(0), cut="three in a row")
    assert (rollout.state.phase, now(log).revision, now(log).canary) == ("superseded", revision, None)


def test_two_controllers_do_no_harm(log: RolloutLog) -> None:
    one, other = log.start(POLICY, 2), log.latest()
    assert other is not None
    errors: list[Exception] = []

    def watch(rollout: Rollout) -> None:
        try:
            for _ in range(12):
                if not log.follow(rollout).ended:
                    log.look(rollout, windows=good(max(0, rollout.state.step), 1))
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=watch, args=(rollout,)) for rollout in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (now(log).stable, now(log).canary) == (2, None)
    assert [r.canary.weight for r in reversed(log.releases.history()) if r.canary] == [0.1, 0.5]
    assert [e.nonce for e in log.follow(one).entries] == [e.nonce for e in log.follow(other).entries]


def test_a_damaged_entry_is_named(log: RolloutLog) -> None:
    log.start(POLICY, 2)
    log.repository.create_note("linear", "rollouts/000001-000001.json", b"{")
    log.repository.create_note("linear", "rollouts/000001-000002.json", b"{")
    with pytest.raises(StoreError, match=r"entry \d of rollout 1 of 'linear' is damaged"):
        log.latest()
