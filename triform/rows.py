"""Rows out of a user's file, by its ending, as a model's input tensors: what `--samples` and `triform predict` read.

    .json    [{column: value, ...}, ...]  or {"instances": [...]}      .jsonl   one object a line
    .csv     a header line, then rows                                   .parquet
    .npz     one array of shape [rows, ...] by input name

Unlike a batch job this is all or nothing: a row that does not fit raises, naming the row.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from triform import arrow
from triform.errors import InvalidInput, MissingValue, by_code
from triform.features import Features
from triform.signature import Array, rows_of

MAX_FILE_BYTES: Final = 4 << 30


class Rows(NamedTuple):
    """`columns` holds the named columns as Python values where the file has columns (a npz has none)."""

    inputs: dict[str, Array]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return rows_of(self.inputs)


def read(path: Path, features: Features) -> Rows:
    """The file's rows. Raises `InvalidInput` naming the file, and the column and row at fault."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidInput(f"{path}: unknown kind of file; it must end in one of {', '.join(_READERS)}")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES >> 30} GB; score it with a batch job")
        return reader(path, features)
    except InvalidInput as error:
        message = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise type(error)(message, input=error.input, row=error.row) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # ArrowInvalid, JSONDecodeError: ValueErrors
        raise InvalidInput(f"{path}: cannot be read: {error}") from error


def _json(path: Path, features: Features) -> Rows:
    content = orjson.loads(path.read_bytes())
    if isinstance(content, dict) and isinstance(content.get("instances"), list):
        content = content["instances"]
    if not isinstance(content, list):
        raise InvalidInput('expected a list of objects, or {"instances": [...]}')
    return _records(content, features)


def _json_lines(path: Path, features: Features) -> Rows:
    return _records([_json_line(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()], features)


def _json_line(number: int, line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"line {number}: {error}") from error


def _records(records: list[Any], features: Features) -> Rows:
    inputs = features.from_records(records)
    return Rows(inputs, {c: [r.get(c) for r in records] for c in features.columns})


def _csv(path: Path, features: Features) -> Rows:
    """An empty cell is null, and nothing else is: "NA" may be a country. Numbers that Arrow would not guess right are named."""
    named = {"BYTES": pa.string(), "UINT64": pa.uint64()}
    types = {c.name: named[f.tensor.datatype] for f in features.inputs if f.tensor.datatype in named for c in f.columns}
    convert = pa.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    return _table(pa.csv.read_csv(path, convert_options=convert), features)


def _parquet(path: Path, features: Features) -> Rows:
    file = pq.ParquetFile(path)
    arrow.check_schema(features.inputs, file.schema_arrow)
    return _table(file.read(columns=features.columns), features)


def _table(table: pa.Table, features: Features) -> Rows:
    arrow.check_schema(features.inputs, table.schema)
    table = table.select(features.columns).combine_chunks()
    batch = table.to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema=table.schema)
    encoded = arrow.encode(features, batch)
    if encoded.refused:
        first = encoded.refused[0]
        kind = by_code(first.code)
        raise (kind if issubclass(kind, MissingValue) else InvalidInput)(f"row {first.row}: {first.reason}", row=first.row)
    return Rows(encoded.inputs, table.to_pydict())


def _npz(path: Path, features: Features) -> Rows:
    if not zipfile.is_zipfile(path):
        raise InvalidInput("not a npz file of plain arrays")
    with np.load(path, allow_pickle=False) as stored:
        return Rows(features.signature.validate({name: stored[name] for name in stored.files}), {})


_READERS: Final[Mapping[str, Callable[[Path, Features], Rows]]] = {
    ".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet, ".npz": _npz,
}  # fmt: skip
