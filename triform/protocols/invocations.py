"""`/invocations` as SageMaker and MLflow have it: JSON, CSV and JSON Lines in, predictions out.

    application/json        {"instances"|"inputs"|"dataframe_split"|"dataframe_records": ...} -> {"predictions": ...}
    text/csv                a header line and rows, or rows in the order of the columns       -> a line a row
    application/jsonlines   a row, a record or {"features": [...]} a line                     -> a prediction a line

Names and meanings: MLflow, "Local Inference Specification"; Amazon SageMaker, "Common Data Formats for Inference". What is
answered in is chosen by `Accept`; without one, as the request came.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from triform.content import MediaType
from triform.errors import InvalidInput, InvalidRequest, MissingValue, NotAcceptable, UnsupportedMediaType
from triform.models import Served
from triform.protocols import tfs
from triform.protocols.bodies import IN_JSON, JSON, Call, Encoded, check_count, check_values, convert, read_json, write_json
from triform.signature import Array, TensorMetadata

CSV: Final = "text/csv"
JSON_LINES: Final = "application/jsonlines"
_SAME: Final = {"application/x-jsonlines": JSON_LINES, "application/jsonl": JSON_LINES, "application/x-ndjson": JSON_LINES}
MEDIA_TYPES: Final = (JSON, CSV, JSON_LINES, *_SAME)
_ANY: Final = {"*/*": "", "application/*": JSON, "text/*": CSV}  # "": as the request came
_WORDS: Final = {"true": True, "false": False, "True": True, "False": False}
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf(inity)?|nan", re.IGNORECASE)
_SPACE: Final = " \t\r\n\v\f"
_FEATURES: Final = "features"  # what SageMaker calls the values of a row


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


def decode(body: bytes, kind: MediaType, accepts: Sequence[MediaType], served: Served) -> Call:
    """The call in a body of one of `MEDIA_TYPES` ("": JSON), to be answered in the first of `accepts` that there is.

    Raises `NotAcceptable`, `InvalidRequest` and its kinds.
    """
    sent, parameters = _SAME.get(kind[0], kind[0]) or JSON, kind[1]
    if sent not in (JSON, CSV, JSON_LINES):
        raise UnsupportedMediaType(f"content-type {sent[:80]!r}: expected {JSON}, {CSV} or {JSON_LINES}")
    said, header = _chosen(accepts, sent, parameters)
    says: dict[str, tfs.Say] = {JSON: tfs.say_rows, JSON_LINES: _say_lines, CSV: partial(_say_csv, header=header)}
    say = says[said]
    if sent == CSV:
        return _csv_call(body, parameters.get("header", ""), served, say)
    if sent == JSON_LINES:
        check_count(body, IN_JSON + b"\n")
        return tfs.rows_call(
            _rows([_line(i, line) for i, line in enumerate(body.split(b"\n"), 1) if line.strip()], served), served, say
        )
    asked = convert(read_json(body), Invocation)
    given = [asked.instances, asked.inputs, asked.dataframe_split, asked.dataframe_records]
    if sum(part is not None for part in given) != 1:
        raise InvalidRequest("expected one of instances, inputs, dataframe_split and dataframe_records")
    if asked.params:
        raise InvalidRequest("params: an ONNX model takes none")
    if asked.instances is not None:
        return tfs.rows_call(_rows(asked.instances, served), served, say)
    if asked.dataframe_records is not None:
        return tfs.records_call(asked.dataframe_records, served, say)
    if asked.dataframe_split is not None:
        return tfs.table_call(_split(asked.dataframe_split), served, say)
    return tfs.columns_call(asked.inputs, served, _say_columns if said == JSON else say)


def _chosen(accepts: Sequence[MediaType], sent: str, parameters: Mapping[str, str]) -> tuple[str, bool]:
    """The media type of the answer, and whether CSV has a header line. Raises `NotAcceptable`."""
    if not accepts:
        return sent, parameters.get("header") == "present"
    for kind, asked in accepts:
        wanted = _ANY.get(kind, _SAME.get(kind, kind)) or sent
        if wanted in (JSON, JSON_LINES, CSV):
            return wanted, asked.get("header") == "present"
    raise NotAcceptable(f"accept {accepts[0][0][:80]!r}: there is {JSON}, {CSV} or {JSON_LINES}")


def _line(number: int, line: bytes) -> Any:
    try:
        return read_json(line)
    except InvalidRequest as error:
        raise InvalidRequest(f"line {number}: {error}") from None


def _rows(rows: Sequence[Any], served: Served) -> Sequence[Any]:
    """The rows, {"features": [...]} as its values where the model has no column or input of that name."""
    if not rows or not isinstance(rows[0], dict) or list(rows[0]) != [_FEATURES]:
        return rows
    if _FEATURES in served.features.columns or any(t.name == _FEATURES for t in served.signature.inputs):
        return rows
    return [row[_FEATURES] if isinstance(row, dict) and list(row) == [_FEATURES] else row for row in rows]


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
            cells[f"{name}_{i}" if wide.shape[1] > 1 else name] = _said(column)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if header:
        writer.writerow(cells)
    writer.writerows(zip(*cells.values(), strict=True))
    return Encoded(lines.getvalue().encode(), f"{CSV}; charset=utf-8")


def _said(column: Array) -> list[str]:
    if column.dtype.kind in "OUS":  # not `astype`: numpy makes each as long as the longest
        return list(map(str, column.tolist()))
    text = column.astype(str)
    said: list[str] = (np.where(np.isnan(column), "", text) if column.dtype.kind == "f" else text).tolist()
    return said


def _split(table: Split) -> dict[str, Sequence[Any]]:
    names = table.columns
    if len(set(names)) < len(names):
        raise InvalidInput("dataframe_split: a column stands twice")
    if table.data and not names:
        raise InvalidInput(f"dataframe_split: {len(table.data)} row(s) without columns")
    for row, values in enumerate(table.data):
        if len(values) != len(names):
            raise InvalidInput(f"row {row}: {len(values)} values for {len(names)} columns", row=row)
    columns = zip(*table.data, strict=True) if table.data else [[] for _ in names]
    return {name: list(values) for name, values in zip(names, columns, strict=True)}


def _csv_call(body: bytes, header: str, served: Served, say: tfs.Say) -> Call:
    """The first line names the columns if all are in it, or `header=present` says so; else they stand in the model's order.

    Where the model's only input is a tensor that no columns are mapped to, the cells of a line are its row. An empty line is a
    row of empty cells.
    """
    check_count(body, b",\n\r")
    try:
        lines = list(csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"the body is not CSV: {error}") from None
    known, tensor = served.features.columns, served.signature.inputs[0]
    if known == [tensor.name] and len(tensor.row_shape) == 1 and tensor.row_shape != (1,):
        return Call({tensor.name: _matrix(lines[header == "present" :], tensor)}, say)
    names = known
    if lines and (header == "present" or (header != "absent" and set(known) <= set(lines[0]))):
        names, lines = lines[0], lines[1:]
    if len(set(names)) < len(names):
        raise InvalidInput("the header names a column twice")
    check_values(len(lines) * len(names))
    lines = [line or [""] * len(names) for line in lines]
    for row, line in enumerate(lines):
        if len(line) != len(names):
            raise InvalidInput(f"row {row}: {len(line)} cells for {len(names)} columns ({', '.join(names[:20])})"[:300], row=row)
    tensors = {c.name: f.tensor for f in served.features.inputs for c in f.columns}
    columns = zip(*lines, strict=True) if lines else [()] * len(names)
    return tfs.table_call(_columns(dict(zip(names, columns, strict=True)), tensors), served, say)


def _columns(texts: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorMetadata]) -> dict[str, Sequence[Any] | Array]:
    """The columns' values, of all floats at once if that can be; those that feed no tensor are passed on."""
    floats = [name for name in texts if name in tensors and tensors[name].dtype.kind == "f"]
    together = _numbers([cell for name in floats for cell in texts[name]], min((_exact(tensors[n]) for n in floats), default=0.0))
    numbers = dict(zip(floats, together.reshape(len(floats), -1), strict=True)) if together is not None and floats else {}

    def values(name: str) -> Sequence[Any] | Array:
        if name in numbers or name not in tensors:
            return numbers.get(name, texts[name])
        return _cells(texts[name], name, tensors[name])

    return {name: values(name) for name in texts}


