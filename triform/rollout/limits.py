"""Absolute limits of the canary, end to end, whatever stable does: "error rate > 0.1, p99 > 1 s, QPS < 50".

    canary's requests, errors, request seconds -> one probability, or one rate, against a number -> Finding

p99 > 1 s is: more than 1% of the requests take longer than 1 s. QPS is requests answered a second, as all traffic would have it:
a canary with a tenth of the keys is compared with a tenth of the limit. Limits sound an alarm; to be promoted the canary need not
be shown to be within them, only to have data and not to look beyond them.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from triform.rollout.comparison import design_effect
from triform.rollout.evalues import Counts, Floats, Line, log_pace_evalues
from triform.rollout.findings import (
    Finding,
    Judged,
    Odds,
    compared,
    errors_of,
    finding,
    ratio,
    requests_of,
    wealth_against,
)  # fmt: skip
from triform.rollout.policy import Policy
from triform.rollout.windows import SHADOW, merge_sketches

ASSUMED: Final = 8.0  # design effect, before there are windows to estimate it from


def findings(policy: Policy, seen: Judged, step: int, alpha: float, beta: float) -> list[Finding]:
    """One of each limit that is set. While the canary answers nobody, only its errors are told of."""
    named = policy.guards.limits.named()
    odds = Odds(alpha / max(1, len(named)), beta, ASSUMED)
    return [
        _pace(policy, value, seen, odds) if name == "qps" else _share(name, value, seen, odds)
        for name, value in named.items()
        if step > SHADOW or name == "error_rate"
    ]


def _share(name: str, value: float, seen: Judged, odds: Odds) -> Finding:
    none = np.zeros(len(seen.windows))
    if name == "error_rate":
        counts = Counts(seen.column(errors_of("canary")), seen.column(requests_of("canary")), none, none)
        return compared(f"limits.{name}", seen, counts, Line(0.0, value), odds, proof=False)
    quantile = float(name.removeprefix("p").removesuffix("_ms")) / 100.0
    slow = seen.column(lambda w: w.canary.request_seconds.above(value / 1e3))
    counts = Counts(slow, seen.column(lambda w: w.canary.request_seconds.total), none, none)
    found = compared(f"limits.{name}", seen, counts, Line(0.0, 1.0 - quantile), odds, proof=False)
    return msgspec.structs.replace(
        found, canary=merge_sketches(w.canary.request_seconds for w in seen.of_step()).quantile(quantile)
    )


def _pace(policy: Policy, value: float, seen: Judged, odds: Odds) -> Finding:
    """A bet on a Poisson rate, to the power of 1 / (how much more the counts vary than Poisson's). Of windows that all replicas
    have reported: what is missing is no slowness."""
    told = seen.column(lambda w: w.complete and w.step > SHADOW and w.canary.requests > 0)
    served = told * seen.column(lambda w: w.seconds * policy.steps[max(0, w.step)].weight)
    answered = seen.column(lambda w: w.canary.requests - w.canary.errors) * (served > 0)
    won = log_pace_evalues(answered, served, value, beyond=True) / _dispersion(answered, served)[:, None]
    rate = ratio(float((answered * seen.counted).sum()), float((served * seen.counted).sum()))
    return finding("limits.qps", wealth_against(won, seen), 0.0, odds, missing=rate is None, canary=rate, proof=False)


def _dispersion(answered: Floats, served: Floats) -> Floats:
    """Before each window. A rate is a probability of many small intervals: the design effect of counts in those."""
    fine = 1e3 * np.maximum(answered.max(initial=1.0), 1.0) / max(served.max(initial=0.0), 1e-9)
    none = np.zeros_like(answered)
    return design_effect(Counts(answered, served * fine, none, none), assumed=ASSUMED, least=1.0, alone=True)
