"""The headers of a request: in the order they came, and by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Final

REQUEST_ID: Final = "x-request-id"
_CLEAN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+@-]{0,127}")


class Headers(tuple[tuple[str, str], ...]):
    """Pairs of name and value, a repeated name twice. Indexed once: on its way a request is asked for a dozen names.

    `named`: the values by name, in lower case, without the blanks around them; not to be changed.
    """

    named: Mapping[str, Sequence[str]]

    def __new__(cls, pairs: Iterable[tuple[str, str]] = ()) -> Headers:
        made = super().__new__(cls, pairs)
        made.named = _index([name.lower() for name, _ in made], [value.strip(" \t") for _, value in made])
        return made

    @classmethod
    def of_asgi(cls, pairs: Sequence[tuple[bytes, bytes]]) -> Headers:
        """Of an ASGI server, which gives names in lower case. All are decoded at once: one by one takes several times as long."""
        texts = b"\0".join(chain.from_iterable(pairs)).decode("latin-1").split("\0") if pairs else []
        if len(texts) != 2 * len(pairs):  # a NUL, which servers refuse
            texts = [part.decode("latin-1") for part in chain.from_iterable(pairs)]
        names, given = texts[::2], [value.strip(" \t") for value in texts[1::2]]
        made = super().__new__(cls, zip(names, given, strict=True))
        made.named = _index(names, given)
        return made


def _index(names: Sequence[str], given: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The values of each name."""
    once: dict[str, Sequence[str]] = dict(zip(names, zip(given, strict=True), strict=True))
    if len(once) == len(names):
        return once
    named: dict[str, list[str]] = {}
    for name, value in zip(names, given, strict=True):
        named.setdefault(name, []).append(value)
    return named


def named(headers: Iterable[tuple[str, str]]) -> Mapping[str, Sequence[str]]:
    """As `Headers.named`, of any."""
    return headers.named if isinstance(headers, Headers) else Headers(headers).named


def values(headers: Iterable[tuple[str, str]], name: str) -> Sequence[str]:
    """The values of each line of a header, whose `name` is in lower case; without the blanks around them."""
    return named(headers).get(name, ())


def request_id(given: Iterable[str]) -> str:
    """The first of these that can stand in a log and a header as it is; else a new one."""
    for one in given:
        if _CLEAN_ID.fullmatch(one):
            return one
    return os.urandom(16).hex()
