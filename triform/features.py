"""Named columns <-> tensors, by the package's column mapping: what makes a JSON record and a Parquet row mean the same.

    records, columns -> Features.from_... -> tensors     outputs -> Features.to_columns -> labelled columns

Each input tensor is fed from columns: several are stacked into one [rows, F]; one fills [rows] or [rows, 1], or holds a list
a row. A null gets what its column declares: "nan", a value, or the row's refusal. `arrow.py` does the same for Arrow batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from triform.config import DEAD_LETTER, NAN, Column, ModelConfig
from triform.errors import ConfigurationError, InvalidInput, MissingValue
from triform.signature import Array, Signature, TensorMetadata, cast


class Feature(NamedTuple):
    """An input tensor and the columns that fill it, in order."""

    tensor: TensorMetadata
    columns: tuple[Column, ...]

    @property
    def scalar(self) -> bool:
        """Whether a column brings one value a row (else a list)."""
        return len(self.columns) > 1 or self.tensor.row_shape in ((), (1,))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row where a column brings one value a row."""
        return () if self.tensor.row_shape == () else (len(self.columns),)


class OutputColumn(NamedTuple):
    """A column of the answer: `position` picks it from [rows, K]; None takes the whole tensor."""

    name: str
    tensor: TensorMetadata
    position: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def row_shape(self) -> tuple[int | str, ...]:
        """The shape of one row's value: () for a single one."""
        return () if self.position is not None or self.tensor.row_shape == (1,) else self.tensor.row_shape


