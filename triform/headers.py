"""The headers of a request: in the order they came, and by name."""

from __future__ import annotations

from collections.abc import Iterable


class Headers(tuple[tuple[str, str], ...]):
    """Pairs of name and value, a repeated name twice. Indexed once: on its way a request is asked for a dozen names."""

    named: dict[str, list[str]]

    def __new__(cls, pairs: Iterable[tuple[str, str]] = ()) -> Headers:
        made = super().__new__(cls, pairs)
        named: dict[str, list[str]] = {}
        for name, value in made:
            named.setdefault(name.lower(), []).append(value.strip(" \t"))
        made.named = named
        return made


def values(headers: Iterable[tuple[str, str]], name: str) -> list[str]:
    """The values of each line of a header, whose `name` is in lower case; without the blanks around them."""
    if not isinstance(headers, Headers):
        headers = Headers(headers)
    return headers.named.get(name, [])
