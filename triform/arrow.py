"""Arrow batches <-> tensors: `features.py`'s mapping for columnar data, without a Python loop over rows.

    RecordBatch -> encode -> Encoded(tensors of the rows that fit, refused rows with reasons) -> Predictor.run
    output tensors -> to_arrow -> columns

A numeric column of the tensor's own dtype without nulls is passed on without a copy; stacked columns are written once into
their [rows, F]. Text goes through Arrow's dictionary to numpy `U`, which ONNX Runtime reads several times faster than objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from triform.buffers import from_numpy, to_numpy
from triform.config import DEAD_LETTER, Column
from triform.errors import InvalidInput, MissingValue
from triform.features import Feature, Features, OutputColumn, column_of, null_value
from triform.signature import Array, TensorMetadata, unrepresentable

Mask = NDArray[np.bool_]
MAX_TEXT_WIDTH: Final = 64  # characters up to which text becomes numpy `U` (4 bytes each); longer text stays objects


class Refused(NamedTuple):
    """A row that does not become a tensor: `row` counts from 0 in its batch; `code` is the error class's."""

    row: int
    code: str
    reason: str


class Encoded(NamedTuple):
    """`inputs` hold the rows where `keep` is true, all of them where it is None; `refused` the others, by row."""

    inputs: dict[str, Array]
    keep: Mask | None
    refused: list[Refused]


class _Faults:
    """The rows of one batch that do not fit; the first fault of a row is its reason."""

    def __init__(self) -> None:
        self.rows: dict[int, Refused] = {}

    def add(self, mask: Mask, code: str, reason: Callable[[int], str]) -> None:
        for row in np.flatnonzero(mask).tolist():
            self.rows.setdefault(row, Refused(row, code, reason(row)))


def encode(features: Features, batch: pa.RecordBatch) -> Encoded:
    """The batch's input tensors. Raises `InvalidInput` only for a fault of the schema: a column missing or of a wrong type."""
    faults = _Faults()
    tensors = {f.tensor.name: _tensor(f, batch, faults) for f in features.inputs}
    if not faults.rows:
        return Encoded(tensors, None, [])
    keep = np.ones(batch.num_rows, dtype=np.bool_)
    keep[list(faults.rows)] = False
    return Encoded({n: a[keep] for n, a in tensors.items()}, keep, [faults.rows[r] for r in sorted(faults.rows)])


def check_schema(features: Iterable[Feature], schema: pa.Schema) -> None:
    """Raises `InvalidInput`, naming every column that is missing or whose type cannot feed its tensor."""
    problems = []
    for feature in features:
        for column in feature.columns:
            count = len(schema.get_all_field_indices(column.name))
            if count != 1:
                problems.append(f"column '{column.name}' is {'missing' if count == 0 else 'there twice'}")
            elif not _fits(schema.field(column.name).type, feature):
                problems.append(
                    f"column '{column.name}' is {schema.field(column.name).type}, {feature.tensor} cannot be filled from it"
                )
    if problems:
        raise InvalidInput("; ".join(problems))


def _fits(kind: pa.DataType, feature: Feature) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return False
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth == 0:
        return feature.scalar and (pa.types.is_null(kind) or _fits_value(kind, feature.tensor))  # null: it never had a value
    if len(feature.columns) > 1 or pa.types.is_string_view(kind):  # lists of views cannot be filtered in Arrow yet
        return False
    return depth == len(feature.tensor.row_shape) and _fits_value(kind, feature.tensor)


def _fits_value(kind: pa.DataType, tensor: TensorMetadata) -> bool:
    if tensor.datatype == "BYTES":
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
    if pa.types.is_decimal(kind):  # read as FP64, which holds 15 digits
        return bool(tensor.dtype.kind == "f" or kind.precision <= 15)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _column(batch: pa.RecordBatch, column: Column, tensor: TensorMetadata) -> pa.Array:
    """The named column; dictionaries of numbers (and those that hold the null themselves) and decimals become plain values."""
    values = batch.column(column.name)
    if pa.types.is_dictionary(values.type) and (tensor.datatype != "BYTES" or values.dictionary.null_count):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):
        return values.cast(pa.string() if tensor.datatype == "BYTES" else pa.float64())
    return values.cast(pa.float64()) if pa.types.is_decimal(values.type) else values


