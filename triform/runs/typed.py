"""Values as a file has them -> Arrow columns in types that can feed the model's tensors.

    cells of CSV -> parsed        values of JSON -> fitting        columns that the model does not read -> guessed

What fits is decided value by value: as for a record that stands alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from triform.errors import InvalidInput
from triform.features import Feature
from triform.signature import TensorMetadata, cast

INTEGER: Final = r"^-?[0-9]{1,18}$"
DECIMAL: Final = r"^[+-]?([0-9]{1,15}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$"  # no integer in it loses digits in FP64
SMALL: Final = 127  # every numeric type holds the integers up to it
_NESTED: Final = {dict, list}
_WORDS: Final = {"true": True, "false": False, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "+inf": math.inf}

Refuse = Callable[[int, str], None]  # a row, and why


def parsed(cells: pa.Array, feature: Feature, refuse: Refuse) -> pa.Array:
    """A column of text as numbers; cells that are none are refused."""
    trimmed = pc.utf8_trim_whitespace(cells)
    for kind, pattern in (pa.int64(), INTEGER), (pa.float64(), DECIMAL):
        if pc.all(pc.match_substring_regex(trimmed, pattern), min_count=0).as_py():
            return trimmed.cast(kind)
    return fitting([None if cell is None else _cell(cell) for cell in trimmed.to_pylist()], feature, refuse)


def _cell(cell: str) -> Any:
    """A number with all its digits, or the text where it is none."""
    if (word := _WORDS.get(cell.lower())) is not None:
        return word
    if re.fullmatch(r"[+-]?[0-9]{1,30}", cell):
        return int(cell)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", cell) and math.isfinite(number := float(cell)):
        return number
    return cell


def fitting(values: list[Any], feature: Feature, refuse: Refuse) -> pa.Array:
    """A column of values in a type that can feed the tensor; those that have another are refused, and null.

    What becomes of a value does not depend on the others: it is what a record that stands alone gives.
    """
    tensor, depth = feature.tensor, _depth(values, feature)
    rows = values
    if depth and feature.scalar:  # a value by itself is as good as the list of it
        rows = [value if value is None or isinstance(value, list) else [value] for value in values]
    if not _all_fit(rows, depth, tensor):
        rows = list(rows)
        for row, value in enumerate(rows):
            if not _fits(value, depth, tensor):
                refuse(row, f"{str(values[row])[:80]!r} does not fit {tensor}")
                rows[row] = None
    kind = _kind(rows, tensor)
    if tensor.datatype != "BYTES" and not pa.types.is_boolean(kind):
        number = float if pa.types.is_floating(kind) else int
        rows = [_each(number, value) for value in rows]
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.array(rows, kind)


def _all_fit(rows: list[Any], depth: int, tensor: TensorMetadata) -> bool:
    """Whether it can be seen of all at once that they fit, several times faster than one by one."""
    with suppress(InvalidInput):
        return cast([value for value in rows if value is not None], tensor).ndim == depth + 1
    return False


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


def guessed(values: list[Any]) -> pa.Array:
    """A column that the model does not read: typed by its values, or their JSON where these have no type in common."""
    if not any(isinstance(value, dict) or (isinstance(value, list) and _NESTED & set(map(type, value))) for value in values):
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return pa.array(values)
    return pa.array([None if value is None else orjson.dumps(value).decode() for value in values], pa.string())
