"""Made-up traffic: what replicas would have measured of a canary that is as good or bad as asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from triform.releases import Canary, Release, Shadow
from triform.repository import ModelRepository
from triform.rollout.evidence import Evidence
from triform.rollout.gate import judge
from triform.rollout.policy import Policy
from triform.rollout.windows import SHADOW, Arm, Shadowed, Sketch, Window, score_bins


def arm(
    rng: np.random.Generator,
    requests: int,
    *,
    errors: float = 0.01,
    seconds: float = 0.01,
    slow: float = 1.0,
    buckets: Sequence[int] = (0, 3),
    edges: Sequence[float] = (),
    scores: tuple[float, float] = (2.0, 2.0),
) -> Arm:
    """`slow`: how many times as long as `seconds` a run takes; `scores`: the parameters of a beta distribution."""
    spread = slow * seconds * np.exp(0.4 * rng.standard_normal((len(buckets), requests // len(buckets) + 1)))
    return Arm(
        requests=requests,
        errors=int(rng.binomial(requests, errors)),
        request_seconds=Sketch.of(1.3 * slow * seconds * np.exp(0.4 * rng.standard_normal(requests))),
        execute={b: Sketch.of(times * (1 + b)) for b, times in zip(buckets, spread, strict=True)} if requests else {},
        scores=score_bins(rng.beta(*scores, requests), edges) if edges else (),
    )


def windows(
    policy: Policy, step: int, *, number: int = 20, requests: int = 1000, seconds: float = 30.0, seed: int = 0,
    disagree: float = 0.0, stable: dict[str, Any] | None = None, **canary: Any,
) -> list[Window]:  # fmt: skip
    """`number` windows of one step, each with `requests` of both sides together."""
    rng = np.random.default_rng((seed, step + 1))
    weight = policy.shadow.sample if step == SHADOW and policy.shadow else policy.steps[step].weight
    edges = policy.guards.score_shift.edges if policy.guards.score_shift else ()
    made = []
    for _ in range(number):
        of_canary = int(rng.binomial(requests, weight))
        rows = of_canary if step == SHADOW else 0
        made.append(
            Window(
                step=step,
                seconds=seconds,
                stable=arm(rng, requests - (0 if rows else of_canary), edges=edges, **(stable or {})),
                canary=arm(rng, of_canary, edges=edges, **canary),
                shadowed=Shadowed(requests=rows, rows=rows, disagreed=int(rng.binomial(rows, disagree))),
            )
        )
    return made


def of_a_run(repository: ModelRepository, policy: Policy, number: int = 10, **canary: Any) -> Evidence:
    """What a batch run's comparison of `linear`'s versions 1 and 2 says, in no time."""
    seen = [msgspec.structs.replace(w, seconds=0.1) for w in windows(policy, SHADOW, number=number, **canary)]
    stable, other = (repository.package("linear", version).manifest.digest for version in (1, 2))
    return Evidence(
        model="linear", stable=1, canary=2, at="2026-11-29T02:00:00Z", policy=policy, windows=tuple(seen),
        verdict=judge(policy, seen, SHADOW, 1.0), digests=(stable, other),
    )  # fmt: skip


def release(
    stable: int = 1, canary: float | None = None, shadow: float | None = None, *, version: int = 2, revision: int = 1
) -> Release:
    return Release(
        revision=revision, stable=stable, previous=None, canary=None if canary is None else Canary(version, canary),
        shadow=None if shadow is None else Shadow(version, shadow), salt="s", nonce="n", reason="because", changed_by="ann",
        changed_at="",
    )  # fmt: skip