def _tensor(feature: Feature, batch: pa.RecordBatch, faults: _Faults) -> Array:
    """One input tensor over all rows of the batch; rows at fault hold placeholders."""
    check_schema([feature], batch.schema)
    tensor, first = feature.tensor, feature.columns[0]
    if not feature.scalar or _is_list(batch.schema.field(first.name).type):
        return _lists(_column(batch, first, tensor), first, tensor, faults)
    columns = [_values(_column(batch, c, tensor), c, tensor, faults) for c in feature.columns]
    if len(columns) == 1:
        return columns[0].reshape(batch.num_rows, *feature.row_shape)
    if tensor.datatype == "BYTES":
        return np.stack(columns, axis=1)
    stacked = np.empty((batch.num_rows, len(columns)), dtype=tensor.dtype)
    for j, values in enumerate(columns):
        stacked[:, j] = values
    return stacked


def _values(values: pa.Array, column: Column, tensor: TensorMetadata, faults: _Faults) -> Array:
    """A column of one value a row as [rows], nulls replaced by its policy, rows at fault noted."""
    null = to_numpy(values.is_null()) if values.null_count else None
    if null is not None and column.null == DEAD_LETTER:
        faults.add(null, MissingValue.code, lambda _: f"column '{column.name}' is null")
    if tensor.datatype == "BYTES":
        return _text(values, column, faults)
    if null is None:
        return _numbers(to_numpy(values), column, tensor, faults)
    filled = _numbers(_zeroed(to_numpy(values), null), column, tensor, faults)
    if column.null == DEAD_LETTER:
        return filled
    if not filled.flags.writeable:
        filled = filled.copy()
    filled[null] = null_value(column, tensor)
    return filled


def _zeroed(values: Array, null: Mask) -> Array:
    """A copy with zeros for nulls, under which Arrow leaves whatever was there."""
    values = values.copy()
    values[null] = 0
    return values


def _numbers(values: Array, column: Column, tensor: TensorMetadata, faults: _Faults) -> Array:
    """The values in the tensor's dtype (no copy where they have it); those that the cast would change are noted."""
    if values.dtype == tensor.dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(tensor.dtype)
    if values.dtype.kind == "f" and tensor.dtype.kind == "f" and not np.isinf(cast).any():
        return cast  # floats into floats change only by overflow
    bad = unrepresentable(values, tensor.dtype)
    if bad is not None and bad.any():
        faults.add(
            bad,
            InvalidInput.code,
            lambda row: f"column '{column.name}': {values[row]!s} cannot be held as {tensor.datatype} without changing it",
        )
        cast[bad] = 0
    return cast


def _text(values: pa.Array, column: Column, faults: _Faults) -> Array:
    """Text as numpy `U` if it is short, else as `str` objects; [rows]. Nulls become what the column says."""
    if pa.types.is_dictionary(values.type) and len(values.dictionary) > len(values):  # the whole file's words, for a few rows
        values = values.dictionary_decode()
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    words, broken = _words(values.dictionary.cast(pa.string()))
    codes = to_numpy(values.indices)
    if values.indices.null_count:
        words.append("" if column.null == DEAD_LETTER else str(column.null))
        codes = codes.astype(np.int64)
        codes[to_numpy(values.indices.is_null())] = len(words) - 1
    if broken:
        faults.add(np.isin(codes, broken), InvalidInput.code, lambda _: f"column '{column.name}': the text is not UTF-8")
    distinct = np.array(words or [""], dtype=object)
    longest = max(map(len, words), default=0)
    if longest <= MAX_TEXT_WIDTH and not any(word.endswith("\0") for word in words):  # numpy `U` would drop a NUL at the end
        distinct = distinct.astype(f"U{longest or 1}")
    return np.asarray(distinct[codes])


def _words(dictionary: pa.Array) -> tuple[list[str], list[int]]:
    """The dictionary's words, and the positions of those that are not UTF-8 (Parquet files may hold such), which stand empty."""
    try:
        return dictionary.to_pylist(), []
    except UnicodeDecodeError:
        words, broken = [], []
        for i, word in enumerate(dictionary.cast(pa.binary()).to_pylist()):
            words.append(word.decode(errors="ignore"))
            if words[-1].encode() != word:
                broken.append(i)
        return words, broken


