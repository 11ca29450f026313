"""Rollouts of `linear` in a store of each kind: the policy, what is seen of it, and looking at it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.triform.rollout.traffic import windows
from triform.releases import Release
from triform.rollout.policy import Errors, Guards, Policy, Step
from triform.rollout.policy import Shadow as ShadowStep
from triform.rollout.windows import Window
from triform.rollout_log import Rollout, RolloutLog
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
