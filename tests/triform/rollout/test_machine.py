"""The state machine: no share without a verdict, one step at a time, the log wins, and a clock that jumps decides nothing."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.triform.rollout.traffic import release, windows
from triform.errors import InvalidRequest, ReleaseConflict
from triform.releases import Canary, Release, Shadow
from triform.rollout.machine import ENDED, MOST_TICK, Action, Observation, State, advance, begin, in_force
from triform.rollout.policy import Errors, Guards, Policy, Step
from triform.rollout.policy import Shadow as ShadowStep
from triform.rollout.windows import SHADOW, Window

POLICY = Policy(
    steps=(Step(weight=0.1, min_requests=50, min_seconds=60), Step(weight=0.5, min_requests=100, min_seconds=60)),
    shadow=ShadowStep(sample=0.2, min_requests=50, min_seconds=60),
    guards=Guards(errors=Errors(increase=0.05), latency=None),
    longest_seconds=3600.0,
)
GOOD = {step: windows(POLICY, step, number=4) for step in (SHADOW, 0, 1)}
BAD = {step: windows(POLICY, step, number=4, errors=0.6) for step in (SHADOW, 0, 1)}


def written(now: Release, action: Action, canary: int = 2) -> Release:
    """What the release log says after an action."""
    stable, beside = now.stable, {"canary": None, "shadow": None}
    if action.kind == "promote":
        stable = canary
    made: dict[str, Any] = beside | ({"canary": Canary(canary, action.share)} if action.kind == "canary" else {})
    made |= {"shadow": Shadow(canary, action.share)} if action.kind == "shadow" else {}
    return msgspec.structs.replace(now, revision=now.revision + 1, stable=stable, **made)


class Rollout(RuleBasedStateMachine):
    """Any traffic, commands, kills, lost writes, other people's releases, and any clock."""

    @initialize(policy=st.sampled_from([POLICY, msgspec.structs.replace(POLICY, shadow=None, inconclusive="hold")]))
    def start(self, policy: Policy) -> None:
        self.policy, self.log, self.clock = policy, release(), 0.0
        self.state = begin(policy, self.log, 2)
        self.windows: list[Window] = []
        self.actions: tuple[Action, ...] = ()
        self.foreign = False

    def look(self, command: Any = None, *, cut: str | None = None, writes: bool = True) -> None:
        before, unwritten = self.state, self.log.stable != 2
        seen = Observation(windows=self.windows, release=self.log, cut=cut, command=command)
        self.state, self.actions, verdict = advance(self.policy, before, seen, self.clock)
        event(f"{self.state.phase} at {self.state.step}")
        again = advance(self.policy, before, seen, self.clock)
        assert again == (self.state, self.actions, verdict), "it is a pure function"
        steps = (
            self.state.step - before.step + (self.state.phase == "promoted" and before.phase != "promoted" and not self.foreign)
        )
        assert 0 <= steps <= 1
        if steps:
            assert self.log.canary or self.log.shadow or self.foreign, "the step before had its share, as the log says"
            assert command == "promote" or (verdict is not None and verdict.decision == "PROMOTE")
        if verdict is not None and verdict.decision == "ROLLBACK":
            assert self.state.phase == "rolled_back"
        if before.phase in ENDED:
            others = ("superseded", "rolled_back") if before.phase == "promoted" and unwritten else ()
            assert self.state.phase in (before.phase, *others)
        if writes and not self.foreign:
            for action in self.actions:
                self.log = written(self.log, action)

    @rule(writes=st.booleans())
    def tick(self, writes: bool) -> None:
        self.look(writes=writes)

    @rule(command=st.sampled_from(["pause", "resume", "promote", "abort"]), writes=st.booleans())
    def command(self, command: str, writes: bool) -> None:
        self.look(command, writes=writes)

    @rule(command=st.sampled_from([None, "promote"]))
    def a_breaker_opens(self, command: str | None) -> None:
        before = self.state
        self.look(command, cut="three in a row")
        if before.begun and before.phase not in ENDED:
            assert self.state.phase in ("rolled_back", "superseded", "promoted" if self.foreign else "rolled_back")

    @precondition(lambda self: self.state.begun)
    @rule(bad=st.sampled_from([False, False, False, True]))
    def traffic(self, bad: bool) -> None:
        self.windows += (BAD if bad else GOOD)[self.state.step]
        self.clock += 120.0
        self.look()

    @precondition(lambda self: self.lost)
    @rule(bad=st.booleans())
    def it_turns_bad_before_what_was_decided_is_written(self, bad: bool) -> None:
        step = in_force(self.policy, self.state, self.log)
        assert step is not None
        self.windows += BAD[step] if bad else []
        self.look(cut=None if bad else "three in a row")
        assert (self.state.phase, self.log.canary, self.log.shadow) == ("rolled_back", None, None)

    @property
    def lost(self) -> bool:
        """Whether a step or the end was decided on, and its writing lost."""
        step = in_force(self.policy, self.state, self.log)
        waits = self.state.phase not in ENDED and step not in (None, self.state.step)
        return not self.foreign and step is not None and (waits or self.state.phase == "promoted")

    @rule(jump=st.sampled_from([-1e9, -3600.0, -1.0, 0.0, 1.0, 1e5, 1e12, math.inf, math.nan]))
    def clock_jumps(self, jump: float) -> None:
        before, self.clock = self.clock, self.clock + jump
        watched, step, phase = self.state.watched, self.state.step, self.state.phase
        self.look()
        assert 0.0 <= self.state.watched - watched <= MOST_TICK or self.state.watched == 0.0
        if not self.windows or self.windows[-1].step != step:
            assert self.state.step == step
            assert self.state.phase in (phase, "superseded", "held", "rolled_back", "promoted")
        self.clock = self.clock if math.isfinite(self.clock) else before

    @rule()
    def controller_is_killed(self) -> None:
        """All that it has is what it wrote: the state as JSON, and the log."""
        self.state = msgspec.json.decode(msgspec.json.encode(self.state), type=State)
        self.look()

    @precondition(lambda self: not self.foreign)
    @rule(by_hand=st.sampled_from([release(), release(3), release(1, 0.3), release(1, 0.1, version=3), release(2)]))
    def somebody_else_releases(self, by_hand: Release) -> None:
        self.log, self.foreign = msgspec.structs.replace(by_hand, revision=self.log.revision + 1), True
        self.look(writes=False)
        assert self.state.phase in ENDED
        assert self.state.phase != "promoted" or by_hand.stable == 2, "it is what the log says, or somebody else's"
        if by_hand.stable == 3 or (by_hand.canary and by_hand.canary.version == 3):
            assert self.actions == (), "another rollout is not ours to touch"

    @invariant()
    def the_canary_has_what_its_step_gives(self) -> None:
        if not self.foreign and self.log.canary:
            assert self.log.canary.weight in [s.weight for s in self.policy.steps[: self.state.step + 1]]
        if not self.foreign and self.state.phase == "rolled_back":
            assert self.log.stable == 1
        for action in self.actions:
            if self.state.phase == "rolled_back":
                assert action.kind == "rollback"
            if self.state.phase == "superseded":
                raise AssertionError(action)


