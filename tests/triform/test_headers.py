"""Headers, as a surface asks for them."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from triform.headers import Headers, request_id, values

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


def test_new_ids_are_never_the_same() -> None:
    with ThreadPoolExecutor(4) as threads:
        made = [*threads.map(lambda _: request_id(["not clean"]), range(1000))]
    assert len({*made}) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


def test_a_forked_process_gives_other_ids() -> None:
    request_id([])
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, "".join(request_id([]) for _ in range(100)).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    its = os.read(reads, 3200).decode()
    os.close(reads)
    os.close(writes)
    assert not {request_id([]) for _ in range(100)} & {its[start : start + 32] for start in range(0, 3200, 32)}
