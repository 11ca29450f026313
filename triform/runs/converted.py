"""CSV and JSON Lines as Parquet, so that a run over them is a run like any other: one way of scoring, one kind of dead letter.

    an object's bytes -> lines -> columns, typed as the model needs them -> a local Parquet file -> Converted.open -> scoring
                      lines, cells and values that do not fit -> Unread -> dead letters, with the line as it came

A row that cannot be read stays a row (of nulls), so that row numbers are the file's. Columns that the model does not read are
typed by what is in them, as Arrow does it. An empty cell of CSV is null, and nothing else is: "NA" may be a country.
"""

from __future__ import annotations

import io
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
from triform.sources import Identity, Source, Sources, Unread

ROW_GROUP: Final = 65_536
INTEGERS: Final = (pa.int64(), pa.uint64())


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
    except (InvalidInput, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputUnreadable(f"{location}: {error}") from error
    pq.write_table(table, parquet, row_group_size=ROW_GROUP)
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
    for name in [name for name in models if table.schema.names.count(name) == 1 and models[name].tensor.datatype != "BYTES"]:
        column, bad = _parsed(table.column(name).combine_chunks(), models[name])
        for row, cell in bad.items():
            raw = orjson.dumps(table.slice(row, 1).to_pylist()[0], default=str).decode()
            unread.setdefault(row, Unread(InvalidInput.code, f"column '{name}': {cell[:80]!r} is no number", raw))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table, unread


READERS: Final[Mapping[str, Callable[[bytes, Features], tuple[pa.Table, dict[int, Unread]]]]] = {
    ".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines,
}  # fmt: skip


def _by_column(features: Features) -> dict[str, Feature]:
    return {column.name: feature for feature in features.inputs for column in feature.columns}


def _parsed(cells: pa.Array, feature: Feature) -> tuple[pa.Array, dict[int, str]]:
    """A column of text as numbers, and the cells that are none, by row."""
    kinds = (pa.bool_(), *INTEGERS, pa.float64()) if feature.tensor.datatype == "BOOL" else (*INTEGERS, pa.float64(), pa.bool_())
    trimmed = pc.utf8_trim_whitespace(cells)
    for kind in kinds:
        try:
            return trimmed.cast(kind), {}
        except pa.ArrowInvalid:
            continue
    values: list[float | None] = []
    bad: dict[int, str] = {}
    for row, cell in enumerate(trimmed.to_pylist()):
        try:
            values.append(None if cell is None else float(cell))
        except ValueError:
            values.append(None)
            bad[row] = cell
    return pa.array(values, pa.float64()), bad


def _fitting(values: list[Any], feature: Feature) -> tuple[pa.Array, dict[int, str]]:
    """A column of JSON values in a type that can feed the tensor, and what is wrong with those that have another, by row."""
    kind = _kind(values, feature)
    try:
        return pa.array(values, kind), {}
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        bad = {row: told for row, value in enumerate(values) if (told := _misfit(value, kind, feature)) is not None}
        return pa.array([None if row in bad else value for row, value in enumerate(values)], kind), bad


def _misfit(value: Any, kind: pa.DataType, feature: Feature) -> str | None:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return f"{str(value)[:80]!r} does not fit {feature.tensor}"
    return None


def _kind(values: list[Any], feature: Feature) -> pa.DataType:
    """Integers keep every digit where the whole column has them; one that is mixed with fractions is FP64."""
    depth = 0 if feature.scalar else len(feature.tensor.row_shape)
    if feature.tensor.datatype == "BYTES":
        kind = pa.string()
    else:
        seen = {type(leaf) for leaf in _leaves(values)} - {type(None), str, dict, list}
        wide = any(isinstance(leaf, int) and leaf > 2**63 - 1 for leaf in _leaves(values))
        kind = pa.bool_() if seen == {bool} else pa.float64() if float in seen else pa.uint64() if wide else pa.int64()
        kind = pa.float64() if seen == {bool, int} else kind  # Arrow takes true for 1 among floats only
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


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
