"""That the bets are fair: e-values by exact expectation, rollouts by simulation with the benchmark's own scenarios."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rollout import LONG, SAME, SHORT, WORSE, Scenario, simulate, upper
from triform.rollout.comparison import design_effect
from triform.rollout.evalues import Counts, Line, log_evalues, log_pace_evalues
from triform.rollout.policy import Policy

ALPHA = Policy().alpha
SHARES = st.floats(0.0, 1.0)


def binomial(n: int, p: float) -> np.ndarray:
    from math import comb

    return np.array([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


@settings(max_examples=150, deadline=None)
@given(
    canary=st.integers(1, 12),
    stable=st.integers(0, 12),
    p_stable=SHARES,
    distance=st.floats(0.0, 0.5),
    expected=st.floats(0.001, 0.9),
    ratio=st.sampled_from([0.0, 1.0, 1.3]),
    increase=st.sampled_from([0.0, 0.005, 0.1]),
    beyond=st.booleans(),
)
def test_a_bet_wins_nothing_on_average_while_the_claim_is_false(
    canary: int, stable: int, p_stable: float, distance: float, expected: float, ratio: float, increase: float, beyond: bool
) -> None:
    """The expectation of the e-value, summed over every outcome, at and inside the hypothesis it is a bet against."""
    increase = max(increase, 0.005) if ratio == 0 else increase
    limit = ratio * p_stable + increase
    p_canary = min(max(limit - distance if beyond else limit + distance, 0.0), 1.0)
    if (beyond and p_canary > limit) or (not beyond and p_canary < limit):
        return  # the line is outside of what a probability can be
    x, y = (grid.ravel().astype(float) for grid in np.meshgrid(np.arange(canary + 1), np.arange(stable + 1), indexing="ij"))
    counts = Counts(x, np.full_like(x, canary), y, np.full_like(x, stable))
    logs = log_evalues(counts, np.full_like(x, expected), Line(ratio, increase), beyond=beyond)
    chances = np.outer(binomial(canary, p_canary), binomial(stable, p_stable)).ravel()
    assert (chances @ np.exp(logs) <= 1 + 1e-4).all()


def test_a_bet_on_a_pace_is_fair_too() -> None:
    draws = np.random.default_rng(0).poisson(50 * 2.0, 200_000).astype(float)
    mean = np.exp(log_pace_evalues(draws, np.full_like(draws, 2.0), 50.0, beyond=True)).mean(axis=0)
    assert (mean[:2] < 1.05).all()
    slow = np.random.default_rng(0).poisson(25 * 2.0, 100).astype(float)
    assert log_pace_evalues(slow, np.full_like(slow, 2.0), 50.0, beyond=True).sum(axis=0).max() > 100


@pytest.mark.parametrize("cluster", [1, 5, 20])
def test_the_design_effect_is_seen_from_the_windows(cluster: int) -> None:
    rng = np.random.default_rng(cluster)
    sides = [side for n in (200, 800) for side in (cluster * rng.binomial(n // cluster, 0.1, (300, 200)), np.full((300, 200), n))]
    found = design_effect(Counts(*(s.astype(float) for s in sides)), assumed=3.0, least=1.0)[:, -1].mean()
    assert 0.9 * cluster <= found <= 1.8 * cluster


def check(scenario: Scenario, rollouts: int) -> None:
    found = simulate(scenario, rollouts, seed=7)
    share = found.by(sum(SHORT))
    assert share <= ALPHA or upper(share, rollouts) <= 2 * ALPHA, f"{scenario.name}: {share:.2%}"


@pytest.mark.parametrize("scenario", SAME, ids=[s.name for s in SAME])
def test_a_good_canary_is_hardly_ever_rolled_back(scenario: Scenario) -> None:
    check(scenario, 300)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SAME, ids=[s.name for s in SAME])
def test_of_10_000_good_canaries_at_most_one_in_a_hundred_is_rolled_back(scenario: Scenario) -> None:
    assert simulate(scenario, 10_000, seed=11).by(sum(SHORT)) <= ALPHA


@pytest.mark.parametrize(("name", "least"), [("errors 1% -> 3%", 0.9), ("latency x 1.5", 0.95), ("errors 1% -> 10%", 1.0)])
def test_a_bad_canary_is_found(name: str, least: float) -> None:
    scenario = next(s for s in WORSE if s.name == name)
    found = simulate(scenario, 100, LONG)
    assert found.by(sum(LONG)) >= least
    assert found.promoted.mean() <= 0.05
