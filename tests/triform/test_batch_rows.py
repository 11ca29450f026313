"""A batch's rows follow from what they take up in memory, not from what the file's encoding says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triform.batch_rows import BATCH_BYTES, BATCH_ROWS, batch_rows

ROWS = 20_000


def opened(folder: Path, table: pa.Table, group: int = 5000) -> pq.ParquetFile:
    pq.write_table(table, folder / "a.parquet", row_group_size=group)
    return pq.ParquetFile(folder / "a.parquet")


def rows_of(source: pq.ParquetFile, *columns: str, **more: int) -> int:
    return batch_rows(source, range(source.num_row_groups), columns or source.schema_arrow.names, **more)


def test_narrow_rows_fill_a_batch_and_less_where_less_is_asked(tmp_path: Path) -> None:
    source = opened(tmp_path, pa.table({"a": np.arange(ROWS), "flag": np.ones(ROWS, bool)}))
    assert rows_of(source) == BATCH_ROWS
    assert rows_of(source, most=100) == 100
    assert rows_of(source, "absent") == BATCH_ROWS


def test_wide_rows_fill_the_bytes(tmp_path: Path) -> None:
    values = pa.array(np.zeros(4000 * 2000, np.float32))  # zeros: a dictionary holds them in next to nothing
    source = opened(tmp_path, pa.table({"a": pa.FixedSizeListArray.from_arrays(values, 4000)}))
    assert rows_of(source) == pytest.approx(BATCH_BYTES / 16_000, rel=0.1)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary(), pa.list_(pa.string())])
@pytest.mark.parametrize("at", [0, ROWS - 5000])
def test_long_values_that_come_again_are_seen_in_the_first_or_last_row_group(tmp_path: Path, kind: pa.DataType, at: int) -> None:
    long = ["x" * 50_000] if pa.types.is_list(kind) else "x" * 50_000
    short = [""] if pa.types.is_list(kind) else ""
    column = pa.array([long if at <= i < at + 5000 else short for i in range(ROWS)], kind)
    source = opened(tmp_path, pa.table({"a": column, "b": np.arange(ROWS)}))
    assert rows_of(source) == pytest.approx(BATCH_BYTES / 50_000, rel=0.1)


def test_one_row_is_the_least_and_no_rows_are_no_trouble(tmp_path: Path) -> None:
    assert rows_of(opened(tmp_path, pa.table({"a": ["x" * (BATCH_BYTES * 2)]}))) == 1
    empty = opened(tmp_path, pa.table({"a": pa.array([], pa.string())}))
    assert rows_of(empty) == BATCH_ROWS
    assert batch_rows(empty, [], ["a"]) == BATCH_ROWS
