"""The rollout as a state machine: (state, evidence, clock) -> (state, actions), pure.

    shadow -> step 0 -> step 1 -> ... -> promoted          ROLLBACK, abort, or INCONCLUSIVE with "rollback" -> rolled_back
                                                           a breaker has opened (triform/canary.py)          -> rolled_back
                 any of them <-> paused                    INCONCLUSIVE with "hold" -> held: a person decides
                                                           somebody else wrote another release -> superseded

Actions say what the release log should hold, and are given again until it does: a controller that was killed between a decision
and its writing goes on from the log and its last state, and writing twice changes nothing. Nothing but a verdict PROMOTE, or a
person, raises the canary's share; each raises it by one step.

Until then the release before it stays in force, and is judged: a canary that turns bad between a decision and its writing is
taken off. A decision is of one revision (`on`): whoever writes another after it, be it the release from before, has the word.

**The clock** may jump. Time goes by in steps of at most `MOST_TICK` seconds between two looks, and never backwards: neither a
jump nor hours without a controller bring a rollout to its end, and what a step asks for is counted in the windows' own seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from triform.errors import InvalidRequest, ReleaseConflict
from triform.releases import Release
from triform.rollout.gate import Verdict, judge
from triform.rollout.policy import Policy
from triform.rollout.windows import SHADOW, Window
from triform.splitting import KeyRule

MOST_TICK: Final = 300.0

Phase = Literal["running", "paused", "held", "promoted", "rolled_back", "superseded"]
Command = Literal["pause", "resume", "promote", "abort"]
ENDED: Final = ("promoted", "rolled_back", "superseded")


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`step`: SHADOW or an index of the policy's steps. `begun`: whether the log has been seen to hold what the step asks for;
    `on`: the revision that was in force when that, or the promotion, was decided on. `watched`: seconds so far. `at`: the clock
    at the latest look; None: before the first."""

    stable: int
    canary: int
    first: int
    step: int
    phase: Phase = "running"
    begun: bool = False
    on: int | None = None
    watched: float = 0.0
    at: float | None = None
    reason: str = ""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What the release log should say next. `rollback` is tried until it wins, the others once, against the revision that was
    looked at (releases.py)."""

    kind: Literal["shadow", "canary", "promote", "rollback"]
    share: float = 0.0  # of the requests or keys
    reason: str = ""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """`windows`: all of this rollout, oldest first. `release`: the one in force. `cut`: why a replica gives the canary no more
    keys. `command`: what a person wants."""

    windows: Sequence[Window] = ()
    release: Release
    cut: str | None = None
    command: Command | None = None


def begin(policy: Policy, release: Release, canary: int) -> State:
    """The state before the first look. Raises `ReleaseConflict` if a rollout is under way, `InvalidRequest` for what is
    stable."""
    if release.canary or release.shadow:
        raise ReleaseConflict(f"revision {release.revision} has a canary or shadow already: one rollout at a time")
    if canary == release.stable:
        raise InvalidRequest(f"version {canary} is stable already")
    first = SHADOW if policy.shadow else 0
    return State(stable=release.stable, canary=canary, first=first, step=first, on=release.revision)


def in_force(policy: Policy, state: State, release: Release) -> int | None:
    """The step whose share the release gives, which is what is seen under it counts for: the state's, or the one before as long
    as the log does not have what was decided on. None: neither."""
    if _holds(policy, state, release):
        return state.step
    return state.step - 1 if _waits(policy, state, release) and state.step > state.first else None


def _holds(policy: Policy, state: State, release: Release) -> bool:
    """Whether the release is what the state's step asks for."""
    if release.canary is not None and (release.shadow is not None or (release.canary.key or KeyRule()) != policy.key):
        return False  # somebody shares as much in another way
    return release.stable == state.stable and _there(state, release) == _wanted(policy, state.step)


def _waits(policy: Policy, state: State, release: Release) -> bool:
    """Whether it is still the one from before the step, or the promotion, which nobody has written anything after."""
    if release.stable != state.stable or state.on not in (None, release.revision):
        return False
    if state.phase == "promoted":
        return _holds(policy, state, release)
    if state.begun:
        return False
    return _there(state, release) == (_wanted(policy, state.step - 1) if state.step > state.first else ("none", 0.0))


