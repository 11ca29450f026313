"""Headers, as a surface asks for them."""

from __future__ import annotations

import pytest

from triform.headers import Headers, values

PAIRS = [("Accept", " text/csv\t"), ("X-Id", "1"), ("accept", "*/*"), ("x-empty", "")]


def test_values_are_found_without_case_and_in_their_order() -> None:
    for headers in PAIRS, Headers(PAIRS), Headers(iter(PAIRS)):
        assert [*values(headers, "accept")] == ["text/csv", "*/*"]
        assert [*values(headers, "x-id")] == ["1"]
        assert [*values(headers, "x-empty")] == [""]
        assert [*values(headers, "x-gone")] == []


def test_they_stay_as_they_came() -> None:
    assert [*Headers(PAIRS)] == PAIRS
    assert ("Accept", " text/csv\t") in Headers(PAIRS)


@pytest.mark.parametrize("value", ["1", "", " \t", "caf\xe9", "a\0b", "\0"])
def test_those_of_an_asgi_server_are_the_same(value: str) -> None:
    pairs = [("accept", "text/csv"), ("x-one", value), ("accept", "*/*"), ("x-empty", "")]
    headers = Headers.of_asgi([(name.encode(), text.encode("latin-1")) for name, text in pairs])
    assert [*headers] == [(name, text.strip(" \t")) for name, text in pairs]
    assert {name: [*given] for name, given in headers.named.items()} == {
        "accept": ["text/csv", "*/*"],
        "x-one": [value.strip(" \t")],
        "x-empty": [""],
    }


def test_a_request_may_have_none() -> None:
    assert not Headers.of_asgi([])
    assert not Headers.of_asgi([]).named
