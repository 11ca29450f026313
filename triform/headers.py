"""The headers of a request: in the order they came, and by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

REQUEST_ID: Final = "x-request-id"
_CLEAN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+@-]{0,127}")


class Headers(tuple[tuple[str, str], ...]):
    """Pairs of name and value, a repeated name twice. Indexed once: on its way a request is asked for a dozen names."""

    named: dict[str, list[str]]

    def __new__(cls, pairs: Iterable[tuple[str, str]] = ()) -> Headers:
        made = super().__new__(cls, pairs)
        named: dict[str, list[str]] = {}
        for name, value in made:
            name, value = name.lower(), value.strip(" \t")
            if name in named:
                named[name].append(value)
            else:
                named[name] = [value]
        made.named = named
        return made

    @classmethod
    def of_asgi(cls, pairs: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Of an ASGI server, which gives names in lower case."""
        decoded, named = [], dict[str, list[str]]()
        for raw, value in pairs:
            name, text = raw.decode("latin-1"), value.decode("latin-1").strip(" \t")
            decoded.append((name, text))
            if name in named:
                named[name].append(text)
            else:
                named[name] = [text]
        made = super().__new__(cls, decoded)
        made.named = named
        return made


_NONE: Final[list[str]] = []  # never changed


def values(headers: Iterable[tuple[str, str]], name: str) -> list[str]:
    """The values of each line of a header, whose `name` is in lower case; without the blanks around them. Not to be changed."""
    named = headers.named if isinstance(headers, Headers) else Headers(headers).named
    return named.get(name, _NONE)


def request_id(given: Iterable[str]) -> str:
    """The first of these that can stand in a log and a header as it is; else a new one."""
    for one in given:
        if _CLEAN_ID.fullmatch(one):
            return one
    return os.urandom(16).hex()
