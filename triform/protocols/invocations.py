"""`/invocations` as SageMaker and MLflow have it: JSON, CSV and JSON Lines in, predictions out.

    application/json        {"instances"|"inputs"|"dataframe_split"|"dataframe_records": ...} -> {"predictions": ...}
    text/csv                a header line and rows, or rows in the order of the columns       -> rows
    application/jsonlines   a row or a record a line                                          -> a prediction a line

Names and meanings: MLflow, "Local Inference Specification"; Amazon SageMaker, "Common Data Formats for Inference". What is
answered in is chosen by `Accept`; without one, as the request came.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from triform.errors import InvalidInput, InvalidRequest, NotAcceptable, UnsupportedMediaType
from triform.protocols import tfs
from triform.protocols.bodies import Call, Encoded, convert, read_json, write_json
from triform.service import Served
from triform.signature import Array

JSON: Final = "application/json"
CSV: Final = "text/csv"
JSON_LINES: Final = "application/jsonlines"
_SAME: Final = {
    "": JSON,
    "application/x-jsonlines": JSON_LINES,
    "application/jsonl": JSON_LINES,
    "application/x-ndjson": JSON_LINES,
}
_ANY: Final = {"*/*": "", "application/*": JSON, "text/*": CSV}  # "": as the request came
_WORDS: Final = {"true": True, "false": False, "True": True, "False": False}


class Split(msgspec.Struct):
    """A table as pandas' `to_dict(orient="split")` has it."""

    columns: list[str]
    data: list[list[Any]]
    index: list[Any] | None = None


class Invocation(msgspec.Struct):
    """Exactly one of the four. `params` is MLflow's, and an ONNX model takes none."""

    instances: list[Any] | None = None
    inputs: Any = None
    dataframe_split: Split | None = None
    dataframe_records: list[Any] | None = None
    params: dict[str, Any] | None = None


def decode(body: bytes, kind: str, parameters: Mapping[str, str], accept: str, served: Served) -> Call:
    """The call in a body of the given media type. Raises `UnsupportedMediaType`, `NotAcceptable`, `InvalidRequest`'s kinds."""
    kind = _SAME.get(kind, kind)
    if kind not in (JSON, CSV, JSON_LINES):
        raise UnsupportedMediaType(f"content-type {kind[:80]!r}: expected {JSON}, {CSV} or {JSON_LINES}")
    if parameters.get("charset", "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("charset: expected UTF-8")
    say = _say(accept, kind, parameters)
    if kind == CSV:
        return tfs.table_call(_csv(body, parameters.get("header", ""), served), served, say)
    if kind == JSON_LINES:
        return tfs.rows_call([read_json(line) for line in body.split(b"\n") if line.strip()], served, say)
    asked = convert(read_json(body), Invocation)
    given = [asked.instances, asked.inputs, asked.dataframe_split, asked.dataframe_records]
    if sum(part is not None for part in given) != 1:
        raise InvalidRequest("expected one of instances, inputs, dataframe_split and dataframe_records")
    if asked.params:
        raise InvalidRequest("params: an ONNX model takes none")
    if asked.instances is not None:
        return tfs.rows_call(asked.instances, served, say)
    if asked.dataframe_records is not None:
        return tfs.records_call(asked.dataframe_records, served, say)
    if asked.dataframe_split is not None:
        return tfs.table_call(_split(asked.dataframe_split), served, say)
    return tfs.columns_call(asked.inputs, served, _say_columns if say is tfs.say_rows else say)


def _say(accept: str, kind: str, parameters: Mapping[str, str]) -> tfs.Say:
    """How the answer is said: the caller's first choice of what there is."""
    choices = [part.strip().lower() for part in accept.split(",") if part.strip()]
    for choice in choices or ["*/*"]:
        wanted, _, rest = choice.partition(";")
        wanted = _ANY.get(wanted.strip(), _SAME.get(wanted.strip(), wanted.strip())) or kind
        if wanted == JSON:
            return tfs.say_rows
        if wanted == JSON_LINES:
            return _say_lines
        if wanted == CSV:
            return partial(_say_csv, header="header=present" in rest or (not choices and parameters.get("header") == "present"))
    raise NotAcceptable(f"accept {accept[:80]!r}: there is {JSON}, {CSV} or {JSON_LINES}")


def _say_columns(answer: Mapping[str, Array]) -> Encoded:
    return Encoded(write_json({"predictions": tfs.columns_of(answer)}))


def _say_lines(answer: Mapping[str, Array]) -> Encoded:
    return Encoded(b"".join(write_json(row) + b"\n" for row in tfs.rows_of(answer)), JSON_LINES)


def _say_csv(answer: Mapping[str, Array], *, header: bool) -> Encoded:
    """A line a row; an array within a row fills several cells. NaN is an empty cell."""
    cells: dict[str, list[str]] = {}
    for name, array in answer.items():
        wide = array.reshape(len(array), -1) if array.size else array.reshape(len(array), 0 if array.ndim > 1 else 1)
        for i, column in enumerate(wide.T):
            text = column.astype(str)
            cells[f"{name}_{i}" if wide.shape[1] > 1 else name] = np.where(text == "nan", "", text).tolist()
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if header:
        writer.writerow(cells)
    writer.writerows(zip(*cells.values(), strict=True))
    return Encoded(lines.getvalue().encode(), f"{CSV}; charset=utf-8")


def _split(table: Split) -> dict[str, Sequence[Any]]:
    names = table.columns
    if len(set(names)) < len(names):
        raise InvalidInput("dataframe_split: a column stands twice")
    for row, values in enumerate(table.data):
        if len(values) != len(names):
            raise InvalidInput(f"row {row}: {len(values)} values for {len(names)} columns", row=row)
    columns = zip(*table.data, strict=True) if table.data else [[] for _ in names]
    return {name: list(values) for name, values in zip(names, columns, strict=True)}


def _csv(body: bytes, header: str, served: Served) -> dict[str, Sequence[Any]]:
    """The columns, by the first line where it names them (or `header=present` says that it does), else by their order."""
    try:
        lines = [line for line in csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"the body is not CSV: {error}") from None
    known = served.features.columns
    names = known
    if lines and (header == "present" or (header != "absent" and not set(known).isdisjoint(lines[0]))):
        names, lines = lines[0], lines[1:]
        if len(set(names)) < len(names):
            raise InvalidInput("the header names a column twice")
    for row, line in enumerate(lines):
        if len(line) != len(names):
            raise InvalidInput(f"row {row}: {len(line)} cells for {len(names)} columns ({', '.join(names[:20])})", row=row)
    text = {c.name for f in served.features.inputs if f.tensor.datatype == "BYTES" for c in f.columns}
    columns = zip(*lines, strict=True) if lines else [()] * len(names)
    return {
        name: [_cell(cell, name, row, text=name in text) for row, cell in enumerate(column)]
        for name, column in zip(names, columns, strict=True)
        if name in known
    }


def _cell(cell: str, name: str, row: int, *, text: bool) -> Any:
    """An empty cell is null; a number keeps its digits."""
    if cell == "":
        return None
    if text:
        return cell
    if cell in _WORDS:
        return _WORDS[cell]
    try:
        return int(cell) if cell.lstrip("+-").isdecimal() and len(cell) < 30 else float(cell)
    except ValueError:
        raise InvalidInput(f"row {row}: column '{name}': {cell[:40]!r} is no number", input=name, row=row) from None
