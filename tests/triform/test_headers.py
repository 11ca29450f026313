"""Headers, as a surface asks for them."""

from __future__ import annotations

from triform.headers import Headers, values

PAIRS = [("Accept", " text/csv\t"), ("X-Id", "1"), ("accept", "*/*"), ("x-empty", "")]


def test_values_are_found_without_case_and_in_their_order() -> None:
    for headers in PAIRS, Headers(PAIRS), Headers(iter(PAIRS)):
        assert values(headers, "accept") == ["text/csv", "*/*"]
        assert values(headers, "x-empty") == [""]
        assert values(headers, "x-gone") == []


def test_they_stay_as_they_came() -> None:
    assert [*Headers(PAIRS)] == PAIRS
    assert ("Accept", " text/csv\t") in Headers(PAIRS)
