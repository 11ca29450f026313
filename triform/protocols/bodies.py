"""JSON in and out: strict, exact, and without a Python loop over numbers.

    bytes -> orjson -> dicts and lists -> struct (msgspec)          numpy arrays -> orjson -> bytes

orjson refuses NaN, infinity, what is no UTF-8 and nesting beyond 1,024; integers of 64 bits keep every digit. A larger integer is
refused unless a float holds it to the digit, and so is a key that stands twice in an object: every parser keeps another one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import orjson

from triform.errors import AnswerTooLarge, InfiniteOutput, InvalidRequest, PayloadTooLarge
from triform.models import Served
from triform.signature import Array

T = TypeVar("T")
JSON: Final = "application/json"
MAX_VALUES: Final = 2 << 20  # of text, each of which costs time and memory of its own: reading so many takes about two seconds
MAX_DIMS: Final = 32  # of a tensor
IN_JSON: Final = b",:[{"
SMALL: Final = 16 << 10  # bytes that are read at once, whatever is in them
_NESTED: Final = frozenset({dict, list})
_FEW: Final = 16
_KEY: Final = re.compile(rb'"[ \t\r\n]*:')
_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG: Final = b"0" * 19  # digits that an integer beyond 64 bits has at least; without a sign it has one more
_RUN: Final = re.compile(b"0*")


def effort(text: bytes) -> int:
    """How many bytes of long numbers take as long to read as this JSON (10 ns a byte): an object takes as long as 240, a list as
    100, a line as 60, what is between two commas as 5."""
    parts = {b"{": 240, b"[": 100, b"\n": 60, b",": 5}
    return max(len(text) // 2, sum(weight * text.count(part) for part, weight in parts.items()))


class Encoded(NamedTuple):
    """The body of an answer."""

    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class Call(NamedTuple):
    """What a request asks: `inputs` by tensor, and how the answer is said.

    `columns`: makes them of the outputs, where the request named columns. `says_version`: whether `say` takes the `version` that
    the answer names. `keys`: the values of `Served.key`, a row each, where the request has that column.
    """

    inputs: Mapping[str, Any]
    say: Callable[..., Encoded]
    columns: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None
    says_version: bool = False
    keys: Sequence[Any] | Array | None = None

    def encode(self, outputs: Mapping[str, Array]) -> Encoded:
        """The body that says the outputs, by tensor."""
        return self.say(outputs if self.columns is None else self.columns(outputs))


def from_columns(columns: Mapping[str, Sequence[Any] | Array], served: Served) -> dict[str, Array]:
    """The tensors that columns make. Raises as `Features.from_columns`, and `PayloadTooLarge` where too many are left out."""
    rows = max(map(len, columns.values()), default=0)
    check_values(rows * sum(name not in columns for name in served.features.columns))
    return served.features.from_columns(columns)


def by_columns(names: Collection[str], served: Served) -> bool:
    """Whether names mean the columns that model.toml maps: some are columns', and they do not cover the tensors'."""
    return any(t.name not in names for t in served.signature.inputs) and any(name in names for name in served.features.columns)


def check_count(body: bytes, separators: bytes) -> None:
    """Raises `PayloadTooLarge` for more than `MAX_VALUES` values, counted by what stands before or after each."""
    if len(body) > MAX_VALUES:
        check_values(sum(body.count(one) for one in separators))


def check_values(count: int) -> None:
    """Raises `PayloadTooLarge` for more than `MAX_VALUES`."""
    if count > MAX_VALUES:
        raise PayloadTooLarge(
            f"more than {MAX_VALUES:,} values: send fewer rows at a time, or numbers in binary (Open Inference Protocol)"
        )


def read_json(body: bytes, what: str = "the body") -> Any:
    """The value in the body; `what` it is, for messages.

    Raises `InvalidRequest` that says where it is no JSON, which key stands twice or which integer is too large, and
    `PayloadTooLarge`.
    """
    check_count(body, IN_JSON)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{what} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{what} is not JSON: nested too deeply") from None
    if _may_double_a_key(value, body) or _may_have_long_integers(body):
        _look_closely(body)
    return value


def _may_double_a_key(value: Any, body: bytes) -> bool:
    colons = body.count(b":")
    return colons > 0 and (keys := _keys(value, colons)) != colons and keys != len(_KEY.findall(body))


def _may_have_long_integers(body: bytes) -> bool:
    """Whether many digits stand in a row that are none of a fraction's."""
    zeros, end = body.translate(_ZEROS), 0
    while (at := zeros.find(_LONG, end)) >= 0:
        before, end = zeros[at - 1 : at], _RUN.match(zeros, at).end()  # type: ignore[union-attr]  # it matches anywhere
        if before == b"-" or (before != b"." and end - at > len(_LONG)):
            return True
    return False


def _keys(value: Any, most: int) -> int:
    """The keys of the objects in it, until there are `most`, so that an array's rows are looked at only where they hold objects.

    A list that begins with a number or text is passed over: should it hold objects as well, the count is short, which only
    means an exact look.
    """
    keys, pending = 0, [value]
    for item in pending:  # grows meanwhile: level by level
        kind = type(item)
        if kind is dict:
            keys += len(item)
            if keys >= most:
                break
            pending += [v for v in item.values() if type(v) in _NESTED]
        elif kind is list and item and type(item[0]) in _NESTED:
            pending += [v for v in item if type(v) in _NESTED]
    return keys


def _look_closely(body: bytes) -> None:
    """A slower parser's look: the quick counts are off where a text holds a quote and a colon, or many digits."""
    import json

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)

    def exact(text: str) -> None:
        if not -(2**63) <= (number := int(text)) < 2**64 and number != float(text):
            raise InvalidRequest(f"the integer {text[:80]} has more than 64 bits, and no float is the same: write it as a float")

    try:
        json.loads(body, object_pairs_hook=once, parse_int=exact)
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
    if array.dtype.kind == "f" and _has_infinity(array):
        at = np.argwhere(np.isinf(array))[0]
        raise InfiniteOutput(
            f"output '{name}' is infinite in row {int(at[0])}, and JSON has no infinity: ask for it in binary (binary_data)"
        )
    if array.dtype.kind in "OUS":
        check_texts(array)
        return array.tolist()
    return np.ascontiguousarray(array)


def _has_infinity(array: Array) -> bool:
    if array.size <= _FEW:  # seen faster without numpy
        return any(map(math.isinf, array.ravel().tolist()))
    return bool(np.count_nonzero(np.isinf(array)))


def check_texts(array: Array) -> None:
    """Raises `AnswerTooLarge` for more than `MAX_VALUES`: each is written by itself."""
    if array.size > MAX_VALUES:
        raise AnswerTooLarge(f"an output has more than {MAX_VALUES:,} texts: send fewer rows at a time")
