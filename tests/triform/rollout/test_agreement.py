"""Whether two versions' answers agree: numbers within a tolerance, everything else only if it is equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.golden import Tolerance
from triform.rollout.agreement import apart, widest

NAN, INF = np.nan, np.inf
TOLERANCE = Tolerance(atol=0.1, rtol=0.01)


def is_apart(first: Any, second: Any, *, kinds: tuple[str, str] = ("f4", "f4")) -> bool:
    found = apart(np.array([first], kinds[0]), np.array([second], kinds[1]), TOLERANCE)
    return bool(found.mask[0])


@pytest.mark.parametrize(
    ("first", "second", "disagree"),
    [
        (1.0, 1.0, False),
        (1.0, 1.1, False),
        (1.0, 1.2, True),
        (100.0, 101.0, False),  # 0.1 + 1% of 100
        (100.0, 101.2, True),
        (0.0, -0.0, False),
        (NAN, NAN, False),
        (NAN, 1.0, True),
        (1.0, NAN, True),
        (INF, INF, False),
        (INF, -INF, True),
        (INF, 1.0, True),  # although 1% of infinity would do
        (1.0, INF, True),
        (INF, NAN, True),
    ],
)
def test_floats(first: float, second: float, disagree: bool) -> None:
    assert is_apart(first, second) is disagree
    assert is_apart(first, second, kinds=("f8", "f4")) is disagree


@pytest.mark.parametrize(
    ("first", "second", "kinds", "disagree"),
    [
        (3, 3, ("i8", "i4"), False),
        (100, 101, ("i8", "i8"), True),  # classes know no tolerance
        (2**62, 2**62 + 1, ("i8", "i8"), True),  # which are the same as floats
        (2**63, -(2**63), ("u8", "i8"), True),
        (True, True, ("?", "?"), False),
        (True, False, ("?", "?"), True),
        (1, 1.05, ("i8", "f4"), False),
        ("a", "a", ("O", "O"), False),
        ("a", "A", ("O", "O"), True),
        ("1", 1, ("O", "i8"), True),
    ],
)
def test_others(first: Any, second: Any, kinds: tuple[str, str], disagree: bool) -> None:
    assert is_apart(first, second, kinds=kinds) is disagree


def test_the_differences_are_finite_whatever_comes() -> None:
    found = apart(np.array([1.0, 2.0, INF, NAN, 1e308]), np.array([1.5, NAN, -INF, 0.0, -1e308]), TOLERANCE)
    assert found.by.tolist() == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert found.share.tolist() == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert found.mask.all()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_an_answer_agrees_with_itself(values: list[float]) -> None:
    array = np.array(values, np.float32)
    found = apart(array, array.copy(), Tolerance(0.0, 0.0))
    assert not found.mask.any()
    assert not found.by.any()


def test_the_wider_tolerance_of_both_counts() -> None:
    assert widest([Tolerance(1e-6, 1e-3), Tolerance(1e-4, 1e-5)]) == Tolerance(1e-4, 1e-3)
    assert widest([]) == Tolerance(0.0, 0.0)
