"""A batch that two versions share: every row once, in its place, by the version that its key means everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.canaries import build
from triform import row_split
from triform.answering import Answered, Side, answer
from triform.predictor import Predictor
from triform.row_split import RowSplit
from triform.splitting import TrafficSplit, key_of

TEXTS = [pa.string(), pa.large_string()]
NUMBERS = [pa.int64(), pa.int8(), pa.uint16()]
COLUMNS = st.one_of(
    st.builds(pa.array, st.lists(st.none() | st.text(max_size=8), max_size=30), st.sampled_from(TEXTS)),
    st.builds(pa.array, st.lists(st.none() | st.binary(max_size=8), max_size=30), st.just(pa.binary())),
    st.builds(pa.array, st.lists(st.none() | st.integers(0, 127), max_size=30), st.sampled_from(NUMBERS)),
    st.builds(pa.nulls, st.integers(0, 5)),
)
SPLITS = st.builds(TrafficSplit, st.just(1), st.just(2), st.integers(0, 10_000), st.binary(max_size=8))
ROWS = st.tuples(st.none() | st.integers(0, 50), st.none() | st.sampled_from([*range(12), 99, 100]))  # key, x
HALF, ALL = TrafficSplit(1, 2, 5000, b"salt"), TrafficSplit(1, 2, 10_000, b"salt")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Side, Side]:
    """10 * x, of 0..99 (stable) and of 0..9 (canary)."""
    repository = build(tmp_path_factory.mktemp("canaries")).repository
    stable, canary = (Side.of(Predictor.load(repository.package("lookup", version))) for version in (1, 2))
    return stable, canary


@given(COLUMNS, SPLITS, st.sampled_from([None, pa.int8(), pa.uint8(), pa.int32()]))
def test_a_column_gives_rows_to_the_version_that_a_header_gives_a_caller(
    sides: tuple[Side, Side], column: pa.Array, traffic: TrafficSplit, index: pa.DataType | None
) -> None:
    """`index`: of a column that is coded, or None."""
    given = column if index is None else column.dictionary_encode().cast(pa.dictionary(index, column.type))
    chosen = RowSplit(sides[1], traffic, "key").chosen(given)
    assert chosen.tolist() == [key is not None and traffic.choose(key_of(key)) == 2 for key in column.to_pylist()]


@pytest.mark.parametrize(("index", "words"), [(pa.int8(), 128), (pa.uint8(), 256), (pa.int32(), 5000)])
@pytest.mark.parametrize("rows", [1, 127, 5000])
def test_a_dictionary_may_be_as_long_as_its_codes_allow_and_longer_than_the_batch(
    sides: tuple[Side, Side], index: pa.DataType, words: int, rows: int
) -> None:
    numbers = [None if number == 3 else number % words for number in range(rows)]
    coded = pa.DictionaryArray.from_arrays(pa.array(numbers, index), [f"user-{i}" for i in range(words)])
    chosen = RowSplit(sides[1], HALF, "key").chosen(coded)
    assert chosen.tolist() == [n is not None and HALF.choose(f"user-{n}".encode()) == 2 for n in numbers]


@pytest.mark.parametrize(("kind", "raw"), [(pa.string(), pa.binary()), (pa.large_string(), pa.large_binary())])
def test_a_text_that_is_not_utf_8_is_a_key_by_its_bytes(sides: tuple[Side, Side], kind: pa.DataType, raw: pa.DataType) -> None:
    """A Parquet file may hold such; one of them stops no others."""
    words = [b"user-1", b"\xff\xfe", None, b"user-2"]
    chosen = RowSplit(sides[1], HALF, "key").chosen(pa.array(words, raw).view(kind))
    assert chosen.tolist() == [word is not None and HALF.choose(word) == 2 for word in words]


def test_a_canary_that_takes_too_long_is_not_asked_again(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = pa.record_batch({"key": pa.array(range(20)), "x": pa.array(range(20))})
    split = RowSplit(sides[1], ALL, "key")
    monkeypatch.setattr(row_split, "SLOWEST", 0.0)
    for seconds in -1.0, 60.0:
        monkeypatch.setattr(row_split, "PATIENCE", seconds)
        made = split.answer(sides[0], batch)
        assert made.canary is not None
        assert (made.canary.any(), made.instead) == (False, {"deadline_exceeded": 20})
        assert made.columns["y"].to_pylist() == [10.0 * x for x in range(20)]
    (told,) = caplog.messages
    assert "lookup/2 answered none of 20 rows" in told


def test_a_canary_that_is_as_slow_as_stable_has_the_time(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pa.record_batch({"key": pa.array(range(10)), "x": pa.array(range(10))})
    monkeypatch.setattr(row_split, "PATIENCE", 0.0)
    monkeypatch.setattr(row_split, "SLOWEST", 1e6)
    made = RowSplit(sides[1], ALL, "key").answer(sides[0], batch)
    assert made.canary is not None
    assert (made.canary.all(), made.instead) == (True, {})


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_canary_does_not_survive_around_its_model_is_stables_in_the_smallest_batch(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Memory that lacks for several rows may do for fewer: `score_part` tries."""

    def lacking(side: Side, *args: Any, **options: Any) -> Answered:
        if side is sides[1]:
            raise MemoryError
        return answer(side, *args, **options)

    monkeypatch.setattr(row_split, "answer", lacking)
    batch = pa.record_batch({"key": pa.array(range(rows)), "x": pa.array(range(rows))})
    split = RowSplit(sides[1], ALL, "key")
    if rows > 1:
        with pytest.raises(MemoryError):
            split.answer(sides[0], batch)
    else:
        made = split.answer(sides[0], batch)
        assert (made.columns["y"].to_pylist(), made.instead) == ([0.0], {"internal": 1})


@given(st.lists(ROWS, max_size=40), SPLITS)
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
    assert made.canary is not None
    assert made.canary.tolist() == [theirs[row] and x[row] < 10 for row in made.rows]  # type: ignore[operator]
    instead = sum(theirs[row] and x[row] >= 10 for row in made.rows)  # type: ignore[operator]
    assert made.instead == ({"run_failed": instead} if instead else {})
