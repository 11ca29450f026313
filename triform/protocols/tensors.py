"""A tensor as bytes, for the binary tensor extension of the Open Inference Protocol and for gRPC.

    bytes, datatype, shape -> from_bytes -> array          array -> to_bytes -> bytes

Source: Triton Inference Server, protocol/extension_binary_data.md. Little-endian, row-major; each element of a BYTES tensor
follows its length in four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from triform.errors import InvalidInput
from triform.protocols.bodies import check_texts
from triform.signature import DATATYPES, Array

Bytes = bytes | memoryview
WIRE: Final = {d.oip: np.dtype(np.uint8) if d.oip == "BOOL" else d.numpy.newbyteorder("<") for d in DATATYPES if d.oip != "BYTES"}


def from_bytes(data: Bytes, datatype: str, shape: Sequence[int]) -> Array:
    """The tensor as an array of one dimension, read where it stands if it is aligned.

    Raises `InvalidInput`, before anything is allocated.
    """
    elements = math.prod(shape)  # of Python's integers: it does not wrap
    if datatype == "BYTES":
        return _texts(data, elements)
    dtype = WIRE[datatype]
    if len(data) != elements * dtype.itemsize:
        means = f"shape {str(list(shape))[:200]} of {datatype} means {elements * dtype.itemsize} bytes"
        raise InvalidInput(f"{means}, binary_data_size is {len(data)}")
    array = np.require(np.frombuffer(data, dtype=dtype), requirements="A")  # a header of any length may stand before it
    if datatype == "BOOL":
        if (array > 1).any():
            raise InvalidInput("a BOOL is a byte of 0 or 1")
        return array.view(np.bool_)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _texts(data: Bytes, elements: int) -> Array:
    if elements * 4 > len(data):
        raise InvalidInput(f"{elements} elements of BYTES do not fit in {len(data)} bytes")
    raw, items, at = bytes(data), [], 0
    for i in range(elements):
        start = at + 4
        size = int.from_bytes(raw[at:start], "little") if start <= len(raw) else -1
        if size < 0 or size > len(raw) - start:
            raise InvalidInput(f"element {i} is cut short: its length is {max(size, 0)}, {len(raw) - at} bytes are left")
        items.append(raw[start : start + size])
        at = start + size
    if at != len(raw):
        raise InvalidInput(f"{len(raw) - at} byte(s) follow its last element")
    array = np.empty(elements, dtype=object)
    array[:] = items
    return array


def to_bytes(array: Array) -> bytes:
    """The array's elements; text as UTF-8. Raises `AnswerTooLarge`."""
    if array.dtype.kind in "OUS":
        check_texts(array)
        items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return b"".join(part for item in items for part in (len(item).to_bytes(4, "little"), item))
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