def _matrix(lines: Sequence[Sequence[str]], tensor: TensorMetadata) -> Any:
    if not lines:
        return tensor.no_rows()
    if [] in lines:
        row = lines.index([])
        raise MissingValue(f"row {row}: the line is empty", input=tensor.name, row=row)
    width = len(lines[0])
    if wrong := next((row for row, line in enumerate(lines) if len(line) != width), None):
        raise InvalidInput(f"row {wrong}: {len(lines[wrong])} cells, row 0 has {width}", row=wrong)
    cells = _cells([cell for line in lines for cell in line], tensor.name, tensor, width)
    if isinstance(cells, np.ndarray):
        return cells.reshape(-1, width)
    if None in cells:
        row, at = divmod(cells.index(None), width)
        raise MissingValue(f"row {row}: cell {at} is empty", input=tensor.name, row=row)
    return [cells[start : start + width] for start in range(0, len(cells), width)]


def _cells(cells: Sequence[str], name: str, tensor: TensorMetadata, width: int = 1) -> list[Any] | Array:
    """Values of `width` cells a row; an empty cell is null, and a number keeps its digits."""
    if tensor.datatype == "BYTES":
        return [cell or None for cell in cells]
    if tensor.dtype.kind == "f" and (numbers := _numbers(cells, _exact(tensor))) is not None:
        return numbers
    return [_cell(cell, name, i // width) for i, cell in enumerate(cells)]


def _exact(tensor: TensorMetadata) -> float:
    """Below it a float tensor holds every integer."""
    return float(2.0 ** np.finfo(tensor.dtype).nmant)


def _numbers(cells: Sequence[str], exact: float) -> Array | None:
    """The cells as floats, all at once; None where one needs a closer look: it is empty, no number, or not below `exact`."""
    text = ",".join(cells)
    if "_" in text or not text.isascii():  # which `float` would take
        return None
    try:
        numbers = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        return None
    return numbers if (np.abs(numbers) < exact).all() else None


def _cell(cell: str, name: str, row: int) -> Any:
    if cell == "":
        return None
    text = cell.strip(_SPACE)
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and (not math.isinf(number := float(text)) or "inf" in text.lower()):
        return number
    raise InvalidInput(f"row {row}: column '{name[:80]}': {cell[:40]!r} is no number", input=name[:80], row=row)
