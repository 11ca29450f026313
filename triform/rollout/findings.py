"""From bets to what a guard says, and the windows that its bets may be placed on.

    windows, step -> Judged            Counts -> compared -> comparison.py -> wealths -> Finding

Two bets are made on each guard. One is that the canary is beyond its limit, from every window there is, begun at each step of the
rollout; it need only win once. The other is that the canary is within, from the complete windows of the step that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from triform.rollout.comparison import from_starts, increments
from triform.rollout.evalues import Counts, Floats, Line, log_mean
from triform.rollout.windows import Arm, Window

Says = Literal["beyond", "within", "open", "no data"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`against` and `in_favour`: log10 of the wealths; at `against_at` and `in_favour_at` the bets are won. (Of the score shift:
    the bounds of the index, and its limit.) `canary`, `stable`: of the judged step, shares, seconds, requests a second or the
    index. `why`: what to do where there is no data for a reason.
    """

    guard: str
    says: Says
    against: float = 0.0
    against_at: float = 0.0
    in_favour: float = 0.0
    in_favour_at: float = 0.0
    canary: float | None = None
    stable: float | None = None
    proof: bool = True  # whether the last step asks for "within"; a limit only sounds the alarm
    why: str = ""


class Judged(NamedTuple):
    """The windows without those that cannot be; which of them an acquittal may use (1 or 0); where each step began, for as many
    steps as the rollout can have: one that has not begun is at the end, as shares of alpha are given out once and for all."""

    windows: Sequence[Window]
    counted: Floats
    starts: tuple[int, ...]

    def column(self, of: Callable[[Window], float]) -> Floats:
        return np.array([of(window) for window in self.windows], dtype=np.float64)

    def of_step(self) -> list[Window]:
        return [w for w, counted in zip(self.windows, self.counted, strict=True) if counted]


class Odds(NamedTuple):
    """A finding's shares of the policy's error probabilities, and the design effect: assumed at first, and the least."""

    alpha: float
    beta: float
    assumed: float
    least: float = 1.0


def judged(windows: Sequence[Window], step: int, steps: int) -> Judged:
    """`steps`: how many the rollout can have, shadow included."""
    usable = [w for w in windows if w.fault() is None and w.step <= step]
    counted = np.array([w.step == step and w.complete for w in usable], dtype=np.float64)
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(usable)) if b.step > a.step)]
    return Judged(usable, counted, (*starts, *(len(usable),) * (steps - len(starts))))


def compared(guard: str, seen: Judged, counts: Counts, line: Line, odds: Odds, *, proof: bool = True) -> Finding:
    """Of probabilities: the canary's events against stable's, or (ratio 0) against a number."""
    against = wealth_against(increments(counts, line, beyond=True, assumed=odds.assumed, least=odds.least), seen)
    favour = wealth_in_favour(increments(counts, line, beyond=False, assumed=odds.assumed, least=odds.least), seen)
    complete = Counts(*(column * seen.counted for column in counts))
    canary, stable = ratio(*(float(c.sum()) for c in complete[:2])), ratio(*(float(c.sum()) for c in complete[2:]))
    missing = canary is None or (line.ratio > 0 and stable is None)
    return finding(guard, against, favour, odds, missing=missing, canary=canary, stable=stable, proof=proof)


def wealth_against(won: Floats, seen: Judged) -> float:
    """Log of the most that the bets had together after any window: whoever looked then had been right to stop."""
    return float(np.max(log_mean(from_starts(won, seen.starts), -1), initial=0.0)) if won.shape[-2] else 0.0


def wealth_in_favour(won: Floats, seen: Judged) -> float:
    """Log of what those have now that were placed on complete windows of the judged step only."""
    return float(log_mean((won * seen.counted[:, None]).sum(axis=-2), -1)) if won.shape[-2] else 0.0


def finding(
    guard: str, against: float, favour: float, odds: Odds, *, missing: bool, canary: float | None, stable: float | None = None,
    proof: bool = True,
) -> Finding:  # fmt: skip
    """What natural logarithms of wealths mean. A wealth that is no number is no data."""
    fine = math.isfinite(against) and math.isfinite(favour)
    says: Says = "open"
    if fine and against >= -math.log(odds.alpha):
        says = "beyond"
    elif missing or not fine:
        says = "no data"
    elif favour >= -math.log(odds.beta):
        says = "within"
    logs = (against / math.log(10), -math.log10(odds.alpha), favour / math.log(10), -math.log10(odds.beta))
    against, against_at, favour, favour_at = (round(x, 6) for x in logs) if fine else (0.0,) * 4
    return Finding(
        guard=guard, says=says, against=against, against_at=against_at, in_favour=favour, in_favour_at=favour_at,
        canary=canary, stable=stable, proof=proof,
    )  # fmt: skip


def errors_of(side: str) -> Callable[[Window], float]:
    return lambda w: arm(w, side).errors


def requests_of(side: str) -> Callable[[Window], float]:
    return lambda w: arm(w, side).requests


def arm(window: Window, side: str) -> Arm:
    return window.canary if side == "canary" else window.stable


def ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None
