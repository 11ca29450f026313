"""Reference distributions: shares that can be checked by counting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.baseline import BINS, COMMONEST, Reference, baseline


def test_evenly_spread_numbers_fill_ten_equal_bins() -> None:
    made = baseline({"x": list(range(1000))})["x"]
    assert made.edges == pytest.approx([99.9 * i for i in range(1, BINS)])
    assert made.shares == (0.1,) * BINS


@given(st.lists(st.one_of(st.none(), st.integers(-5, 5), st.floats()), min_size=1, max_size=60))
def test_shares_are_what_counting_gives(values: list[float | None]) -> None:
    made = baseline({"x": values})["x"]
    present = [v for v in values if v is not None and not math.isnan(v)]
    finite = [v for v in present if math.isfinite(v)]
    assert made.rows == len(values)
    assert made.nulls == pytest.approx(1 - len(present) / len(values), abs=1e-6)
    assert list(made.edges) == sorted(set(made.edges))
    bounds = [-math.inf, *made.edges, math.inf]
    counted = [sum(low <= v < high for v in finite) for low, high in itertools.pairwise(bounds)]
    assert made.shares == pytest.approx([n / len(finite) for n in counted] if finite else [], abs=1e-6)


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        (["b", "a", "b", None], Reference(4, 0.25, values=("b", "a"), shares=(0.666667, 0.333333))),
        (["z", "a"], Reference(2, 0.0, values=("a", "z"), shares=(0.5, 0.5))),
        ([None, None], Reference(2, 1.0)),
        ([], Reference(0, 0.0)),
        ([7, 7, 7], Reference(3, 0.0, edges=(7.0,), shares=(0.0, 1.0))),
        ([True, False], Reference(2, 0.0, edges=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), shares=(0.5, *(0.0,) * 8, 0.5))),
        ([math.inf, None], Reference(2, 0.5)),
    ],
)
def test_text_ties_and_nothing(values: list[Any], reference: Reference) -> None:
    made = baseline({"x": values})["x"]
    assert made.edges == pytest.approx(reference.edges)
    assert (made.rows, made.nulls, made.values, made.shares) == (
        reference.rows,
        reference.nulls,
        reference.values,
        reference.shares,
    )


def test_rare_words_are_left_to_the_rest() -> None:
    words = [f"{i:03}" for i in range(200)] + ["common"] * 200
    made = baseline({"x": words})["x"]
    assert (made.values[0], made.shares[0], len(made.values)) == ("common", 0.5, COMMONEST)


@pytest.mark.parametrize("values", [[[1, 2], [3, 4]], ["a", 1], [{}]])
def test_what_has_no_distribution_is_left_out(values: list[Any]) -> None:
    assert list(baseline({"x": values, "y": [1.0]})) == ["y"]
