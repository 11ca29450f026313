"""A batch that two versions share: every row once, in its place, by the version that its key means everywhere."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.canaries import build
from triform.answering import Side
from triform.predictor import Predictor
from triform.row_split import CANARY, INSTEAD, STABLE, RowSplit
from triform.splitting import TrafficSplit, key_of

KEYS = st.one_of(
    st.lists(st.none() | st.text(max_size=8), max_size=30), st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=30)
)
SPLITS = st.builds(TrafficSplit, st.just(1), st.just(2), st.integers(0, 10_000), st.binary(max_size=8))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Side, Side]:
    """10 * x, of 0..99 (stable) and of 0..9 (canary)."""
    repository = build(tmp_path_factory.mktemp("canaries")).repository
    stable, canary = (Side.of(Predictor.load(repository.package("lookup", version))) for version in (1, 2))
    return stable, canary


@given(KEYS, SPLITS, st.booleans())
def test_a_column_gives_rows_to_the_version_that_a_header_gives_a_caller(
    sides: tuple[Side, Side], keys: list[str | int | None], traffic: TrafficSplit, coded: bool
) -> None:
    column = pa.array(keys, pa.string() if all(isinstance(key, str | None) for key in keys) else pa.int64())
    chosen = RowSplit(sides[1], traffic, "key").chosen(column.dictionary_encode() if coded else column)
    assert chosen.tolist() == [key is not None and traffic.choose(key_of(key)) == 2 for key in keys]


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 50), st.none() | st.sampled_from([*range(12), 99, 100])), max_size=40), SPLITS
)
def test_every_row_is_answered_or_refused_once_and_in_its_place(
    sides: tuple[Side, Side], rows: list[tuple[int | None, int | None]], traffic: TrafficSplit
) -> None:
    keys, x = [key for key, _ in rows], [value for _, value in rows]
    batch = pa.record_batch({"key": pa.array(keys, pa.int64()), "x": pa.array(x, pa.int64())})
    made = RowSplit(sides[1], traffic, "key").answer(sides[0], batch)
    assert sorted([*made.rows.tolist(), *(r.row for r in made.refused)]) == list(range(len(rows)))
    assert np.all(np.diff(made.rows) > 0)
    assert made.columns["y"].to_pylist() == [10.0 * x[row] for row in made.rows]  # type: ignore[operator]
    assert {r.row: r.code for r in made.refused} == {
        row: "missing_value" if value is None else "run_failed" for row, value in enumerate(x) if value in (None, 100)
    }
    theirs = [key is not None and traffic.choose(key_of(key)) == 2 for key in keys]
    expected = [(CANARY if x[row] < 10 else INSTEAD) if theirs[row] else STABLE for row in made.rows]  # type: ignore[operator]
    assert made.by is not None
    assert made.by.tolist() == expected
