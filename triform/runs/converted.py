"""CSV and JSON Lines as Parquet, so that a run over them is a run like any other: one way of scoring, one kind of dead letter.

    an object's bytes -> lines -> columns, typed as the model needs them -> a local Parquet file -> Converted.open -> scoring
                      lines, cells and values that do not fit -> Unread -> dead letters, with the line as it came

A row that cannot be read stays a row (of nulls), so that row numbers are the file's. Columns that the model does not read are
typed by what is in them, as Arrow does it; objects stay JSON. An empty cell of CSV is null, and nothing else is: "NA" may be a
country. An empty line is a row of empty cells; one of JSON Lines, where it could be no row, is passed over.

Memory is a small multiple of the content's size, whatever is in it: a file with more columns, cells or bad lines than below is
refused as a whole.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from triform.errors import InputChanged, InputUnreadable, InvalidInput, InvalidRequest
from triform.features import Feature, Features
from triform.protocols.bodies import read_json
from triform.runs.inputs import InputFile, RowGroup
from triform.runs.typed import Refuse, fitting, guessed, parsed
from triform.sources import Identity, Source, Sources, Unread

ROW_GROUP: Final = 65_536
MAX_COLUMNS: Final = 4096
MAX_UNREAD: Final = 100_000  # rows: a file with more of them is not what its ending says
FEW_CELLS: Final = 1 << 20  # rows times columns that any file may have; beyond, at most one for each of its bytes
MAX_DEPTH: Final = 200  # of the lists and objects in a line: well below what orjson writes
_NOTHING: Final[dict[str, Any]] = {}


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


class _Faults:
    """What is wrong with the rows that cannot be read, the first fault of each."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    @property
    def too_many(self) -> bool:
        return len(self.reasons) > MAX_UNREAD

    def add(self, row: int, reason: str) -> None:
        """Raises `InvalidInput` where there are too many."""
        self.reasons.setdefault(row, reason)
        self.check()

    def check(self) -> None:
        if self.too_many:
            row, reason = next(iter(self.reasons.items()))
            raise InvalidInput(f"more than {MAX_UNREAD:,} rows cannot be read; row {row}: {reason}")

    def in_column(self, name: str) -> Refuse:
        return lambda row, reason: self.add(row, f"column '{name}': {reason}")

    def unread(self, raw: Iterable[tuple[int, str]]) -> dict[int, Unread]:
        """The rows with what is told of them: `raw` has each one's JSON."""
        return {row: Unread(InvalidInput.code, self.reasons[row], text) for row, text in raw}


def _json_lines(content: bytes, features: Features) -> tuple[pa.Table, dict[int, Unread]]:
    models, faults = _by_column(features), _Faults()
    names: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    for row, line in _lines(content):
        record: dict[str, Any] = {}
        try:
            record = _record(line)
        except InvalidRequest as error:
            faults.add(row, str(error))
        records.append(record or _NOTHING)
        names.update(dict.fromkeys(record))
        _check_size(len(names), len(records), len(content))
    columns = {}
    for name in {**names, **dict.fromkeys(models)}:
        values = [record.get(name) for record in records]
        if name in models:
            columns[name] = fitting(values, models[name], faults.in_column(name))
        else:
            columns[name] = guessed(values)
    return pa.table(columns), faults.unread((row, _raw(line)) for row, line in _lines(content) if row in faults.reasons)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    lines = io.BytesIO(content.removeprefix(b"\xef\xbb\xbf"))
    return enumerate(line.rstrip(b"\r\n") for line in lines if line.strip())


def _record(line: bytes) -> dict[str, Any]:
    """The line's columns. Raises `InvalidRequest`."""
    record = read_json(line, "the line")
    if not isinstance(record, dict):
        raise InvalidInput("the line is no object of named columns")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth_of(record) > MAX_DEPTH:
        raise InvalidInput(f"the line is nested more than {MAX_DEPTH} levels deep")
    return record


def _depth_of(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        lists = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in lists for item in items if isinstance(item, dict | list)]
        depth += 1
    return depth


def _check_size(columns: int, rows: int, size: int) -> None:
    """Raises `InvalidInput` where the table would be out of all proportion to the content of so many bytes."""
    if columns > MAX_COLUMNS:
        raise InvalidInput(f"more than {MAX_COLUMNS:,} columns")
    if columns * rows > max(FEW_CELLS, size):
        raise InvalidInput(
            f"{columns:,} columns by {rows:,} rows or more in {size:,} bytes, most of it empty: leave out what is not needed"
        )


def _csv(content: bytes, features: Features) -> tuple[pa.Table, dict[int, Unread]]:
    models, faults = _by_column(features), _Faults()
    header = re.match(rb"[^\r\n]*", content)
    _check_size(header[0].count(b",") + 1 if header else 0, 0, len(content))
    ragged: dict[int, str] = {}

    def skip(line: Any) -> str:
        row = line.number - 2  # the header is line 1
        faults.reasons[row] = f"the line has {line.actual_columns} cells, {line.expected_columns} are expected"
        ragged[row] = _as_text(line.text.encode())
        return "error" if faults.too_many else "skip"

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(content),
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # else rows have no numbers
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(models, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        ).combine_chunks()
    except pa.ArrowInvalid:
        faults.check()
        raise
    if ragged:
        rows = iter(range(table.num_rows))
        places = [None if i in ragged else next(rows) for i in range(table.num_rows + len(ragged))]
        table = table.take(pa.array(places, pa.int64()))
    typed = table
    for name in [name for name in models if table.schema.names.count(name) == 1 and models[name].tensor.datatype != "BYTES"]:
        column = parsed(table.column(name).combine_chunks(), models[name], faults.in_column(name))
        typed = typed.set_column(table.schema.get_field_index(name), name, column)
    return typed, faults.unread((row, ragged.get(row) or _cells(table, row)) for row in faults.reasons)


def _cells(table: pa.Table, row: int) -> str:
    return orjson.dumps(table.slice(row, 1).to_pylist()[0], default=str).decode()


READERS: Final[Mapping[str, Callable[[bytes, Features], tuple[pa.Table, dict[int, Unread]]]]] = {
    ".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines,
}  # fmt: skip


def _by_column(features: Features) -> dict[str, Feature]:
    return {column.name: feature for feature in features.inputs for column in feature.columns}


def _raw(line: bytes) -> str:
    """A line as it came, or as JSON text where it is no JSON."""
    try:
        orjson.loads(line)
    except ValueError:
        return _as_text(line)
    return line.strip().decode()


def _as_text(line: bytes) -> str:
    return orjson.dumps(line.decode(errors="backslashreplace")).decode()
