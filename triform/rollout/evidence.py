"""A verdict with all that it rests on, as a file: whoever doubts it computes it again.

    judge -> record -> encode -> evidence.json -> decode -> replay: policy and windows through the gate again
                                                            as_shadow: a batch run's windows through a rollout's own policy,
                                                                       and of them what the rollout goes on from

The file is JSON: the policy as it was, every window of the rollout, the judged step, the watched seconds, the verdict.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from triform.errors import ConfigurationError, InvalidInput, InvalidRequest
from triform.rollout.findings import Finding
from triform.rollout.gate import Verdict, judge
from triform.rollout.policy import Policy, ScoreShift
from triform.rollout.windows import SHADOW, Arm, Window

FORMAT: Final = 1
MOST_WINDOWS: Final = 1000  # of a batch run's, which all verdicts of a rollout go through
CLOSE: Final = 1e-6  # of logarithms: another machine's may differ in the last digits


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`at`: ISO 8601, UTC, as told by who recorded it; nothing rests on it. `digests`: of stable's package and the canary's, if a
    batch run has compared them."""

    format: int = FORMAT
    model: str
    stable: int
    canary: int
    at: str = ""
    policy: Policy
    windows: tuple[Window, ...]
    verdict: Verdict
    digests: tuple[str, str] | None = None


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """`differences`: what the recorded verdict says otherwise; none if it is the same."""

    verdict: Verdict
    differences: tuple[str, ...]


def encode(evidence: Evidence) -> bytes:
    """JSON."""
    return msgspec.json.encode(evidence)


def decode(content: bytes, source: str = "evidence") -> Evidence:
    """Raises `InvalidInput` for what is no evidence, naming `source` and the key."""
    try:
        evidence = msgspec.json.decode(content, type=Evidence)
    except (msgspec.DecodeError, ConfigurationError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{source}: not the evidence of a rollout: {str(error).replace('`', chr(39))}") from error
    if evidence.format != FORMAT:
        raise InvalidInput(f"{source}: evidence of format {evidence.format}, this Triform reads format {FORMAT}")
    if not -1 <= evidence.verdict.step < len(evidence.policy.steps):
        raise InvalidInput(f"{source}: a verdict on step {evidence.verdict.step} of {len(evidence.policy.steps)}")
    return evidence


def replay(evidence: Evidence) -> Replayed:
    """Judges the recorded windows anew, by the recorded policy."""
    said = evidence.verdict
    verdict = judge(evidence.policy, evidence.windows, said.step, said.watched)
    return Replayed(verdict=verdict, differences=tuple(_differences(said, verdict)))


def as_shadow(evidence: Evidence, policy: Policy) -> tuple[Window, ...]:
    """The windows of a rollout that begins with a batch run's evidence in place of its policy's shadow step: the rows that were
    compared, alone. Errors, times and scores of a file are judged here, and say nothing of how those of traffic vary.

    Seconds are not asked for: those of a run say how fast it was. Raises `InvalidRequest` where the policy's gate would not
    go on.
    """
    if policy.shadow is None:
        raise InvalidRequest("the policy has no [shadow] step that the evidence could stand for")
    if any(window.step != SHADOW for window in evidence.windows):
        raise InvalidRequest("the evidence is of a canary with traffic, not of a shadow")
    if len(evidence.windows) > MOST_WINDOWS:
        raise InvalidRequest(f"the evidence has {len(evidence.windows)} windows, of which {MOST_WINDOWS} are allowed")
    if fault := next(filter(None, (window.fault() for window in evidence.windows)), None):
        raise InvalidRequest(f"the evidence has a window that cannot be: {fault}")
    shift, counted = policy.guards.score_shift, evidence.policy.guards.score_shift or ScoreShift()
    if shift is not None and shift.edges != counted.edges:
        raise InvalidRequest("the evidence has scores in other bins than the policy's: compare by the same policy")
    by_rows = msgspec.structs.replace(policy, shadow=msgspec.structs.replace(policy.shadow, min_seconds=0.0))
    verdict = judge(by_rows, evidence.windows, SHADOW, 0.0)
    if verdict.decision != "PROMOTE":
        raise InvalidRequest(f"the evidence does not stand for the policy's [shadow] step: {'; '.join(verdict.reasons)}")
    return tuple(msgspec.structs.replace(window, stable=Arm(), canary=Arm()) for window in evidence.windows)


def _differences(said: Verdict, now: Verdict) -> list[str]:
    told = []
    for name in ("decision", "requests", "seconds"):
        before, after = getattr(said, name), getattr(now, name)
        if before != after and not (name == "seconds" and math.isclose(before, after, rel_tol=CLOSE)):
            told.append(f"{name}: recorded {before}, recomputed {after}")
    before_of, after_of = ({f.guard: f for f in v.findings} for v in (said, now))
    for guard in sorted(before_of.keys() | after_of.keys()):
        one, other = before_of.get(guard), after_of.get(guard)
        if one is None or other is None:
            told.append(f"{guard}: only {'recomputed' if one is None else 'recorded'}")
        else:
            told += [f"{guard}: {text}" for text in _between(one, other)]
    return told


def _between(said: Finding, now: Finding) -> list[str]:
    told = [] if said.says == now.says else [f"recorded '{said.says}', recomputed '{now.says}'"]
    for name in ("against", "against_at", "in_favour", "in_favour_at", "canary", "stable"):
        before, after = getattr(said, name), getattr(now, name)
        same = before == after or (None not in (before, after) and math.isclose(before, after, rel_tol=CLOSE, abs_tol=1e-5))
        if not same:
            told.append(f"{name}: recorded {before}, recomputed {after}")
    return told