TestRollout = Rollout.TestCase
TestRollout.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
class TestRolloutLong(Rollout.TestCase):  # type: ignore[misc, name-defined]  # hypothesis makes the class
    settings = settings(max_examples=600, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


def through(
    policy: Policy, traffic: dict[int, list[Window]], *, clock: list[float] | None = None
) -> tuple[State, list[Action], Release]:
    """A rollout whose every action is written at once, until it ends or its traffic does."""
    log = release()
    state, told, seen = begin(policy, log, 2), list[Action](), list[Window]()
    times = iter(clock or [60.0 * i for i in range(100)])
    for now in times:
        if state.begun and (not seen or seen[-1].step != state.step):
            seen += traffic.get(state.step, [])
        state, actions, _ = advance(policy, state, Observation(windows=seen, release=log), now)
        for action in actions:
            told.append(action)
            log = written(log, action)
        if state.phase in ENDED:
            break
    return state, told, log


def test_a_good_rollout_goes_through_every_step() -> None:
    state, told, log = through(POLICY, GOOD)
    assert (state.phase, log.stable, log.canary) == ("promoted", 2, None)
    assert [(a.kind, a.share) for a in told] == [("shadow", 0.2), ("canary", 0.1), ("canary", 0.5), ("promote", 0.0)]


def test_a_bad_one_is_rolled_back_and_says_why() -> None:
    state, told, log = through(POLICY, GOOD | {0: BAD[0]})
    assert (state.phase, log.stable, log.canary, log.shadow) == ("rolled_back", 1, None, None)
    assert [a.kind for a in told] == ["shadow", "canary", "rollback"]
    assert told[-1].reason.startswith("errors: beyond its limit (canary 0.6")


@pytest.mark.parametrize(("inconclusive", "phase", "kinds"), [("rollback", "rolled_back", ["rollback"]), ("hold", "held", [])])
def test_when_time_is_up_the_policy_decides(inconclusive: Any, phase: str, kinds: list[str]) -> None:
    policy = msgspec.structs.replace(POLICY, inconclusive=inconclusive)
    state, told, log = through(policy, {SHADOW: GOOD[SHADOW]})
    assert (state.phase, [a.kind for a in told][2:]) == (phase, kinds)
    assert "3600 seconds are up" in state.reason
    assert (log.canary is None) == bool(kinds)


def test_a_jump_of_the_clock_neither_ends_nor_promotes() -> None:
    jumps = [0.0, 1e9, -1e9, 5.0, 1e12, 6.0, math.nan, 7.0]
    state, _, log = through(POLICY, {}, clock=jumps)
    assert (state.phase, state.step, log.canary) == ("running", SHADOW, None)
    assert state.watched <= len(jumps) * MOST_TICK
    assert through(POLICY, GOOD, clock=[1e9 * (-1) ** i for i in range(20)])[0].phase == "promoted"


def test_what_was_decided_is_written_until_the_log_has_it() -> None:
    log, state = release(1, 0.1), State(stable=1, canary=2, first=0, step=0)
    for command in "abort", None, None:
        state, actions, _ = advance(POLICY, state, Observation(release=log, command=command), 0.0)
        assert [a.kind for a in actions] == ["rollback"]
    assert advance(POLICY, state, Observation(release=release()), 0.0)[1] == ()
    state = State(stable=1, canary=2, first=0, step=1, begun=True)
    log, good = release(1, 0.5), [*GOOD[0], *GOOD[1]]
    for _ in range(3):
        state, actions, _ = advance(POLICY, state, Observation(windows=good, release=log), 0.0)
        assert [a.kind for a in actions] == ["promote"]
    for bad in Observation(windows=[*good, *BAD[1]], release=log), Observation(windows=good, release=log, cut="three in a row"):
        turned, actions, _ = advance(POLICY, state, bad, 0.0)
        assert (turned.phase, [a.kind for a in actions]) == ("rolled_back", ["rollback"]), "it is in force, and so it is judged"
    assert advance(POLICY, state, Observation(release=release(2)), 0.0)[1] == ()
    gone, actions, _ = advance(POLICY, state, Observation(release=release()), 0.0)
    assert (gone.phase, actions) == ("superseded", ()), "somebody rolled back first: a promotion does not try again"


def test_who_writes_the_same_share_after_a_promotion_was_decided_has_the_word() -> None:
    """ "Keep it at half": the promotion was not written; or it was, and the canary is back where it had been."""
    state = State(stable=1, canary=2, first=0, step=1, begun=True)
    good = [*GOOD[0], *GOOD[1]]
    state, actions, _ = advance(POLICY, state, Observation(windows=good, release=release(1, 0.5, revision=3)), 0.0)
    assert (state.phase, state.on, [a.kind for a in actions]) == ("promoted", 3, ["promote"])
    for cut in None, "three in a row":
        seen = Observation(windows=[*good, *BAD[1]], release=release(1, 0.5, revision=5), cut=cut)
        told, actions, _ = advance(POLICY, state, seen, 0.0)
        assert (told.phase, actions) == ("superseded", ())


@pytest.mark.parametrize("weight", [None, 0.1])
def test_who_writes_the_release_from_before_has_the_word(weight: float | None) -> None:
    """Somebody takes the canary off, or back to the step before, and nobody has looked since the step was decided on."""
    first = begin(msgspec.structs.replace(POLICY, shadow=None), release(), 2)
    policy = msgspec.structs.replace(POLICY, shadow=None)
    state = first if weight is None else State(stable=1, canary=2, first=0, step=1, on=2)
    waits, actions, _ = advance(policy, state, Observation(release=release(1, weight, revision=state.on or 0)), 0.0)
    assert (waits.phase, [a.kind for a in actions]) == ("running", ["canary"]), "its own writing was lost"
    told, actions, _ = advance(policy, state, Observation(release=release(1, weight, revision=9)), 0.0)
    assert (told.phase, actions) == ("superseded", ())


def test_a_pause_keeps_the_share_and_time_but_not_from_a_rollback() -> None:
    log, state = release(1, 0.1), State(stable=1, canary=2, first=0, step=0)
    state, actions, _ = advance(POLICY, state, Observation(windows=GOOD[0], release=log, command="pause"), 0.0)
    state, actions, _ = advance(POLICY, state, Observation(windows=GOOD[0], release=log), 100.0)
    assert (state.phase, state.step, state.watched, actions) == ("paused", 0, 0.0, ())
    resumed = advance(POLICY, state, Observation(windows=GOOD[0], release=log, command="resume"), 100.0)[0]
    assert advance(POLICY, resumed, Observation(windows=GOOD[0], release=log), 100.0)[0].step == 1
    state, actions, _ = advance(POLICY, state, Observation(windows=BAD[0], release=log, command="promote"), 100.0)
    assert (state.phase, [a.kind for a in actions]) == ("rolled_back", ["rollback"])


def test_one_rollout_at_a_time() -> None:
    for busy in release(1, 0.1), release(1, shadow=0.1):
        with pytest.raises(ReleaseConflict, match="one rollout at a time"):
            begin(POLICY, busy, 3)
    with pytest.raises(InvalidRequest, match="stable already"):
        begin(POLICY, release(), 1)
