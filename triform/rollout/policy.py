"""`rollout.toml`: how a version is released, typed and checked. Unknown keys are refused by name.

    inconclusive = "rollback"           # or "hold": what happens when time is up and nothing is shown; a person decides
    longest_seconds = 86400             # of the whole rollout, while somebody watches
    [key]                               # what keeps a caller on a version: the header, else the record's column, else the request
    header = "x-user-id"
    column = "user_id"
    [shadow]                            # first, without the canary answering anybody; left out: not at all
    sample = 0.1
    min_requests = 500
    min_seconds = 600
    [[steps]]                           # rising weights; the last one's claim is to be shown before the canary is promoted
    weight = 0.01
    min_requests = 500                  # of the canary
    min_seconds = 300
    [guards.errors]                     # p_canary <= ratio * p_stable + increase
    increase = 0.005
    [guards.latency]                    # t_canary <= ratio * t_stable + margin_ms, for each quantile and bucket of executed rows
    ratio = 1.2
    margin_ms = 1.0
    [guards.disagreement]               # share of shadowed rows whose answers differ by more than the recorded tolerance
    limit = 0.01
    [guards.score_shift]                # population stability index of the scores in fixed bins
    limit = 0.2
    [guards.limits]                     # of the canary, end to end, whatever stable does
    error_rate = 0.1                    # roll back above
    p99_ms = 1000                       # roll back above; p50_ms and p95_ms, too
    qps = 50                            # roll back below: requests answered a second

What a file leaves out is as the dataclass says; `read_policy` checks all of it before anything begins, and gate.py and machine.py
take the `Policy`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, Literal

import msgspec

from triform.config import convert, read_toml
from triform.errors import ConfigurationError
from triform.splitting import BASIS_POINTS, KeyRule

PROBABILITY_BINS: Final = tuple(round(i / 20, 2) for i in range(1, 20))
MOST_STEPS: Final = 20
MOST_SECONDS: Final = 90 * 86_400.0


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What all tables are."""


class Step(Struct, frozen=True):
    """A share of the keys (0.0001 to 1), and what it takes to go on: requests of the canary, seconds that were observed."""

    weight: float
    min_requests: int = 500
    min_seconds: float = 300.0


class Shadow(Struct, frozen=True):
    """A share of the requests that the new version answers, too, without anybody seeing it."""

    sample: float = 0.1
    min_requests: int = 500
    min_seconds: float = 300.0


class Errors(Struct, frozen=True):
    """`design_effect`: the least that the counts are taken to vary more than binomially (comparison.py)."""

    ratio: float = 1.0
    increase: float = 0.005
    design_effect: float = 1.0


class Latency(Struct, frozen=True):
    ratio: float = 1.2
    margin_ms: float = 1.0
    quantiles: tuple[float, ...] = (0.5, 0.95)
    design_effect: float = 1.0


class Disagreement(Struct, frozen=True):
    limit: float = 0.01
    design_effect: float = 1.0


class ScoreShift(Struct, frozen=True):
    """`edges` of the fixed bins; nothing is said before both sides have `min_rows`."""

    limit: float = 0.2
    min_rows: int = 1000
    edges: tuple[float, ...] = PROBABILITY_BINS


class Limits(Struct, frozen=True):
    error_rate: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    qps: float | None = None

    def named(self) -> dict[str, float]:
        """Those that are set."""
        return {f: v for f in self.__struct_fields__ if (v := getattr(self, f)) is not None}


class Guards(Struct, frozen=True):
    errors: Errors = Errors()
    latency: Latency | None = Latency()
    disagreement: Disagreement | None = None
    score_shift: ScoreShift | None = None
    limits: Limits = Limits()


class Policy(Struct, frozen=True):
    """`alpha`: the most that the gate's probability of rolling back a good canary is, where requests are independent
    (docs/releases.md: what is assumed); `beta`: that of promoting one beyond its limits."""

    steps: tuple[Step, ...] = (Step(weight=0.01), Step(weight=0.1), Step(weight=0.5, min_requests=2000, min_seconds=900.0))
    shadow: Shadow | None = None
    guards: Guards = Guards()
    key: KeyRule = KeyRule()
    alpha: float = 0.01
    beta: float = 0.05
    longest_seconds: float = 86_400.0
    inconclusive: Literal["rollback", "hold"] = "rollback"

    def __post_init__(self) -> None:
        _check_steps(self)
        _check_guards(self)
        _number("alpha", self.alpha, 1e-6, 0.2)
        _number("beta", self.beta, 1e-6, 0.2)
        _number("longest_seconds", self.longest_seconds, 1.0, MOST_SECONDS)
        least = sum(s.min_seconds for s in self.steps) + (self.shadow.min_seconds if self.shadow else 0.0)
        _require(
            least <= self.longest_seconds, "longest_seconds", f"at least the {least:g} that the steps take", self.longest_seconds
        )


