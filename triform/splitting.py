"""Which version answers a key: sticky, weighted, the same in every form.

    header, else the request's id -> KeyRule.of_request            -> TrafficSplit.choose -> version
    a column of records, or of a table -> KeyRule.of_rows, one a row -> TrafficSplit.split  -> rows by version
                                                                        each version's outputs -> reassemble
    a batch run's key column           -> row_split.py               -> TrafficSplit.choose -> each row's version

`blake2b(salt + key)` modulo 10,000 is a key's place, in basis points; the canary answers the places below its weight. So a key
keeps its version while the weight and the salt stay, raising the weight only adds keys to the canary, and a new rollout (a new
salt) draws anew who goes first. A key is text or a whole number; the number 7 and the text "7" are one key, as a column of
numbers in Parquet and a header in HTTP mean the same user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from triform.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:  # releases.py names a canary's key rule
    import numpy.typing as npt

    from triform.headers import Named
    from triform.releases import Release

BASIS_POINTS: Final = 10_000


class TrafficSplit(msgspec.Struct, frozen=True):
    """`points`: how many of 10,000 places are the canary's. Without a canary it is 0."""

    stable: int
    canary: int
    points: int
    salt: bytes

    @classmethod
    def of(cls, release: Release) -> TrafficSplit:
        """The split that a release asks for."""
        canary = release.canary
        weight = canary.weight if canary else 0.0
        return cls(release.stable, canary.version if canary else release.stable, basis_points(weight), release.salt.encode())

    def choose(self, key: bytes) -> int:
        """The version that answers `key` (see `key_of`)."""
        return self.canary if place(self.salt, key) < self.points else self.stable

    def split(self, keys: Sequence[bytes]) -> dict[int, npt.NDArray[np.intp]]:
        """The rows of each version, rising, for a request with one key a row. All of them together are every row once."""
        if not self.points or not keys:
            return {self.stable: np.arange(len(keys))}
        chosen = {key: self.choose(key) for key in dict.fromkeys(keys)}
        if len(several := set(chosen.values())) == 1:  # as of a request of one record
            return {several.pop(): np.arange(len(keys))}
        versions = np.fromiter((chosen[key] for key in keys), dtype=np.int64, count=len(keys))
        return {int(version): np.flatnonzero(versions == version) for version in np.unique(versions)}


class KeyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a request's key is: `header`, if the request has it; else each record's `column`; else the request's id."""

    header: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        for name, value in ("header", self.header), ("column", self.column):
            if value is not None and not value.strip():
                raise ConfigurationError(f"key.{name}: expected a name, got {value!r}")

    def of_request(self, headers: Named) -> bytes | None:
        """The key that the header gives all of a request, its first value; None where it gives none, or is blank. The bytes are
        those of the same text in a column."""
        given = headers.get(self.header.strip().lower(), ()) if self.header else ()
        return _sent(given[0]).strip().encode() or None if given else None

    @staticmethod
    def of_rows(values: Iterable[Any], request_id: str) -> list[bytes]:
        """The key of each row, by its value in the column; a null has the request's id.

        Raises `InvalidInput` for a value that is no key.
        """
        return [request_id.encode() if _is_null(value) else key_of(value) for value in values]


def _sent(text: str) -> str:
    """A header as its caller sent it, if that was UTF-8: hosts read each byte as one character (Latin-1). Else it is text
    already, as where a host reads headers as UTF-8."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def place(salt: bytes, key: bytes) -> int:
    """0 to 9,999, evenly (the remainder of 64 bits is uneven by 5e-16)."""
    return int.from_bytes(_blake2b()(salt + key, digest_size=8).digest(), "big") % BASIS_POINTS


@cache
def _blake2b() -> Callable[..., Any]:
    import hashlib  # which brings OpenSSL: a function that starts without a canary does not wait for it

    return hashlib.blake2b


def basis_points(weight: float) -> int:
    """Raises `ConfigurationError` for what is no share."""
    if not 0.0 <= weight <= 1.0:
        raise ConfigurationError(f"weight: expected 0 to 1, got {weight}")
    return round(weight * BASIS_POINTS)


def key_of(value: Any) -> bytes:
    """The bytes that stand for a key's value. Raises `InvalidInput` for what is neither text nor a whole number: fractions, dates
    and lists are written differently by different formats, and a user would change versions between forms."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value)).encode()
    raise InvalidInput(f"a key is text or a whole number, got {type(value).__name__}")


def reassemble(
    rows: Mapping[int, npt.NDArray[np.intp]], outputs: Mapping[int, Mapping[str, npt.NDArray[Any]]]
) -> dict[str, npt.NDArray[Any]]:
    """The versions' outputs as one, each row where it was asked. Raises `InvalidInput` where they have not the same tensors, of
    the same type and width: what cannot be told apart by its reader cannot be one answer."""
    parts = [(rows[version], outputs[version]) for version in rows]
    kinds = {tuple(sorted((name, a.dtype.str, a.shape[1:]) for name, a in made.items())) for _, made in parts}
    if len(kinds) != 1:
        raise InvalidInput(
            f"versions {', '.join(map(str, rows))} give different outputs: a request of both cannot be answered as one"
        )
    total = sum(len(at) for at, _ in parts)
    whole = {name: np.empty((total, *a.shape[1:]), a.dtype) for name, a in parts[0][1].items()}
    for at, made in parts:
        for name, array in made.items():
            whole[name][at] = array
    return whole


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
