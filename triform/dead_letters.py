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
from triform.errors import InputUnreadable

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
    source: pq.ParquetFile,
    *,
    source_file: str,
    row_groups: Sequence[int],
    first_row: int,
    letters: Sequence[DeadLetter],
    key: Sequence[str],
    footer: Mapping[str, Any],
    most_rows: int = BATCH_ROWS,
) -> None:
    """Writes the letters, sorted by row, with all columns of their rows: only row groups that hold one are read again, at most
    `most_rows` at a time."""
    schema = schema_for(source.schema_arrow, key)
    with sink(path, schema) as writer:
        for some, rows in _with_rows(source, source_file, row_groups, sorted(letters, key=lambda d: d.row), most_rows):
            columns = {
                "source_file": [source_file] * len(some),
                "row_number": [first_row + d.row for d in some],
                "code": [d.code for d in some],
                "reason": [d.reason for d in some],
                "raw_row": [_json(row) for row in _raw_rows(rows)],
            }
            keys = [rows.column(name) for name in key]
            arrays = [*keys, *(pa.array(values, schema.field(name).type) for name, values in columns.items())]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        writer.add_key_value_metadata({FOOTER_KEY: orjson.dumps(footer)})


def _with_rows(
    source: pq.ParquetFile, name: str, row_groups: Sequence[int], letters: Sequence[DeadLetter], most_rows: int
) -> Iterator[tuple[list[DeadLetter], pa.RecordBatch]]:
    """The letters, some at a time, each with its row."""
    start, pending = 0, list(letters)
    for group in row_groups:
        rows = source.metadata.row_group(group).num_rows
        if pending and pending[0].row < start + rows:
            at = start
            with unreadable(name, [group]):
                size = batch_rows(source, [group], source.schema_arrow.names, most=most_rows)
            for batch in read(source, name, size, [group]):
                mine = [d for d in pending[: batch.num_rows] if d.row < at + batch.num_rows]
                if mine:
                    yield mine, batch.take(pa.array([d.row - at for d in mine]))
                    pending = pending[len(mine) :]
                at += batch.num_rows
        start += rows


def read(
    source: pq.ParquetFile, name: str, rows: int, row_groups: Sequence[int], columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The row groups in batches of up to `rows`. Raises `InputUnreadable`, with the file's name, for pages that are damaged."""
    batches = source.iter_batches(rows, row_groups=row_groups, columns=columns, use_threads=False)
    while True:
        with unreadable(name, row_groups):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch.cast(pa.schema(map(plain_field, batch.schema)))


@contextmanager
def unreadable(name: str, row_groups: Sequence[int]) -> Iterator[None]:
    """Raises `InputUnreadable` for what Arrow raises."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputUnreadable(f"{name}: row groups {list(row_groups)}: {error}") from error


def plain_field(field: pa.Field) -> pa.Field:
    """Without metadata; Arrow's text and binary views, of which it can take no rows yet, as plain text and binary."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return field.with_type(plain.get(field.type, field.type)).remove_metadata()


@contextmanager
def sink(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file in the making; on leaving it is complete and synced to disk."""
    text = [f.name for f in schema if pa.types.is_string(f.type) or f.name.startswith("_")]
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd", compression_level=1, use_dictionary=text) as writer:
            yield writer
        file.flush()
        os.fsync(file.fileno())


def _raw_rows(rows: pa.RecordBatch) -> list[dict[str, Any]]:
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
    return orjson.dumps(_finite(row), default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()


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
