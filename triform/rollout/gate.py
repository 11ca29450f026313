"""The gate: what follows from the windows of a rollout, however often it is asked.

    policy, windows, step, watched seconds -> judge -> Verdict: ROLLBACK, INCONCLUSIVE, CONTINUE or PROMOTE, and why

ROLLBACK as soon as one guard is beyond its limit. PROMOTE (to the next step; from the last one to stable) once the canary had the
requests and seconds that the step asks for, every guard has data, and, on the last step, every guard is within its limit; leaving
the shadow step asks that of the disagreement, whose rows come from there. A guard that looks beyond its limit, though that is not
shown yet, waits on any step. INCONCLUSIVE when time is up. Otherwise CONTINUE. A window that is not complete or cannot be counts
towards no promotion, and a step of which much is missing waits: who does not report may be down because of the canary. No data
never promotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from triform.rollout.findings import Finding
from triform.rollout.guards import findings
from triform.rollout.policy import Policy
from triform.rollout.windows import SHADOW, Window

DOUBTFUL: Final = -0.5  # log10 of a bet in favour that has lost two thirds of its stake: it waits, on whatever step
MOST_MISSING: Final = 0.2  # of a step's seconds may lack a replica: they come and go
Decision = Literal["PROMOTE", "CONTINUE", "ROLLBACK", "INCONCLUSIVE"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`requests` and `seconds`: the canary's in the judged step, of complete windows; `watched`: seconds of the whole rollout."""

    decision: Decision
    step: int
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    requests: int
    seconds: float
    watched: float


def judge(policy: Policy, windows: Sequence[Window], step: int, watched: float) -> Verdict:
    """The verdict on `step` (SHADOW, or an index of the policy's steps) after `watched` seconds of the rollout."""
    found = tuple(findings(policy, windows, step))
    complete = [w for w in windows if w.step == step and w.complete]
    requests, seconds = sum(w.canary.requests for w in complete), sum(w.seconds for w in complete)
    decision, reasons = _decide(policy, windows, step, watched, found, requests, seconds)
    return Verdict(
        decision=decision, step=step, reasons=tuple(reasons), findings=found, requests=requests, seconds=seconds, watched=watched
    )  # fmt: skip


def _decide(
    policy: Policy, windows: Sequence[Window], step: int, watched: float, found: Sequence[Finding], requests: int, seconds: float
) -> tuple[Decision, list[str]]:
    beyond = [_told(f) for f in found if f.says == "beyond"]
    if beyond:
        return "ROLLBACK", beyond
    needs = policy.steps[step] if step > SHADOW else policy.shadow
    waits = [f"{f.guard}: no data{f.why and f' ({f.why})'}" for f in found if f.says == "no data"]
    waits += [f"{f.guard}: not yet shown to be within its limit" for f in found if _asked(f, policy, step) and f.says == "open"]
    waits += [f"{f.guard}: it looks beyond its limit" for f in found if f.says == "open" and _looks_beyond(f)]
    of_step = [w for w in windows if w.step == step]
    waits += [w.fault() or f"the latest window has {w.reported} of {w.expected} replicas" for w in of_step[-1:] if not w.complete]
    missing = sum(w.seconds for w in of_step if not w.complete and w.fault() is None)
    if missing > MOST_MISSING * (missing + seconds):
        waits.append(f"replicas did not report in {missing:g} of {missing + seconds:g} seconds of this step")
    if needs is None:
        waits.append("the policy has no shadow step")
    elif requests < needs.min_requests or not seconds >= needs.min_seconds:
        waits.append(f"{requests} of {needs.min_requests} requests, {seconds:g} of {needs.min_seconds:g} seconds")
    if not waits:
        return "PROMOTE", [f"{requests} requests in {seconds:g} seconds, and nothing beyond its limit"]
    if not watched < policy.longest_seconds:
        return "INCONCLUSIVE", [f"{policy.longest_seconds:g} seconds are up", *waits]
    return "CONTINUE", waits


def _asked(finding: Finding, policy: Policy, step: int) -> bool:
    if not finding.proof:
        return False
    return step == len(policy.steps) - 1 or (step == SHADOW and finding.guard == "disagreement")


def _looks_beyond(f: Finding) -> bool:
    """An absolute limit is not to be shown to be kept: it waits by its bet against the canary alone, once that has tripled."""
    return f.in_favour < DOUBTFUL if f.proof else f.against > -DOUBTFUL


def _told(f: Finding) -> str:
    stable = f", stable {f.stable:.4g}" if f.stable is not None else ""
    canary = f"canary {f.canary:.4g}{stable}" if f.canary is not None else "canary in an earlier step"
    return f"{f.guard}: beyond its limit ({canary}; evidence {f.against:.3g}, needed {f.against_at:.3g})"