def _lists(values: pa.Array, column: Column, tensor: TensorMetadata, faults: _Faults) -> Array:
    """A column of (nested) lists as [rows, ...]; a row that is null, ragged or holds what does not fit is noted."""
    rows = len(values)
    null = to_numpy(values.is_null())
    if null.any():
        faults.add(null, MissingValue.code, lambda _: f"column '{column.name}' is null")
    shape = _common_shape(values, tensor)
    good = ~null & _has_shape(values, shape)
    faults.add(
        ~good & ~null,
        InvalidInput.code,
        lambda _: f"column '{column.name}': expected {list(shape)} values a row, got a list of another shape",
    )
    flat = values.filter(from_numpy(good)) if not good.all() else values
    for _ in shape:
        flat = flat.flatten()
    inner = _Faults()
    elements = _values(flat, column, tensor, inner)
    positions, width = np.flatnonzero(good), max(1, int(np.prod(shape)))
    for fault in inner.rows.values():
        row = int(positions[fault.row // width])
        faults.rows.setdefault(row, Refused(row, fault.code, fault.reason))
    if good.all():
        return elements.reshape(rows, *shape)
    padded = np.zeros((rows, *shape), dtype=elements.dtype)
    padded[good] = elements.reshape(len(positions), *shape)
    return padded


def _common_shape(values: pa.Array, tensor: TensorMetadata) -> tuple[int, ...]:
    """The size of each list axis: what the tensor fixes, else what the batch's first full row has."""
    shape: list[int] = []
    for want in tensor.row_shape:
        lengths = _lengths(values)
        shape.append(want if isinstance(want, int) and want >= 0 else int(lengths[0]) if len(lengths) else 0)
        values = values.drop_null().flatten()
    return tuple(shape)


def _list_lengths(values: pa.Array) -> NDArray[np.int64]:
    """The length of each row's list, -1 for a null."""
    lengths = to_numpy(pc.list_value_length(values)).astype(np.int64)
    if values.null_count:
        lengths[to_numpy(values.is_null())] = -1
    return lengths


def _lengths(values: pa.Array) -> NDArray[np.int64]:
    return np.asarray(to_numpy(pc.list_value_length(values.drop_null())), dtype=np.int64)


def _has_shape(values: pa.Array, shape: tuple[int, ...]) -> Mask:
    """Which rows are lists of exactly this shape, all the way down."""
    if not shape:
        return np.ones(len(values), dtype=np.bool_)
    lengths = _list_lengths(values)
    good: Mask = np.asarray(lengths == shape[0])
    if len(shape) > 1 and good.any():
        below = _has_shape(values.filter(from_numpy(good)).flatten(), shape[1:])
        good[good] = below.reshape(int(good.sum()), shape[0]).all(axis=1)
    return good


def to_arrow(features: Features, outputs: Mapping[str, Array]) -> dict[str, pa.Array]:
    """The answer's columns as Arrow arrays, typed as `output_schema` says."""
    return {c.name: as_arrow(column_of(c, outputs[c.tensor.name]), output_type(c)) for c in features.outputs}


def output_schema(features: Features) -> pa.Schema:
    return pa.schema([pa.field(c.name, output_type(c)) for c in features.outputs])


_OUTPUT_TYPES: Final[Mapping[str, pa.DataType]] = {
    "BOOL": pa.bool_(), "UINT8": pa.uint8(), "UINT16": pa.uint16(), "UINT32": pa.uint32(), "UINT64": pa.uint64(),
    "INT8": pa.int8(), "INT16": pa.int16(), "INT32": pa.int32(), "INT64": pa.int64(),
    "FP16": pa.float32(),  # Spark and most readers know no half floats
    "FP32": pa.float32(), "FP64": pa.float64(), "BYTES": pa.string(),
}  # fmt: skip


def output_type(column: OutputColumn) -> pa.DataType:
    """The Arrow type of an output column: its value's, in a list for each further axis."""
    kind = pa.string() if column.labels else _OUTPUT_TYPES[column.tensor.datatype]
    for _ in column.row_shape:
        kind = pa.list_(kind)
    return kind


def as_arrow(values: Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_list(kind):
        inner = as_arrow(values.reshape(len(values) * values.shape[1], *values.shape[2:]), kind.value_type)
        return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], inner)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    return from_numpy(values) if values.dtype.kind in "biuf" else pa.array(values, type=kind, from_pandas=False)