def advance(policy: Policy, state: State, seen: Observation, clock: float) -> tuple[State, tuple[Action, ...], Verdict | None]:
    """The next state, what to write, and the verdict that it rests on, if one was asked for. `clock`: seconds, any origin."""
    before, verdict = state, None
    state = _told_by_log(policy, _ticked(state, clock), seen.release)
    if state.phase not in ENDED or (state.phase == "promoted" and seen.release.stable == state.stable):
        step = in_force(policy, state, seen.release)
        verdict = judge(policy, seen.windows, step, state.watched) if step is not None else None
        if verdict and verdict.decision == "ROLLBACK":  # whatever a person wants at the same time, and paused or not
            state = _become(state, "rolled_back", "; ".join(verdict.reasons))
        elif seen.cut and step is not None:
            state = _become(state, "rolled_back", f"a replica gives it no more keys: {seen.cut}")
        elif seen.command:
            state = _commanded(policy, state, seen.command)
        elif verdict and verdict.step == state.step and state.phase == "running":
            state = _judged(policy, state, verdict)
    if state.step != before.step or (state.phase == "promoted" and before.phase != "promoted"):
        state = msgspec.structs.replace(state, on=seen.release.revision)
    return state, _actions(policy, state, seen.release), verdict


def _ticked(state: State, clock: float) -> State:
    if not math.isfinite(clock):
        return state
    passed = clock - state.at if state.at is not None and state.phase == "running" else 0.0
    return msgspec.structs.replace(state, watched=state.watched + min(max(0.0, passed), MOST_TICK), at=clock)


def _told_by_log(policy: Policy, state: State, release: Release) -> State:
    """What others wrote since: the log wins. A version that is stable was promoted, whoever did it."""
    if state.phase in ("rolled_back", "superseded") or (release.stable == state.canary and state.phase == "promoted"):
        return state
    if release.stable == state.canary:
        return _become(state, "promoted", f"by {release.changed_by}: {release.reason}")
    if state.phase != "promoted" and _holds(policy, state, release):
        return msgspec.structs.replace(state, begun=True)
    if _waits(policy, state, release):
        return state
    return _become(state, "superseded", f"revision {release.revision} by {release.changed_by}: {release.reason}")


def _commanded(policy: Policy, state: State, command: Command) -> State:
    if command == "abort":
        return _become(state, "rolled_back", "aborted")
    if command == "promote" and state.begun and state.phase != "promoted":  # whose writing waits
        return _stepped(policy, state, "promoted by hand")
    if command == "pause" and state.phase == "running":
        return _become(state, "paused", "paused")
    if command == "resume" and state.phase in ("paused", "held"):
        watched = 0.0 if state.phase == "held" else state.watched  # time was up: it gets the same again
        return msgspec.structs.replace(state, phase="running", watched=watched, reason="resumed")
    return state


def _judged(policy: Policy, state: State, verdict: Verdict) -> State:
    reason = "; ".join(verdict.reasons)
    if verdict.decision == "PROMOTE":
        return _stepped(policy, state, reason)
    if verdict.decision == "INCONCLUSIVE":
        return _become(state, "rolled_back" if policy.inconclusive == "rollback" else "held", reason)
    return state


def _stepped(policy: Policy, state: State, reason: str) -> State:
    if state.step == len(policy.steps) - 1:
        return _become(state, "promoted", reason)
    return msgspec.structs.replace(state, step=state.step + 1, phase="running", begun=False, reason=reason)


def _become(state: State, phase: Phase, reason: str) -> State:
    return msgspec.structs.replace(state, phase=phase, reason=reason)


def _actions(policy: Policy, state: State, release: Release) -> tuple[Action, ...]:
    """What is still to be written, until the log has it."""
    beside = _there(state, release)[0] in ("shadow", "canary")
    if state.phase in ENDED:
        if not beside or release.stable != state.stable or state.phase == "superseded":
            return ()
        return (Action(kind="promote" if state.phase == "promoted" else "rollback", reason=state.reason),)
    kind, share = wanted = _wanted(policy, state.step)
    if _there(state, release) == wanted or (state.phase != "running" and state.begun):
        return ()  # a step that was decided on is taken, paused or not: else nobody would watch the one before
    return (Action(kind="shadow" if kind == "shadow" else "canary", share=share, reason=state.reason),)


def _wanted(policy: Policy, step: int) -> tuple[str, float]:
    if step == SHADOW and policy.shadow:
        return "shadow", policy.shadow.sample
    return "canary", policy.steps[step].weight


def _there(state: State, release: Release) -> tuple[str, float]:
    """What the log holds of the version that is rolled out."""
    if release.canary:
        return ("canary", release.canary.weight) if release.canary.version == state.canary else ("another", 0.0)
    if release.shadow:
        return ("shadow", release.shadow.sample) if release.shadow.version == state.canary else ("another", 0.0)
    return "none", 0.0
