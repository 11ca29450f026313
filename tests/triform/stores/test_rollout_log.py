"""Rollouts kept in a repository of each kind: one at a time, nothing judged twice, and what each look leaves."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.triform.rollout.traffic import of_a_run, windows
from tests.triform.stores.rollouts import POLICY, WITH_SHADOW, Clock, bad, each, good, now
from triform.errors import DigestMismatch, InvalidRequest, ReleaseConflict, StoreError, VersionNotFound
from triform.releases import Canary, Shadow
from triform.repository import ModelRepository
from triform.rollout.evidence import replay
from triform.rollout.gate import judge
from triform.rollout.policy import Guards, Policy, ScoreShift
from triform.rollout.windows import SHADOW, Arm, Window
from triform.rollout_log import HEARTBEAT_SECONDS, RolloutLog
from triform.splitting import KeyRule


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


@pytest.mark.parametrize("version", [1, 2], ids=["stable", "canary"])
def test_a_damaged_version_begins_nothing(log: RolloutLog, store: ModelRepository, version: int) -> None:
    path = store.package("linear", version).folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DigestMismatch):
        log.start(POLICY, 2)
    assert log.latest() is None


def test_where_a_rollback_would_lead_nowhere_nothing_begins(log: RolloutLog, store: ModelRepository) -> None:
    store.remove("linear", 1)
    with pytest.raises(VersionNotFound, match="'linear' has no version 1"):
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


@pytest.mark.parametrize("key", [POLICY.key, KeyRule(column="who")])
def test_so_does_one_of_the_same_weight(log: RolloutLog, key: KeyRule) -> None:
    """With a shadow beside it, or other keys."""
    rollout = log.start(POLICY, 2)
    log.look(rollout)
    shadow = Shadow(3, 0.1) if key == POLICY.key else None
    theirs = log.releases.set(canary=Canary(2, 0.1, key), shadow=shadow, reason="mine", changed_by="bob")
    each(log, rollout, good(0))
    assert (rollout.state.phase, now(log)) == ("superseded", theirs)


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


def test_a_damaged_entry_is_named(log: RolloutLog) -> None:
    log.start(POLICY, 2)
    log.repository.create_note("linear", "rollouts/000001-000001.json", b"{")
    log.repository.create_note("linear", "rollouts/000001-000002.json", b"{")
    with pytest.raises(StoreError, match=r"entry \d of rollout 1 of 'linear' is damaged"):
        log.latest()
