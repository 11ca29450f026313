"""What each guard finds in the windows: beyond its limit, within, open, or no data.

    windows -> findings.judged -> errors | latency.py | disagreement | limits.py -> Finding
                               -> shift.py --------------------------------------> Finding

`alpha` is split evenly over the guards that the policy has, once and for all; quantiles and limits share their guard's evenly,
buckets of rows and starts by the mean of their wealths; looks cost nothing (comparison.py; shift.py splits alpha over them).
`beta` is not split: a canary must pass every guard, so the probability that it does wrongly is at most that of the guard which it
should not have passed (intersection-union: Berger 1982, Technometrics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from triform.rollout import limits, shift
from triform.rollout.comparison import increments
from triform.rollout.evalues import Counts, Floats, Line
from triform.rollout.findings import (
    Finding,
    Judged,
    Odds,
    Says,
    arm,
    compared,
    errors_of,
    finding,
    judged,
    ratio,
    requests_of,
    wealth_against,
    wealth_in_favour,
)
from triform.rollout.latency import EQUAL, exceeding
from triform.rollout.policy import Disagreement, Latency, Policy, ScoreShift
from triform.rollout.windows import BUCKETS, Window, merge_sketches

ASSUMED_ERRORS: Final = 3.0  # design effects, before there are windows to estimate them from
ASSUMED_RUNS: Final = 8.0
BLIND: Final = "nearly all scores of both sides lie in one outer bin, so no shift would be seen: set guards.score_shift.edges"
MATTERS: Final = 0.05  # the share of the canary's runs from which a bucket of rows must be within the limit by itself


def findings(policy: Policy, windows: Sequence[Window], step: int) -> list[Finding]:
    """One of each guard, or of each of its quantiles or limits, for the judged `step`."""
    guards = policy.guards
    seen = judged(windows, step, len(policy.steps) + bool(policy.shadow))
    number = 1 + sum(bool(g) for g in (guards.latency, guards.disagreement, guards.score_shift, guards.limits.named()))
    alpha, beta = policy.alpha / number, policy.beta
    counts = Counts(*(seen.column(of(side)) for side in ("canary", "stable") for of in (errors_of, requests_of)))
    line = Line(guards.errors.ratio, guards.errors.increase)
    made = [compared("errors", seen, counts, line, Odds(alpha, beta, ASSUMED_ERRORS, guards.errors.design_effect))]
    if guards.latency:
        made += _latency(guards.latency, seen, alpha / len(guards.latency.quantiles), beta)
    if guards.disagreement:
        made.append(_disagreement(guards.disagreement, seen, alpha, beta))
    if guards.score_shift:
        made.append(_score_shift(guards.score_shift, seen, step, alpha))
    return made + limits.findings(policy, seen, step, alpha, beta)


def _latency(guard: Latency, seen: Judged, alpha: float, beta: float) -> list[Finding]:
    """Of each quantile. The accusation is the mean over buckets, so that any of them may win it; the acquittal is the least of
    the buckets that matter, so that none can be hidden by another."""
    canary, stable, first = _histograms(seen)
    runs = (canary.sum(axis=-1) * seen.counted).sum(axis=-1)
    matter = [b for b in range(BUCKETS) if runs[b] > 0 and runs[b] >= MATTERS * runs.sum()]
    made = []
    for quantile in guard.quantiles:
        odds, wealths = Odds(alpha, beta, ASSUMED_RUNS, guard.design_effect), []
        found = exceeding(canary, stable, first, quantile=quantile, ratio=guard.ratio, margin=guard.margin_ms / 1e3)
        for side in found:
            won = increments(
                side.counts, EQUAL, beyond=side is found.beyond, stable=side.expected, assumed=odds.assumed, least=odds.least
            )
            wealths.append(won)
        compared_runs = (found.within.counts.canary_of * (found.within.counts.stable_of > 0) * seen.counted).sum()
        against = wealth_against(np.concatenate(list(wealths[0]), axis=-1), seen)
        favour = min((wealth_in_favour(wealths[1][b], seen) for b in matter), default=0.0)
        values = [_time(seen, side, quantile) for side in ("canary", "stable")]
        missing = compared_runs == 0 or None in values
        name = f"latency p{100 * quantile:g}"
        made.append(finding(name, against, favour, odds, missing=missing, canary=values[0], stable=values[1]))
    return made


def _histograms(seen: Judged) -> tuple[Floats, Floats, int]:
    """[buckets, windows, bins] of canary and stable, and the first bin."""
    used = [i for w in seen.windows for side in (w.canary, w.stable) for s in side.execute.values() for i in s.bins]
    first, last = (min(used), max(used)) if used else (0, 0)
    made = np.zeros((2, BUCKETS, len(seen.windows), last - first + 1))
    for t, window in enumerate(seen.windows):
        for i, side in enumerate((window.canary, window.stable)):
            for bucket, sketch in side.execute.items():
                for index, n in sketch.bins.items():
                    made[i, bucket, t, index - first] = n
    return made[0], made[1], first


def _time(seen: Judged, side: str, quantile: float) -> float | None:
    return merge_sketches(s for w in seen.of_step() for s in arm(w, side).execute.values()).quantile(quantile)


def _disagreement(guard: Disagreement, seen: Judged, alpha: float, beta: float) -> Finding:
    """From the whole rollout, as rows are compared where they are shadowed. Rows of one request may well fail together."""
    disagreed, rows = seen.column(lambda w: w.shadowed.disagreed), seen.column(lambda w: w.shadowed.rows)
    of_request = ratio(float(rows.sum()), sum(w.shadowed.requests for w in seen.windows)) or 1.0
    whole = seen._replace(counted=np.array([w.complete for w in seen.windows], dtype=np.float64))
    counts = Counts(disagreed, rows, np.zeros_like(rows), np.zeros_like(rows))
    odds = Odds(alpha, beta, ASSUMED_ERRORS, max(guard.design_effect, of_request))
    return compared("disagreement", whole, counts, Line(0.0, guard.limit), odds)


def _score_shift(guard: ScoreShift, seen: Judged, step: int, alpha: float) -> Finding:
    complete = [(look, w) for look, w in enumerate(seen.windows) if w.complete]
    of_steps = {s: [(look, w) for look, w in complete if w.step == s] for s in {w.step for _, w in complete}}
    bounds = {s: shift.bounds([w for _, w in pairs], guard, alpha, pairs[0][0]) for s, pairs in of_steps.items()}
    low, now = max((b.highest_low for b in bounds.values()), default=0.0), bounds.get(step, shift.NOTHING)
    says: Says = "beyond" if low > guard.limit else "no data" if now.now is None or now.blind or now.few else "open"
    if says == "open" and now.high < guard.limit:
        says = "within"
    high = now.high if math.isfinite(now.high) else 1e9
    limit = guard.limit
    return Finding(
        guard="score_shift", says=says, against=low, against_at=limit, in_favour=high, in_favour_at=limit, canary=now.now,
        why="" if says != "no data" else BLIND if now.blind else f"fewer than {guard.min_rows:,} rows" if now.few else "",
    )  # fmt: skip
