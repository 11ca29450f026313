"""Shapes, and when requests are due."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.order import Stage
from loadtests.shapes import SECONDS, SHAPES, arrivals, level, stages
from triform.errors import ConfigurationError


@pytest.mark.parametrize("shape", SHAPES)
def test_stages_follow_one_another_over_all_of_the_time(shape: str) -> None:
    made = stages(shape, 80)
    assert made[0].begin == 0
    assert made[-1].end == pytest.approx(80)
    for before, after in pairwise(made):
        assert after.begin == pytest.approx(before.end)
    assert max(stage.level for stage in made) == pytest.approx(1.0, abs=0.01)
    assert shape in SECONDS


@given(st.sampled_from([*SHAPES]), st.floats(1, 500), st.floats(0.1, 30), st.integers(0, 5))
def test_arrivals_rise_and_keep_to_stages_in_which_there_are_any(shape: str, rate: float, seconds: float, seed: int) -> None:
    made = stages(shape, seconds)
    due = [*arrivals(made, rate, random.Random(seed))]
    assert due == sorted(due)
    assert all(0 <= at < made[-1].end for at in due)
    assert all(level(made, at) > 0 for at in due)


def test_arrivals_come_as_often_as_the_rate_says_whoever_shares_them() -> None:
    """Poisson: the number's variance is its mean, and the gaps' deviation their mean."""
    over = (Stage(0, 500, 0.5), Stage(500, 500, 1.0))
    alone = [*arrivals(over, 40, random.Random(7))]
    shared = sorted(at for seed in range(4) for at in arrivals(over, 10, random.Random(seed)))
    for due in alone, shared:
        early = [at for at in due if at < 500]
        assert len(early) == pytest.approx(10_000, abs=400)
        assert len(due) - len(early) == pytest.approx(20_000, abs=600)
        gaps = [b - a for a, b in pairwise(early)]
        mean = sum(gaps) / len(gaps)
        assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.05)


def test_a_burst_has_a_pause_that_ray_serve_notices() -> None:
    pauses = [stage.seconds for stage in stages("burst", SECONDS["burst"]) if stage.level == 0]
    assert max(pauses) > 12 + 12 + 10, "Serve looks back twelve seconds, then waits twelve, then takes its time"


def test_nothing_is_asked_before_or_after() -> None:
    made = stages("spike", 10)
    assert (level(made, -0.1), level(made, 10.0)) == (0.0, 0.0)
    assert level(made, 5) == 1.0


@pytest.mark.parametrize(("shape", "seconds"), [("square", 10), ("", 10), ("soak", 0), ("soak", -1), ("soak", float("nan"))])
def test_a_shape_that_is_none_is_refused(shape: str, seconds: float) -> None:
    with pytest.raises(ConfigurationError):
        stages(shape, seconds)
