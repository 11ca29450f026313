"""Rollouts whose writer is killed at any write, whose release others change, and which several look at: they go on, or end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.triform.stores.rollouts import POLICY, bad, each, good, now
from triform.errors import InvalidRequest
from triform.releases import Canary, Release
from triform.rollout.windows import Window
from triform.rollout_log import Rollout, RolloutLog
from triform.splitting import KeyRule


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


def aborted_on_record_alone(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the release was written."""
    rollout = log.start(POLICY, 2)
    with monkeypatch.context() as patched:
        patched.setattr(log.repository, "create_release", killing)
        with pytest.raises(Killed):
            log.look(rollout, command="abort")


def test_an_abort_whose_second_write_was_lost_is_done_by_the_next(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted_on_record_alone(log, monkeypatch)
    assert now(log).canary is not None
    again = log.latest()
    assert again is not None
    assert again.state.phase == "rolled_back"
    log.look(again, command="abort")
    assert now(log).canary is None
    with pytest.raises(InvalidRequest, match="is over"):
        log.look(again, command="abort")


def test_an_abort_whose_second_write_was_lost_is_done_by_the_next_start(log: RolloutLog, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted_on_record_alone(log, monkeypatch)
    again = log.start(POLICY, 3)
    assert (again.number, now(log).stable) == (2, 1)
    assert now(log).canary == Canary(3, 0.1, POLICY.key)


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
