"""Sketches and windows: what merging keeps, how exact times are, and what cannot be."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.errors import InvalidInput
from triform.rollout.windows import (
    FASTEST,
    SLOWEST,
    Arm,
    Shadowed,
    Sketch,
    Window,
    bins_of,
    bins_of_runs,
    edge,
    merge,
    rows_bucket,
    score_bins,
)

SECONDS = st.floats(1e-6, 1000.0)
EDGES = [edge(index) for index in range(FASTEST, SLOWEST + 1)]


def bin_of(seconds: float) -> int:
    """As its definition says: edge(bin) < seconds <= edge(bin + 1); the first and the last have all that is beyond them."""
    return max(FASTEST, FASTEST - 1 + bisect_left(EDGES, seconds))


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_exact_to_a_bin(times: list[float], share: float) -> None:
    exact = sorted(times)[math.ceil(share * len(times)) - 1]
    found = Sketch.of(times).quantile(share)
    assert found is not None
    assert exact * (1 - 1e-9) <= found <= exact * 1.0221 or found <= edge(bin_of(exact) + 1)


@given(st.lists(SECONDS, max_size=50), st.lists(SECONDS, max_size=50))
def test_merging_is_as_if_one_had_seen_it_all(one: list[float], other: list[float]) -> None:
    windows = [
        Window(step=0, seconds=1.0, canary=Arm(request_seconds=Sketch.of(t), execute={2: Sketch.of(t)})) for t in (one, other)
    ]
    both = merge(windows).canary
    assert both.request_seconds == both.execute[2] == Sketch.of([*one, *other])
    assert merge(windows) == merge(windows[::-1])


@given(st.lists(SECONDS, max_size=50), st.integers(-600, 300))
def test_above_counts_what_is_longer_than_an_edge(times: list[float], index: int) -> None:
    limit = edge(index)
    assert Sketch.of(times).above(limit) == sum(bin_of(t) >= index for t in times)


def test_windows_of_replicas_add_up() -> None:
    one = Window(
        step=1, seconds=15.0, canary=Arm(requests=10, errors=1, scores=(1, 2)),
        shadowed=Shadowed(requests=1, rows=3, disagreed=1), expected=3,
    )  # fmt: skip
    both = merge([one, msgspec.structs.replace(one, seconds=15.2, expected=2)])
    assert both.canary == Arm(requests=20, errors=2, scores=(2, 4))
    assert both.shadowed == Shadowed(requests=2, rows=6, disagreed=2)
    assert (both.seconds, both.reported, both.expected, both.complete) == (15.2, 2, 3, False)
    assert msgspec.json.decode(msgspec.json.encode(both), type=Window) == both
    for other in msgspec.structs.replace(one, step=0), msgspec.structs.replace(one, canary=Arm(scores=(1, 2, 3))):
        with pytest.raises(InvalidInput, match="cannot be merged"):
            merge([one, other])
    with pytest.raises(InvalidInput):
        merge([])


def test_buckets_of_rows_double() -> None:
    assert [rows_bucket(rows) for rows in (0, 1, 2, 3, 4, 5, 8, 9, 256, 257, 10**6)] == [0, 0, 1, 2, 2, 3, 3, 4, 8, 9, 9]


def test_scores_are_counted_in_their_bins_and_nan_by_itself() -> None:
    values = [-1.0, 0.0, 0.5, 0.99, 1.0, math.nan, math.inf]
    assert score_bins(values, (0.0, 0.5, 1.0)) == (1, 1, 2, 2, 1)
    assert score_bins(np.array([]), (0.0,)) == (0, 0, 0)


@pytest.mark.parametrize("time", [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(time: float) -> None:
    with pytest.raises(InvalidInput):
        Sketch.of([time])


FAULTS: list[dict[str, Any]] = [
    {"seconds": 0.0}, {"seconds": math.nan}, {"seconds": math.inf}, {"step": -2}, {"reported": -1},
    {"canary": Arm(requests=1, errors=2)}, {"stable": Arm(requests=-1)}, {"canary": Arm(scores=(1, -1))},
    {"canary": Arm(execute={0: Sketch({0: -1})})}, {"canary": Arm(execute={10: Sketch()})},
    {"stable": Arm(request_seconds=Sketch({10**6: 1}))}, {"shadowed": Shadowed(requests=1, rows=1, disagreed=2)},
]  # fmt: skip


@pytest.mark.parametrize("change", FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_window_that_cannot_be_says_so(change: dict[str, Any]) -> None:
    good = Window(step=0, seconds=15.0)
    assert (good.fault(), good.complete) == (None, True)
    bad = msgspec.structs.replace(good, **change)
    assert bad.fault()
    assert not bad.complete


@given(times=st.lists(st.floats(0, 1e6) | st.sampled_from([edge(i) for i in range(FASTEST - 2, SLOWEST + 2, 7)]), max_size=50))
def test_many_times_have_the_bins_that_each_has(times: list[float]) -> None:
    assert Sketch.of(times).bins == Counter(map(bin_of, times))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_one_wrong_time_among_many_is_none(wrong: float) -> None:
    with pytest.raises(InvalidInput):
        bins_of([0.1, wrong, 0.2])


@given(runs=st.lists(st.tuples(st.integers(0, 1000), SECONDS), max_size=50))
def test_many_runs_have_the_buckets_and_bins_that_each_has(runs: list[tuple[int, float]]) -> None:
    found = bins_of_runs([rows for rows, _ in runs], [seconds for _, seconds in runs])
    seen = {bucket: Sketch.counted(bins).bins for bucket, bins in enumerate(found) if bins.any()}
    wanted: dict[int, Counter[int]] = {}
    for rows, seconds in runs:
        wanted.setdefault(rows_bucket(rows), Counter())[bin_of(seconds)] += 1
    assert seen == wanted
