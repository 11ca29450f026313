"""JSON in and out: strict, exact, and without a Python loop over numbers.

    bytes -> orjson -> dicts and lists -> struct (msgspec)          numpy arrays -> orjson -> bytes

orjson refuses NaN, infinity, what is no UTF-8 and nesting beyond 1,024; integers of 64 bits keep every digit. A key that
stands twice in an object, of which every parser keeps another one, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import orjson

from triform.errors import InfiniteOutput, InvalidRequest
from triform.service import Served
from triform.signature import Array

T = TypeVar("T")
JSON: Final = "application/json"
_NESTED: Final = (dict, list)
_KEY: Final = re.compile(rb'"[ \t\r\n]*:')


class Encoded(NamedTuple):
    """The body of an answer."""

    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class Call(NamedTuple):
    """What a request asks: `inputs` by tensor, and how to say the `outputs` by tensor."""

    inputs: Mapping[str, Any]
    encode: Callable[[dict[str, Array]], Encoded]


def by_columns(names: Collection[str], served: Served) -> bool:
    """Whether names mean the columns that model.toml maps: some are columns', and they do not cover the tensors'."""
    return any(t.name not in names for t in served.signature.inputs) and any(name in names for name in served.features.columns)


def read_json(body: bytes, what: str = "the body") -> Any:
    """The value in the body. Raises `InvalidRequest` that says where it is no JSON, or which key stands twice.

    `what` it is, for the message.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{what} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{what} is not JSON: nested too deeply") from None
    colons = body.count(b":")
    if (keys := _keys(value, colons)) != colons and keys != len(_KEY.findall(body)):
        _refuse_twice(body)
    return value


def _keys(value: Any, most: int) -> int:
    """The keys of the objects in it, until there are `most`, so that an array's rows are looked at only where they hold objects.

    A list that begins with a number or text is passed over: should it hold objects as well, the count is short, which only
    means an exact look.
    """
    keys, pending = 0, [value]
    for item in pending:  # grows meanwhile: level by level
        if isinstance(item, dict):
            keys += len(item)
            if keys >= most:
                break
            pending += [v for v in item.values() if isinstance(v, _NESTED)]
        elif item and isinstance(item, list) and isinstance(item[0], _NESTED):
            pending += [v for v in item if isinstance(v, _NESTED)]
    return keys


def _refuse_twice(body: bytes) -> None:
    """The exact look, by a slower parser: the quick counts are off where a text holds a quote and a colon, too."""
    import json

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)

    try:
        json.loads(body, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from None


def convert(value: Any, kind: type[T]) -> T:
    """`value` as a struct. Raises `InvalidRequest` that names the place."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body does not fit: {str(error).replace('`', chr(39))}") from None


def write_json(value: Any) -> bytes:
    """The JSON of a value that may hold numpy arrays (C-contiguous numbers) and scalars; NaN becomes null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def plain(array: Array, name: str) -> Any:
    """The array as `write_json` takes it: numbers as they are, text as lists. Raises `InfiniteOutput`."""
    if array.dtype.kind == "f" and np.isinf(array).any():
        at = np.argwhere(np.isinf(array))[0]
        raise InfiniteOutput(
            f"output '{name}' is infinite in row {int(at[0])}, and JSON has no infinity: ask for it in binary (binary_data)"
        )
    if array.dtype.kind in "OUS":
        return array.tolist()
    return np.ascontiguousarray(array)
