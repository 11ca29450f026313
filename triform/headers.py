"""The headers of a request: in the order they came, and by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

Named = Mapping[str, Sequence[str]]  # the values of each header, by its name in lower case
REQUEST_ID: Final = "x-request-id"
_AT_ONCE: Final = 64  # ids
_CLEAN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+@-]{0,127}")


class Headers(tuple[tuple[str, str], ...]):
    """Pairs of name and value, a repeated name twice. Indexed once: on its way a request is asked for a dozen names.

    `named`: the values by name, in lower case, without the blanks around them; not to be changed.
    """

    named: Named

    def __new__(cls, pairs: Iterable[tuple[str, str]] = ()) -> Headers:
        made = super().__new__(cls, pairs)
        named: dict[str, list[str]] = {}
        for name, value in made:
            named.setdefault(name.lower(), []).append(value.strip(" \t"))
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


def named(headers: Iterable[tuple[str, str]]) -> Named:
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
    try:
        return _new_ids.pop()
    except IndexError:
        return _more_ids()


_new_ids: Final[list[str]] = []  # taken and put by any thread: `pop` and `extend` are each done at once


def _more_ids() -> str:
    """One, and others for later: to ask the kernel for randomness takes longer than to read a small request."""
    digits = os.urandom(16 * _AT_ONCE).hex()
    first, *others = (digits[start : start + 32] for start in range(0, len(digits), 32))
    _new_ids.extend(others)
    return first


def forget_ids() -> None:
    """For a copy of a process, whose original will give the same."""
    _new_ids.clear()


os.register_at_fork(after_in_child=forget_ids)
