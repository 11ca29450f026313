"""Which version answers a key: sticky, monotone, fair, the same in every form; requests split by record and reassembled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.errors import ConfigurationError, InvalidInput
from triform.headers import Headers
from triform.releases import Canary, Release
from triform.splitting import BASIS_POINTS, KeyRule, TrafficSplit, basis_points, key_of, place, reassemble

KEYS = st.binary(max_size=40)
WEIGHTS = st.integers(0, BASIS_POINTS).map(lambda points: points / BASIS_POINTS)


def release(weight: float | None, salt: str = "5eed5eed5eed5eed") -> Release:
    canary = None if weight is None else Canary(2, weight)
    return Release(
        revision=1, stable=1, previous=None, canary=canary, shadow=None, salt=salt, nonce="", reason="", changed_by="",
        changed_at="",
    )  # fmt: skip


def split(weight: float | None, salt: str = "5eed5eed5eed5eed") -> TrafficSplit:
    return TrafficSplit.of(release(weight, salt))


@given(KEYS, WEIGHTS, WEIGHTS)
def test_raising_the_weight_only_adds_keys(key: bytes, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not (split(low).choose(key) == 2 and split(high).choose(key) == 1)


@given(KEYS, WEIGHTS)
def test_a_key_stays_on_its_version(key: bytes, weight: float) -> None:
    assert split(weight).choose(key) == split(weight).choose(key)
    assert split(0.0).choose(key) == split(None).choose(key) == 1
    assert split(1.0).choose(key) == 2


def test_places_are_those_of_every_other_implementation() -> None:
    """Fixed for ever: another Triform must send the same user the same way."""
    assert [place(b"5eed5eed5eed5eed", key) for key in (b"", b"ann", b"7", "Zoë".encode())] == [
        7647,
        9682,
        2124,
        7310,
    ]  # b2sum -l 64


@pytest.mark.parametrize("weight", [0.0001, 0.01, 0.1, 0.5, 0.9])
def test_the_share_of_keys_is_the_weight(weight: float) -> None:
    keys = [f"user-{i}".encode() for i in range(100_000)]
    share = np.mean([split(weight).choose(key) == 2 for key in keys])
    assert abs(share - weight) < 5 * np.sqrt(weight * (1 - weight) / len(keys)) + 1e-9


def test_another_salt_draws_anew() -> None:
    keys = [f"user-{i}".encode() for i in range(20_000)]
    both = np.mean([split(0.5, "a" * 16).choose(key) == split(0.5, "b" * 16).choose(key) for key in keys])
    assert 0.48 < both < 0.52


@given(st.lists(KEYS, max_size=30), WEIGHTS)
def test_a_split_has_every_row_once_and_agrees_with_choose(keys: list[bytes], weight: float) -> None:
    rows = split(weight).split(keys)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(keys))) if keys else True
    assert {int(row): version for version, at in rows.items() for row in at} == {
        i: split(weight).choose(k) for i, k in enumerate(keys)
    }


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), WEIGHTS)
def test_what_was_split_comes_back_in_its_order(users: list[int], weight: float) -> None:
    rows = split(weight).split([key_of(user) for user in users])
    outputs = {version: {"user": np.asarray(users)[at], "by": np.full((len(at), 2), version)} for version, at in rows.items()}
    whole = reassemble(rows, outputs)
    assert whole["user"].tolist() == users
    assert whole["by"][:, 1].tolist() == [split(weight).choose(key_of(user)) for user in users]


def test_versions_that_answer_differently_cannot_be_one_answer() -> None:
    rows = {1: np.array([0, 2]), 2: np.array([1])}
    one = {"y": np.zeros((2, 3), np.float32)}
    for other in ({"y": np.zeros((1, 2), np.float32)}, {"y": np.zeros((1, 3))}, {"z": np.zeros((1, 3), np.float32)}):
        with pytest.raises(InvalidInput, match="versions 1, 2 give different outputs"):
            reassemble(rows, {1: one, 2: other})


RULE = KeyRule("X-User", "user")


@pytest.mark.parametrize(
    ("headers", "key"), [({"x-user": [" ann "]}, b"ann"), ({"x-user": [" "]}, None), ({"x-user": ["\xa0"]}, None), ({}, None)]
)
def test_the_header_is_the_key_of_the_whole_request(headers: Any, key: bytes | None) -> None:
    assert RULE.of_request(headers) == key
    assert KeyRule().of_request(headers) is None


NAMES = ["ann", "user-7", "jürgen", "Zoë", "voilà", "Юрий", "東京", "😀", "Ã¼"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_same_key_in_a_header_and_in_a_column(name: str) -> None:
    """As ASGI has it: the bytes, read as Latin-1. `à` ends with a byte that is a blank there."""
    headers = Headers.of_asgi([(b"x-user", name.encode())])
    assert [RULE.of_request(headers.named)] == RULE.of_rows([name], "request-1") == [name.encode()]


@pytest.mark.parametrize("name", ["ann", "user-7", "jürgen", "Zoë", "Юрий", "東京"])
def test_so_it_is_where_the_host_has_read_the_header_as_utf8(name: str) -> None:
    assert RULE.of_request({"x-user": [name]}) == name.encode()


def test_what_is_no_utf8_is_a_key_too() -> None:
    assert RULE.of_request(Headers.of_asgi([(b"x-user", b"j\xfcrgen")]).named) == "jürgen".encode()


ROWS: list[tuple[Any, list[bytes]]] = [
    (["bob", "bob"], [b"bob", b"bob"]),
    (np.array([7, 8], np.int32), [b"7", b"8"]),
    (["7", None, float("nan")], [b"7", b"request-1", b"request-1"]),
    ([], []),
]


@pytest.mark.parametrize(("values", "keys"), ROWS)
def test_a_column_has_a_key_for_each_row(values: Any, keys: list[bytes]) -> None:
    assert RULE.of_rows(values, "request-1") == keys


NUMBERS = [7, 8, None, 9]
COLUMNS = [
    pa.array(NUMBERS, pa.int32()), pa.array(NUMBERS, pa.uint64()), pa.array(["7", "8", None, "9"]),
    pa.array(["7", "8", None, "9"]).dictionary_encode(), pa.array(["7", "8", None, "9"], pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS, ids=[str(column.type) for column in COLUMNS])
def test_a_column_of_a_parquet_file_means_the_same_users(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"user": column}), tmp_path / "users.parquet")
    read = pq.read_table(tmp_path / "users.parquet").column("user").to_pylist()
    assert RULE.of_rows(read, "nobody") == [b"7", b"8", b"nobody", b"9"]


@pytest.mark.parametrize("value", [1.5, True, [1], {"a": 1}, np.datetime64("2013-01-01"), np.float32(2)])
def test_what_formats_write_differently_is_no_key(value: Any) -> None:
    with pytest.raises(InvalidInput, match="a key is text or a whole number"):
        RULE.of_rows(["a", value], "request-1")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(ConfigurationError, match="weight: expected 0 to 1"):
        basis_points(weight)
    with pytest.raises(ConfigurationError, match=r"key.header: expected a name"):
        KeyRule(header=" ")


def test_a_header_is_found_whatever_spaces_and_capitals_its_rule_has() -> None:
    assert KeyRule(header=" X-User ").of_request({"x-user": ["ann"]}) == b"ann"


def test_splitting_imports_nothing_of_rollouts() -> None:
    code = "import sys, triform.splitting; print([m for m in sys.modules if 'rollout' in m or m in ('onnxruntime', 'pyarrow')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