def read_policy(path: Path) -> Policy:
    """The checked content of a `rollout.toml`. Raises `ConfigurationError`, naming the file and the key."""
    try:
        return convert(read_toml(path), Policy, str(path))
    except ConfigurationError as error:
        told = str(error)
        raise ConfigurationError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def _check_steps(policy: Policy) -> None:
    steps = policy.steps
    _require(1 <= len(steps) <= MOST_STEPS, "steps", f"1 to {MOST_STEPS}", len(steps))
    for i, step in enumerate(steps):
        _number(f"steps[{i}].weight", step.weight, 1 / BASIS_POINTS, 1.0)
        points = step.weight * BASIS_POINTS
        _require(abs(points - round(points)) < 1e-6, f"steps[{i}].weight", "a multiple of 0.0001", step.weight)
        _exposure(f"steps[{i}]", step)
    weights = [step.weight for step in steps]
    _require(weights == sorted(set(weights)), "steps", "rising weights", weights)
    _require(
        weights[-1] <= 0.95, f"steps[{len(steps) - 1}].weight", "0.95 at most, as the gate compares with stable", weights[-1]
    )
    if policy.shadow:
        _number("shadow.sample", policy.shadow.sample, 1 / BASIS_POINTS, 1.0)
        _exposure("shadow", policy.shadow)


def _exposure(key: str, step: Step | Shadow) -> None:
    _number(f"{key}.min_requests", step.min_requests, 1, 10**9)
    _number(f"{key}.min_seconds", step.min_seconds, 0.0, MOST_SECONDS)


def _check_guards(policy: Policy) -> None:
    guards = policy.guards
    _number("guards.errors.ratio", guards.errors.ratio, 1.0, 100.0)
    _number("guards.errors.increase", guards.errors.increase, 1e-5, 0.5)
    _number("guards.errors.design_effect", guards.errors.design_effect, 1.0, 1e4)
    if latency := guards.latency:
        _number("guards.latency.ratio", latency.ratio, 1.0, 100.0)
        _number("guards.latency.margin_ms", latency.margin_ms, 0.0, 1e6)
        _number("guards.latency.design_effect", latency.design_effect, 1.0, 1e4)
        _require(latency.ratio >= 1.05 or latency.margin_ms > 0, "guards.latency", "a ratio from 1.05 or a margin", latency.ratio)
        _rising("guards.latency.quantiles", latency.quantiles, 0.05, 0.99)
    if disagreement := guards.disagreement:
        _require(policy.shadow is not None, "guards.disagreement", "a [shadow] table, as shadowed rows are compared", "none")
        _number("guards.disagreement.limit", disagreement.limit, 1e-4, 0.99)
        _number("guards.disagreement.design_effect", disagreement.design_effect, 1.0, 1e4)
    if shift := guards.score_shift:
        _number("guards.score_shift.limit", shift.limit, 0.01, 10.0)
        _number("guards.score_shift.min_rows", shift.min_rows, 1000, 10**9)
        _rising("guards.score_shift.edges", shift.edges, -math.inf, math.inf)
        _require(len(shift.edges) <= 100, "guards.score_shift.edges", "100 at most", len(shift.edges))
    for name, value in guards.limits.named().items():
        _number(f"guards.limits.{name}", value, 1e-4, 0.99 if name == "error_rate" else 1e7)


def _rising(key: str, values: tuple[float, ...], low: float, high: float) -> None:
    fine = values and list(values) == sorted(set(values)) and all(math.isfinite(v) and low <= v <= high for v in values)
    between = "" if math.isinf(low) else f" from {low:g} to {high:g}"
    _require(bool(fine), key, f"rising numbers{between}", list(values))


def _number(key: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, key, f"{low:g} to {high:g}", value)  # NaN is in no range


def _require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigurationError(f"{key}: expected {expected}, got {got}")
