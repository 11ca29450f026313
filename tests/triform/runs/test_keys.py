"""Duplicate keys are found exactly: against a naive count over values of every kind."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triform.runs import keys

PREFIX = "a-prefix-of-more-than-eight-bytes-"
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(["", "\0", "\0\0", "ü"])
KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int64": (pa.int64(), st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1)),
    "uint64": (pa.uint64(), st.integers(0, 3) | st.integers(0, 2**64 - 1)),
    "int8": (pa.int8(), st.integers(-128, 127)),
    "bool": (pa.bool_(), st.booleans()),
    "text": (pa.string(), TEXT),
    "large text": (pa.large_string(), TEXT),
    "shared prefixes": (pa.string(), st.text("ab", max_size=3).map(lambda end: PREFIX + end)),
    "long text": (pa.string(), st.integers(0, 3).map(lambda n: "x" * (1000 + n))),
    "binary": (pa.binary(), st.binary(max_size=20)),
    "words": (pa.dictionary(pa.int32(), pa.string()), st.sampled_from("abc")),
    "float64": (pa.float64(), st.floats() | st.sampled_from([0.0, -0.0, math.nan, math.inf])),
    "float32": (pa.float32(), st.floats(width=32) | st.sampled_from([0.0, -0.0, -math.nan])),
    "timestamp": (pa.timestamp("us", tz="America/New_York"), st.datetimes(timezones=st.just(datetime.UTC))),
    "date": (pa.date32(), st.dates()),
    "decimal": (pa.decimal128(20, 2), st.decimals(-1000, 1000, places=2)),
    "list": (pa.list_(pa.int64()), st.lists(st.integers(0, 2), max_size=3)),
    "struct": (pa.struct({"a": pa.int8()}), st.fixed_dictionaries({"a": st.integers(0, 2)})),
}


def write(path: Path, columns: dict[str, pa.Array]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def twice(rows: list[tuple[Any, ...]]) -> Counter[int]:
    """How often each repeated key stands there: the counts, without the keys."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            return "NaN"
        return str(value) if isinstance(value, list | dict) else value

    return Counter(n for n in Counter(tuple(map(plain, row)) for row in rows).values() if n > 1)


def duplicates(files: list[Path], key: list[str], **options: Any) -> list[tuple[tuple[Any, ...], int]]:
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    return keys.duplicates([str(file) for file in files], key, lambda name: Path(name).open("rb"), rows=rows, **options)


def found(files: list[Path], key: list[str]) -> Counter[int]:
    return Counter(n for _, n in duplicates(files, key, most=10**6))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_one_column_against_a_naive_count(tmp_path_factory: Any, kind: str, data: st.DataObject) -> None:
    arrow, values = KINDS[kind]
    rows = data.draw(st.lists(st.none() | values, max_size=40))
    cut = data.draw(st.integers(0, len(rows)))
    folder = tmp_path_factory.mktemp("keys")
    files = [write(folder / f"{i}", {"k": pa.array(some, arrow)}) for i, some in enumerate((rows[:cut], rows[cut:]))]
    assert found(files, ["k"]) == twice([(row,) for row in rows])


@given(st.lists(st.tuples(st.none() | st.integers(0, 2), st.none() | st.text("ab", max_size=2), st.booleans()), max_size=40))
def test_several_columns_are_one_key(tmp_path_factory: Any, rows: list[tuple[Any, ...]]) -> None:
    types = pa.int64(), pa.string(), pa.bool_()
    columns = {name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(zip("abc", types, strict=True))}
    file = write(tmp_path_factory.mktemp("keys") / "in", columns)
    assert found([file], ["a", "b", "c"]) == twice(rows)
    assert found([file], ["c", "a"]) == twice([(row[2], row[0]) for row in rows])


def test_the_order_of_columns_and_the_border_between_them_matter(tmp_path: Path) -> None:
    file = write(tmp_path / "in", {"a": pa.array(["ab", "a", "x", "y"]), "b": pa.array(["c", "bc", "y", "x"])})
    assert duplicates([file], ["a", "b"]) == []


def test_examples_are_named_the_commonest_first(tmp_path: Path) -> None:
    file = write(tmp_path / "in", {"a": pa.array([1] * 3 + [2] * 5 + [3] + [None] * 2), "b": pa.array(["x"] * 11)})
    assert duplicates([file], ["a", "b"]) == [((2, "x"), 5), ((1, "x"), 3), ((None, "x"), 2)]
    assert duplicates([file], ["a"], most=1) == [((2,), 5)]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([b"\xff\xfe"] * 2, pa.binary(2)),
        pa.array([b"\xff\xfe"] * 2, pa.binary()).view(pa.string()),
        pa.array([10**18] * 2, pa.timestamp("us")),
        pa.array(["a"] * 2, pa.string_view()),
        pa.array([[{"a": 1}]] * 2),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16] * 2, pa.binary(16))),
        pa.nulls(2),
    ],
    ids=lambda v: str(v.type),
)
def test_odd_kinds_of_keys(tmp_path: Path, values: pa.Array) -> None:
    assert [n for _, n in duplicates([write(tmp_path / "in", {"k": values})], ["k"])] == [2]


def test_many_files_are_read_side_by_side_and_each_once(tmp_path: Path) -> None:
    files = [write(tmp_path / str(i), {"k": pa.array([2 * i, 2 * i + 1, 99])}) for i in range(3 * keys.AT_ONCE + 1)]
    opened: list[str] = []

    def open_file(name: str) -> BinaryIO:
        opened.append(name)
        return Path(name).open("rb")

    assert keys.duplicates([str(file) for file in files], ["k"], open_file, rows=3 * len(files)) == [((99,), len(files))]
    assert Counter(opened) == {str(file): 2 for file in files}  # once to find what may be twice, once to compare


def test_no_files_and_no_rows(tmp_path: Path) -> None:
    assert duplicates([], ["k"]) == []
    assert duplicates([write(tmp_path / "in", {"k": pa.array([], pa.int64())})], ["k"]) == []


@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(keys.SPLIT_BITS, 64))
def test_buckets_hold_every_hash_once_by_its_bits(hashes: list[int], bits: int) -> None:
    buckets = keys._split(np.array(hashes, dtype=np.uint64), bits)
    assert len(buckets) == 1 << keys.SPLIT_BITS
    assert sorted(np.concatenate(buckets).tolist()) == sorted(hashes)
    for number, bucket in enumerate(buckets):
        assert all(int(value) >> (bits - keys.SPLIT_BITS) & (len(buckets) - 1) == number for value in bucket)


@pytest.mark.parametrize("most", [1, 5, 100])
def test_more_rows_than_are_sorted_at_once_are_split_until_they_fit(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "BUCKET_ROWS", most)
    repeated = [*range(1000), *range(0, 1000, 100), *[7] * 500]
    file = write(tmp_path / "in", {"k": pa.array(repeated)})
    found = duplicates([file], ["k"], most=100, scratch=tmp_path)
    assert dict(found) == {(7,): 501} | {(k,): 2 for k in range(0, 1000, 100)}
    assert list(tmp_path.glob("triform-keys-*")) == []


def test_hashes_spread_evenly() -> None:
    """Keys that count up, or share a prefix, fill the buckets alike."""
    for column in pa.array(range(100_000)), pa.array([f"{PREFIX}{i:08d}" for i in range(100_000)]):
        hashes = keys.hash_rows(pa.RecordBatch.from_arrays([column], ["k"]))
        assert len(np.unique(hashes)) == 100_000
        sizes = [len(bucket) for bucket in keys._split(hashes, 64)]
        assert min(sizes) > 0.8 * 100_000 / len(sizes)
