"""CSV and JSON Lines as Parquet, so that a run over them is a run like any other: one way of scoring, one kind of dead letter.

    an object's bytes -> lines -> columns, typed as the model needs them -> a local Parquet file -> Converted.open -> scoring
                      lines, cells and values that do not fit -> Unread -> dead letters, with the line as it came

A row that cannot be read stays a row (of nulls), so that row numbers are the file's. Columns that the model does not read are
typed by what is in them, as Arrow does it. An empty cell of CSV is null, and nothing else is: "NA" may be a country.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from triform.errors import InputChanged, InputUnreadable, InvalidInput
from triform.features import Feature, Features
from triform.runs.inputs import InputFile, RowGroup
from triform.signature import TensorMetadata, cast
from triform.sources import Identity, Source, Sources, Unread

ROW_GROUP: Final = 65_536
INTEGER: Final = r"^-?[0-9]{1,18}$"
DECIMAL: Final = r"^[+-]?([0-9]{1,15}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$"  # no integer in it loses digits in FP64
SMALL: Final = 127  # every numeric type holds the integers up to it
_WORDS: Final = {"true": True, "false": False, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "+inf": math.inf}


class Converted(Sources):
    """Sources in which one location stands for the Parquet file that was made of it."""

    def __init__(self, location: str, identity: Identity, parquet: Path, unread: Mapping[int, Unread]) -> None:
        super().__init__()
        self._location, self._identity, self._parquet, self._unread = location, identity, parquet, unread

    @contextmanager
    def open(self, location: str, expected: Identity | None = None, text: Sequence[str] = ()) -> Iterator[Source]:
        if location != self._location or (expected is not None and expected != self._identity):
            raise InputChanged(f"{location} is not the file that was planned; start the job anew for its present content")
        with super().open(str(self._parquet), None, text) as source:
            yield Source(location, source.parquet, unread=self._unread)

    def file(self) -> tuple[InputFile, pa.Schema]:
        """The location as an input of a plan, and its schema."""
        with super().open(str(self._parquet)) as source:
            metadata = source.parquet.metadata
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            rows = tuple(RowGroup(group.num_rows, group.total_byte_size) for group in groups)
            return InputFile(self._location, self._identity.size, self._identity.fingerprint, rows), source.schema


def convert(content: bytes, location: str, identity: Identity, features: Features, parquet: Path) -> Converted:
    """Writes the rows of CSV or JSON Lines, by the location's ending, to a Parquet file. Raises `InputUnreadable`."""
    reader = READERS.get(ending(location))
    if reader is None:
        raise InputUnreadable(f"{location}: unknown kind of file; it must end in .parquet, {', '.join(READERS)}")
    try:
        table, unread = reader(content, features)
        pq.write_table(table, parquet, row_group_size=ROW_GROUP)
    except (InvalidInput, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputUnreadable(f"{location}: {error}") from error
    return Converted(location, identity, parquet, unread)


def ending(location: str) -> str:
    """`.csv` of a location that ends with it."""
    return Path(location.rpartition("/")[2]).suffix.lower()


def _json_lines(content: bytes, features: Features) -> tuple[pa.Table, dict[int, Unread]]:
    records: list[dict[str, Any]] = []
    unread: dict[int, Unread] = {}
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    for row, line in enumerate(lines):
        try:
            record = orjson.loads(line)
        except ValueError as error:
            record = {}
            unread[row] = Unread(InvalidInput.code, f"the line is no JSON: {error}", _as_text(line))
        if not isinstance(record, dict):
            record = {}
            unread[row] = Unread(InvalidInput.code, "the line is no object of named columns", _as_it_is(line))
        records.append(record)
    models = _by_column(features)
    columns = {}
    for name in dict.fromkeys([*(key for record in records for key in record), *models]):
        values = [record.get(name) for record in records]
        if name in models:
            columns[name], bad = _fitting(values, models[name])
            for row, reason in bad.items():
                unread.setdefault(row, Unread(InvalidInput.code, f"column '{name}': {reason}", _as_it_is(lines[row])))
        else:
            columns[name] = _guessed(values)
    return pa.table(columns), unread


def _csv(content: bytes, features: Features) -> tuple[pa.Table, dict[int, Unread]]:
    ragged: dict[int, Unread] = {}

    def skip(row: Any) -> str:
        reason = f"the line has {row.actual_columns} cells, {row.expected_columns} are expected"
        ragged[row.number - 2] = Unread(InvalidInput.code, reason, _as_text(row.text.encode()))  # the header is line 1
        return "skip"

    models = _by_column(features)
    table = pyarrow.csv.read_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # else rows have no numbers
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(models, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    ).combine_chunks()
    rows = iter(range(table.num_rows))
    table = table.take(pa.array([None if i in ragged else next(rows) for i in range(table.num_rows + len(ragged))], pa.int64()))
    unread = dict(ragged)
    typed = table
    for name in [name for name in models if table.schema.names.count(name) == 1 and models[name].tensor.datatype != "BYTES"]:
        column, bad = _parsed(table.column(name).combine_chunks(), models[name])
        for row, reason in bad.items():
            raw = orjson.dumps(table.slice(row, 1).to_pylist()[0], default=str).decode()
            unread.setdefault(row, Unread(InvalidInput.code, f"column '{name}': {reason}", raw))
        typed = typed.set_column(table.schema.get_field_index(name), name, column)
    return typed, unread


READERS: Final[Mapping[str, Callable[[bytes, Features], tuple[pa.Table, dict[int, Unread]]]]] = {
    ".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines,
}  # fmt: skip


def _by_column(features: Features) -> dict[str, Feature]:
    return {column.name: feature for feature in features.inputs for column in feature.columns}


def _parsed(cells: pa.Array, feature: Feature) -> tuple[pa.Array, dict[int, str]]:
    """A column of text as numbers, and what is wrong with the cells that are none, by row."""
    trimmed = pc.utf8_trim_whitespace(cells)
    for kind, pattern in (pa.int64(), INTEGER), (pa.float64(), DECIMAL):
        if pc.all(pc.match_substring_regex(trimmed, pattern), min_count=0).as_py():
            return trimmed.cast(kind), {}
    return _fitting([None if cell is None else _cell(cell) for cell in trimmed.to_pylist()], feature)


def _cell(cell: str) -> Any:
    """A number with all its digits, or the text where it is none."""
    if (word := _WORDS.get(cell.lower())) is not None:
        return word
    if re.fullmatch(r"[+-]?[0-9]{1,30}", cell):
        return int(cell)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", cell) and math.isfinite(number := float(cell)):
        return number
    return cell


def _fitting(values: list[Any], feature: Feature) -> tuple[pa.Array, dict[int, str]]:
    """A column of values in a type that can feed the tensor, and what is wrong with those that have another, by row.

    What becomes of a value does not depend on the others: it is what a record that stands alone gives.
    """
    tensor, depth = feature.tensor, _depth(values, feature)
    rows = values
    if depth and feature.scalar:  # a value by itself is as good as the list of it
        rows = [value if value is None or isinstance(value, list) else [value] for value in values]
    misfits = [row for row, value in enumerate(rows) if not _fits(value, depth, tensor)]
    bad = {row: f"{str(values[row])[:80]!r} does not fit {tensor}" for row in misfits}
    rows = [None if row in bad else value for row, value in enumerate(rows)]
    kind = _kind(rows, tensor)
    if tensor.datatype != "BYTES" and not pa.types.is_boolean(kind):
        number = float if pa.types.is_floating(kind) else int
        rows = [_each(number, value) for value in rows]
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.array(rows, kind), bad


def _depth(values: list[Any], feature: Feature) -> int:
    """Of the lists in a row's value."""
    if not feature.scalar:
        return len(feature.tensor.row_shape)
    return int(feature.tensor.row_shape == (1,) and len(feature.columns) == 1 and any(isinstance(v, list) for v in values))


def _fits(value: Any, depth: int, tensor: TensorMetadata) -> bool:
    """Whether a row's value is null, or lists `depth` deep of what the tensor can hold; shapes are seen to when it is scored."""
    if value is None:
        return True
    if depth:
        return (
            isinstance(value, list)
            and all(item is not None or depth == 1 for item in value)
            and all(_fits(item, depth - 1, tensor) for item in value)
        )
    if tensor.datatype == "BYTES":
        return isinstance(value, str)
    if not isinstance(value, int | float) or (isinstance(value, bool) and tensor.datatype == "BOOL"):
        return isinstance(value, bool)
    if isinstance(value, int) and 0 <= value <= SMALL:
        return tensor.dtype.kind != "b" or value in (0, 1)
    try:
        cast([value], tensor)
    except (InvalidInput, OverflowError):
        return False
    return True


def _kind(values: list[Any], tensor: TensorMetadata) -> pa.DataType:
    if tensor.datatype == "BYTES":
        return pa.string()
    if tensor.dtype.kind == "f":
        whole = all(isinstance(leaf, int) and abs(leaf) < 2**63 for leaf in _leaves(values) if leaf is not None)
        return pa.int64() if whole else pa.float64()
    if tensor.datatype == "BOOL" and all(isinstance(leaf, bool) for leaf in _leaves(values) if leaf is not None):
        return pa.bool_()
    return pa.uint64() if tensor.datatype == "UINT64" else pa.int64()


def _each(number: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_each(number, item) for item in value]
    return None if value is None else number(value)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value)
        else:
            yield value


def _guessed(values: list[Any]) -> pa.Array:
    """A column that the model does not read: typed by its values, or their JSON where these have no type in common."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else orjson.dumps(value).decode() for value in values], pa.string())


def _as_text(line: bytes) -> str:
    """A line that is no JSON, as JSON."""
    return orjson.dumps(line.decode(errors="backslashreplace")).decode()


def _as_it_is(line: bytes) -> str:
    return line.strip().decode()
