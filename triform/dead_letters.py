"""Rows that were not scored, as Parquet: where each came from, why, and its raw row, to be mended and redriven."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from triform.batch_rows import BATCH_ROWS, batch_rows
from triform.sources import Source, plain_field, unreadable

FOOTER_KEY: Final = b"triform"
COLUMNS: Final = {
    "source_file": pa.string(), "row_number": pa.int64(), "code": pa.string(), "reason": pa.string(), "raw_row": pa.string(),
}  # fmt: skip


class DeadLetter(msgspec.Struct, frozen=True):
    row: int  # in the part, from 0
    code: str
    reason: str


def schema_for(source: pa.Schema, key: Sequence[str]) -> pa.Schema:
    """The key columns, then `source_file`, `row_number` (in that file, from 0), `code`, `reason`, `raw_row` (JSON)."""
    return pa.schema([*(plain_field(source.field(name)) for name in key), *COLUMNS.items()])


def write(
    path: Path,
    source: Source,
    *,
    row_groups: Sequence[int],
    first_row: int,
    letters: Sequence[DeadLetter],
    known: pa.Table | None = None,
    key: Sequence[str],
    footer: Mapping[str, Any],
    most_rows: int = BATCH_ROWS,
) -> None:
    """Writes the letters, sorted by row, with all columns of their rows.

    `known` has, in that order, the columns of these rows that are at hand. The others are read again, and only in row groups
    that hold a letter, at most `most_rows` at a time.
    """
    schema = schema_for(source.schema, key)
    with sink(path, schema) as writer:
        for some, rows in _with_rows(source, row_groups, sorted(letters, key=lambda d: d.row), known, most_rows):
            columns = {
                "source_file": [source.name] * len(some),
                "row_number": [first_row + d.row for d in some],
                "code": [d.code for d in some],
                "reason": [d.reason for d in some],
                "raw_row": [
                    source.unread[first_row + d.row].raw if first_row + d.row in source.unread else _json(row)
                    for d, row in zip(some, _raw_rows(rows), strict=True)
                ],
            }
            keys = [rows.column(name) for name in key]
            arrays = [*keys, *(pa.array(values, schema.field(name).type) for name, values in columns.items())]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        writer.add_key_value_metadata({FOOTER_KEY: orjson.dumps(footer)})


def _with_rows(
    source: Source, row_groups: Sequence[int], letters: Sequence[DeadLetter], known: pa.Table | None, most_rows: int
) -> Iterator[tuple[list[DeadLetter], pa.RecordBatch]]:
    """The letters, some at a time, each with its row."""
    columns = source.schema.names
    unknown = None if known is None else [column for column in columns if column not in known.schema.names]
    if known is not None and not unknown:
        for first in range(0, len(letters), most_rows):
            some = list(letters[first : first + most_rows])
            yield some, _batch(known.slice(first, len(some)), columns)
        return
    start, pending = 0, list(letters)
    for group in row_groups:
        rows = source.parquet.metadata.row_group(group).num_rows
        if pending and pending[0].row < start + rows:
            at = start
            with unreadable(source.name, [group]):
                size = batch_rows(source.parquet, [group], unknown or columns, most=most_rows)
            for batch in source.batches(size, [group], unknown):
                mine = [d for d in pending[: batch.num_rows] if d.row < at + batch.num_rows]
                if mine:
                    rows_again = batch.take(pa.array([d.row - at for d in mine]))
                    first = len(letters) - len(pending)
                    yield mine, rows_again if known is None else _together(rows_again, known.slice(first, len(mine)), columns)
                    pending = pending[len(mine) :]
                at += batch.num_rows
        start += rows


def _together(read_again: pa.RecordBatch, known: pa.Table, columns: Sequence[str]) -> pa.RecordBatch:
    """The same rows' columns from both, in the given order."""
    for name, values in zip(read_again.schema.names, read_again.columns, strict=True):
        known = known.append_column(name, values)
    return _batch(known, columns)


def _batch(table: pa.Table, columns: Sequence[str]) -> pa.RecordBatch:
    (batch,) = table.select(columns).combine_chunks().to_batches()
    return batch


@contextmanager
def sink(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file in the making; on leaving it is complete and synced to disk."""
    text = [f.name for f in schema if pa.types.is_string(f.type) or f.name.startswith("_")]
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd", compression_level=1, use_dictionary=text) as writer:
            yield writer
        file.flush()
        os.fsync(file.fileno())


def decoded(rows: pa.RecordBatch, but: Sequence[str] = ()) -> pa.RecordBatch:
    """The rows with plain columns in place of dictionaries, except for the named ones."""
    fields = zip(rows.schema.names, rows.columns, strict=True)
    plain = [c.dictionary_decode() if pa.types.is_dictionary(c.type) and name not in but else c for name, c in fields]
    return pa.RecordBatch.from_arrays(plain, names=rows.schema.names)


def _raw_rows(rows: pa.RecordBatch) -> list[dict[str, Any]]:
    rows = decoded(rows)
    try:
        return cast(list[dict[str, Any]], rows.to_pylist())
    except (ValueError, OverflowError):  # Python has no text that is not UTF-8 and no year after 9999
        return [{name: _value(rows.column(name)[i]) for name in rows.schema.names} for i in range(rows.num_rows)]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        if pa.types.is_nested(cell.type):
            return f"<{cell.type} that JSON cannot hold>"
        return cell.cast(pa.string()).cast(pa.binary()).as_py().decode(errors="backslashreplace")


def _json(row: Mapping[str, Any]) -> str:
    simple = all(math.isfinite(v) if isinstance(v, float) else not isinstance(v, Mapping | list | tuple) for v in row.values())
    return orjson.dumps(row if simple else _finite(row), default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()


def _finite(value: Any) -> Any:
    """NaN and infinity as the text "nan", "inf" and "-inf": JSON has neither, and null would be another value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """What orjson does not write by itself: bytes as hex digits, the rest (decimals, durations) as text."""
    return value.hex() if isinstance(value, bytes) else str(value)