class Features:
    """The column mapping of one model. Raises `ConfigurationError` where mapping and signature do not fit."""

    def __init__(self, signature: Signature, config: ModelConfig) -> None:
        self.signature = signature
        self.tensors = {t.name: t for t in signature.inputs}
        self.inputs = tuple(_feature(t, config) for t in signature.inputs)
        self.outputs = tuple(c for t in signature.outputs for c in _output_columns(t, config))
        names = [c.name for c in self.outputs]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ConfigurationError(
                f"model.toml: two outputs give a column '{min(twice)}': name them apart with outputs.X.columns"
            )

    @property
    def columns(self) -> list[str]:
        """Every input column once, in order."""
        return list(dict.fromkeys(c.name for f in self.inputs for c in f.columns))

    @property
    def text(self) -> set[str]:
        """The input columns that are read as text."""
        return {c.name for f in self.inputs if f.tensor.datatype == "BYTES" for c in f.columns}

    def from_records(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
        """Input tensors of shape [len(records), ...] with the signature's dtypes.

        Raises `MissingValue` or `InvalidInput` with the column and the row at fault. Keys that are no column are ignored.
        """
        for row, record in enumerate(records):
            if type(record) is not dict and not isinstance(record, Mapping):
                raise InvalidInput(f"row {row}: expected an object of named columns, got {type(record).__name__}", row=row)
        return {f.tensor.name: _tensor(f, records) for f in self.inputs}

    def from_columns(self, columns: Mapping[str, Sequence[Any] | Array]) -> dict[str, Array]:
        """The same from columns: values of all rows, by name. A column that is not there is null in each row."""
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            counts = ", ".join(f"{name[:80]!r} has {len(values)}" for name, values in columns.items())
            raise InvalidInput(f"the columns differ in their number of rows: {counts[:300]}")
        rows = lengths.pop() if lengths else 0
        return {f.tensor.name: _tensor_of_columns(f, columns, rows) for f in self.inputs}

    def to_columns(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The answer as columns of shape [rows] (or [rows, ...] where a row's value is itself an array), labels applied."""
        return {c.name: column_of(c, outputs[c.tensor.name]) for c in self.outputs}


def _feature(tensor: TensorMetadata, config: ModelConfig) -> Feature:
    feature = Feature(tensor, config.input(tensor.name).named(tensor.name))
    for column in feature.columns:
        check_null_policy(column, tensor)
    width = tensor.row_shape[0] if tensor.row_shape else None
    if len(feature.columns) > 1 and (
        len(tensor.row_shape) != 1 or (isinstance(width, int) and width not in (-1, len(feature.columns)))
    ):
        raise ConfigurationError(f"model.toml: inputs.{tensor.name}.columns names {len(feature.columns)} columns for {tensor}")
    return feature


def check_null_policy(column: Column, tensor: TensorMetadata) -> None:
    """Raises `ConfigurationError` if the value that stands for a null does not fit the tensor."""
    key = f"model.toml: inputs.{tensor.name}.columns: null of '{column.name}'"
    if column.null == DEAD_LETTER:
        return
    if tensor.datatype == "BYTES":
        if not isinstance(column.null, str):
            raise ConfigurationError(f"{key}: expected text, got {column.null!r}")
        return
    if column.null == NAN:
        if tensor.dtype.kind != "f":
            raise ConfigurationError(f'{key}: {tensor.datatype} has no NaN; give a value or "{DEAD_LETTER}"')
        return
    if isinstance(column.null, str):
        raise ConfigurationError(f'{key}: expected "{NAN}", "{DEAD_LETTER}" or a number, got {column.null!r}')
    try:
        cast([column.null], tensor)
    except InvalidInput as error:
        raise ConfigurationError(f"{key}: {error}") from error


def null_value(column: Column, tensor: TensorMetadata) -> Any:
    """What stands for a null in an array: NaN for "nan" among floats, else the value itself."""
    return float("nan") if column.null == NAN and tensor.dtype.kind == "f" else column.null


def _output_columns(tensor: TensorMetadata, config: ModelConfig) -> list[OutputColumn]:
    given = config.output(tensor.name)
    if given.labels and tensor.dtype.kind not in "iu":
        raise ConfigurationError(f"model.toml: outputs.{tensor.name}.labels: needs an integer output, not {tensor}")
    if not given.columns:
        return [OutputColumn(tensor.name, tensor, None, given.labels)]
    width = tensor.row_shape[0] if tensor.row_shape else 1
    if len(given.columns) == 1 and len(tensor.row_shape) <= 1 and width == 1:
        return [OutputColumn(given.columns[0], tensor, None, given.labels)]
    if len(tensor.row_shape) != 1 or (isinstance(width, int) and width not in (-1, len(given.columns))):
        raise ConfigurationError(f"model.toml: outputs.{tensor.name}.columns names {len(given.columns)} column(s) for {tensor}")
    return [OutputColumn(name, tensor, i, given.labels) for i, name in enumerate(given.columns)]


def column_of(column: OutputColumn, value: Array) -> Array:
    """One column's values, [rows] or [rows, ...], from the output tensor."""
    if column.position is not None and len(value) == 0:
        value = value.reshape(-1)
    elif column.position is not None:
        if value.ndim != 2 or column.position >= value.shape[1]:
            raise ConfigurationError(
                f"output '{column.tensor.name}' came with shape {list(value.shape)}: it has no column '{column.name}'"
            )
        value = value[:, column.position]
    elif column.tensor.row_shape == (1,):
        value = value.reshape(-1)
    return _labelled(value, column) if column.labels else value


def _labelled(value: Array, column: OutputColumn) -> Array:
    labels = np.array(column.labels, dtype=object)
    if value.size and (value.min() < 0 or value.max() >= len(labels)):
        raise ConfigurationError(
            f"model.toml: outputs.{column.tensor.name}.labels names {len(labels)} classes; the model answered {int(value.max())}"
        )
    return np.asarray(labels[value])


def _tensor(feature: Feature, records: Sequence[Mapping[str, Any]]) -> Array:
    if not records:
        return feature.tensor.no_rows()
    if not feature.scalar or (feature.tensor.row_shape == (1,) and _holds_lists(feature.columns[0], records)):
        return _lists(feature, records)
    columns = [_values(c, records, feature) for c in feature.columns]
    if len(columns) > 1:
        with suppress(InvalidInput):  # all at once, which is faster; column by column it says which one does not fit
            return np.ascontiguousarray(cast(columns, feature.tensor).T)
    arrays = [_cast(values, c, feature) for c, values in zip(feature.columns, columns, strict=True)]
    return np.stack(arrays, axis=1) if feature.row_shape else arrays[0]


def _tensor_of_columns(feature: Feature, columns: Mapping[str, Sequence[Any] | Array], rows: int) -> Array:
    if rows == 0:
        return feature.tensor.no_rows()
    first = columns.get(feature.columns[0].name, [None] * rows)
    if not feature.scalar or (feature.tensor.row_shape == (1,) and any(isinstance(v, list) for v in first)):
        return _lists(feature, [{feature.columns[0].name: value} for value in first])
    filled = [_filled_column(c, columns, rows, feature) for c in feature.columns]
    if len(filled) > 1:
        with suppress(InvalidInput):  # all at once, which is faster; column by column it says which one does not fit
            together = cast(_together(filled), feature.tensor)
            if together.ndim == 2:
                return np.ascontiguousarray(together.T)
    arrays = [_cast(values, c, feature) for c, values in zip(feature.columns, filled, strict=True)]
    if wrong := next((c for c, a in zip(feature.columns, arrays, strict=True) if a.ndim != 1), None):
        raise InvalidInput(f"column '{wrong.name}': expected one value a row, got lists", input=wrong.name)
    return np.stack(arrays, axis=1) if feature.row_shape else arrays[0]


def _together(columns: Sequence[Any]) -> Any:
    """Columns as one value: lists as a list, arrays of one dtype as an array. Raises `InvalidInput` for several kinds."""
    if len({v.dtype if isinstance(v, np.ndarray) else list for v in columns}) > 1:
        raise InvalidInput("columns of several kinds")
    return np.stack(columns) if isinstance(columns[0], np.ndarray) else list(columns)


def _filled_column(column: Column, columns: Mapping[str, Sequence[Any] | Array], rows: int, feature: Feature) -> Any:
    """The column's values, its nulls replaced by its policy."""
    if column.name not in columns:
        return np.full(rows, _present(None, column, 0, feature), feature.tensor.dtype)
    values = columns[column.name]
    if isinstance(values, np.ndarray) or None not in values:
        return values
    return [_present(value, column, row, feature) for row, value in enumerate(values)]


def _holds_lists(column: Column, records: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(r.get(column.name), list) for r in records)


def _lists(feature: Feature, records: Sequence[Mapping[str, Any]]) -> Array:
    """A column of (nested) lists as [rows, ...]: each of the tensor's shape, and of the first row's where that is dynamic."""
    column, tensor = feature.columns[0], feature.tensor
    values = []
    for row, record in enumerate(records):
        if (value := record.get(column.name)) is None:
            raise _missing(column, row)
        values.append(_filled(value, column, row, feature, len(tensor.row_shape)))
    with suppress(InvalidInput):
        array = cast(values, tensor)
        if _fits(array.shape[1:], tensor):
            return array
    shape = _shape(values[0])
    wanted = shape if shape is not None and _fits(shape, tensor) else None

    def fault(some: Sequence[Any]) -> bool:
        return wanted is None or _shape(some) != (len(some), *wanted)

    if fault(values):
        row = _first(values, fault)
        raise InvalidInput(
            f"row {row}: column '{column.name}': expected {tensor}, got a row of another shape", input=column.name, row=row
        )
    return _cast(values, column, feature)


def _fits(shape: tuple[int, ...], tensor: TensorMetadata) -> bool:
    wanted = tensor.row_shape
    return len(shape) == len(wanted) and all(w in (have, -1) or isinstance(w, str) for have, w in zip(shape, wanted, strict=True))


def _filled(value: Any, column: Column, row: int, feature: Feature, depth: int) -> Any:
    """The list with its nulls replaced by the column's policy, as deep as the tensor is; what is deeper will not fit."""
    if not isinstance(value, list) or depth == 0:
        return value
    if value and isinstance(value[0], list):
        return [_filled(v, column, row, feature, depth - 1) for v in value]
    return [_present(v, column, row, feature) for v in value] if None in value else value


def _shape(value: Any) -> tuple[int, ...] | None:
    try:
        return np.asarray(value, dtype=object).shape  # not of text: numpy makes each as long as the longest
    except ValueError:
        return None


def _values(column: Column, records: Sequence[Mapping[str, Any]], feature: Feature) -> list[Any]:
    """The column's value of each record, its nulls replaced by its policy."""
    values = [record.get(column.name) for record in records]
    kinds = set(map(type, values))
    if type(None) in kinds:
        values = [_present(value, column, row, feature) for row, value in enumerate(values)]
    if list in kinds:
        row = next(row for row, value in enumerate(values) if isinstance(value, list))
        raise InvalidInput(f"row {row}: column '{column.name}': expected one value, got a list", input=column.name, row=row)
    return values


def _present(value: Any, column: Column, row: int, feature: Feature) -> Any:
    if value is not None:
        return value
    if column.null == DEAD_LETTER:
        raise _missing(column, row)
    return null_value(column, feature.tensor)


def _missing(column: Column, row: int) -> MissingValue:
    return MissingValue(f"row {row}: column '{column.name}' is missing or null", input=column.name, row=row)


def _cast(values: Any, column: Column, feature: Feature) -> Array:
    """One column's Python values as an array of the tensor's dtype; errors name the column and the row."""
    try:
        return cast(values, feature.tensor)
    except InvalidInput as error:
        row = error.row if error.row is not None else _culprit(values, feature.tensor)
        told = str(error).replace(f"input '{feature.tensor.name}'", f"column '{column.name}'")
        raise InvalidInput(f"{told if row is None else f'row {row}: {told}'}", input=column.name, row=row) from error


def _culprit(values: Sequence[Any], tensor: TensorMetadata) -> int | None:
    """A row that makes no tensor by itself, the first one unless rows before it make none together."""

    def fault(some: Sequence[Any]) -> bool:
        try:
            cast(some, tensor)
        except InvalidInput:
            return True
        return False

    row = _first(values, fault)
    return row if fault(values[row : row + 1]) else None


def _first(values: Sequence[Any], fault: Callable[[Sequence[Any]], bool]) -> int:
    """The first row at fault, by halving: `fault` says whether there is one among some rows."""
    start, stop = 0, len(values)
    while stop - start > 1:
        middle = (start + stop) // 2
        start, stop = (start, middle) if fault(values[start:middle]) else (middle, stop)
    return start
