"""Numbers between Arrow and numpy by their buffers: no copy, and no pandas, which pyarrow's own conversions import (2 s in a
fresh process, more than the rest of a Lambda's cold start)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from triform.signature import Array


def to_numpy(values: pa.Array) -> Array:
    """Numbers without nulls, not copied; booleans unpacked. pyarrow's own way imports pandas, 2 s in a fresh process."""
    buffer, start, stop = values.buffers()[1], values.offset, values.offset + len(values)
    if pa.types.is_boolean(values.type):
        bits = np.unpackbits(np.frombuffer(buffer or b"", dtype=np.uint8), bitorder="little")
        return bits[start:stop].view(np.bool_)
    return np.frombuffer(buffer or b"", dtype=values.type.to_pandas_dtype())[start:stop]


def from_numpy(values: Array) -> pa.Array:
    """Booleans, integers or floats of shape [rows] as Arrow, not copied (booleans packed)."""
    if values.dtype.kind == "b":
        packed = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(packed)])
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def repeated_text(text: str, rows: int) -> pa.Array:
    """A string column of one value."""
    data = text.encode()
    offsets = np.arange(rows + 1, dtype=np.int64) * len(data)
    column = pa.Array.from_buffers(pa.large_string(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(data * rows)])
    return column.cast(pa.string())


def repeated_instant(microseconds: int, rows: int) -> pa.Array:
    """A UTC timestamp column of one value, given as microseconds since 1970."""
    values = np.full(rows, microseconds, dtype=np.int64)
    return pa.Array.from_buffers(pa.timestamp("us", tz="UTC"), rows, [None, pa.py_buffer(values)])
