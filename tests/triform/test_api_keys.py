"""API keys: what is kept of one, what a file may say, and how it changes under a running host."""

from __future__ import annotations

import logging
import os
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.api_keys import LOOK_SECONDS, TELL_SECONDS, ApiKey, KeyFile, KeyRing, Presented, new_key, read, stored_of
from triform.errors import ConfigurationError

NOW = datetime(2026, 11, 21, tzinfo=UTC)
KEY = new_key({"infer"})


def written(path: Path, *keys: ApiKey) -> Path:
    path.write_bytes(msgspec.json.encode(KeyRing(list(keys))))
    return path


@given(
    st.sets(st.sampled_from(["infer", "operate"]), min_size=1), st.sets(st.from_regex("[a-z]{1,9}", fullmatch=True)), st.text()
)
def test_what_is_kept_knows_its_key_and_no_other(roles: set[Any], models: set[str], note: str) -> None:
    text, kept = new_key(roles, models=models, note=note, created=NOW, expires=NOW + timedelta(days=1))
    presented = Presented.parse(text)
    assert presented is not None
    assert (presented.id, stored_of(presented.client_key).hex()) == (kept.id, kept.stored)
    content = msgspec.json.encode(KeyRing([kept]))
    assert read(content, "here") == {kept.id: kept}
    assert presented.secret.encode() not in content
    assert presented.client_key.hex().encode() not in content
    assert kept.models == (frozenset(models) if models else None)
    assert new_key(roles)[1].stored != kept.stored


@given(st.data())
def test_a_key_with_any_character_changed_is_another_or_none(data: st.DataObject) -> None:
    text, kept = KEY
    at = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.sampled_from(string.printable + "\u0430\uff45\U0001d7ec\x00\u2028").filter(lambda c: c != text[at]))
    other = Presented.parse(text[:at] + character + text[at + 1 :])
    assert other is None or (other.id, stored_of(other.client_key).hex()) != (kept.id, kept.stored)


@given(st.one_of(st.text(), st.from_regex(r"trf_.*", fullmatch=True)))
def test_what_is_no_key_is_told_from_one(text: str) -> None:
    presented = Presented.parse(text)
    assert presented is None or text == f"trf_{presented.id}_{presented.secret}"


@pytest.mark.parametrize(
    "text", ["", "trf_", "TRF_{}_{}", "trf_{}_{} ", "trf_{}_{}\n", " trf_{}_{}", "trf_{}_{}x", "trf__{1}", "trf_{}"]
)
def test_forms_that_are_nearly_right(text: str) -> None:
    presented = Presented.parse(new_key({"infer"})[0])
    assert presented is not None
    assert Presented.parse(text.format(*presented)) is None


GOOD: dict[str, Any] = {"id": "abcd", "stored": "0" * 64, "roles": ["infer"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "here: "),
        (b"[]", "here: "),
        (b'{"keys": [', "here: "),
        (b"\xff", "here: "),
        ({"keys": [GOOD], "format": 2}, "format"),
        ({"keys": [GOOD], "colour": 1}, "colour"),
        ({"keys": [GOOD | {"colour": 1}]}, r"keys\[0\]|keys\[...\]"),
        ({"keys": [GOOD | {"roles": []}]}, "roles"),
        ({"keys": [GOOD | {"roles": ["admin"]}]}, "roles"),
        ({"keys": [GOOD | {"id": "A B"}]}, "id"),
        ({"keys": [GOOD | {"id": "абвг"}]}, "id"),
        ({"keys": [GOOD | {"stored": "0" * 63}]}, "stored"),
        ({"keys": [GOOD | {"stored": "0" * 64 + "\n"}]}, "stored"),
        ({"keys": [GOOD | {"models": []}]}, "models"),
        ({"keys": [GOOD | {"expires": "tomorrow"}]}, "expires"),
        ({"keys": [GOOD | {"expires": "2027-01-01T00:00:00"}]}, "expires"),  # of no time zone
        ({"keys": [GOOD, GOOD]}, "'abcd' stands there twice"),
    ],
)
def test_a_file_that_cannot_be_right_says_where(content: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^here: ") as refusal:
        read(content if isinstance(content, bytes) else msgspec.json.encode(content), "here")
    assert refusal.match(told)


def test_a_key_expires_at_its_moment() -> None:
    key = new_key({"infer"}, expires=NOW)[1]
    assert [key.expired(NOW.timestamp() + late) for late in (-0.001, 0.0, 0.001)] == [False, True, True]
    assert not new_key({"infer"})[1].expired(1e12)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rotating(tmp_path: Path) -> tuple[Path, KeyFile, Clock, ApiKey, ApiKey]:
    """A file with one key, a second key to come, and a clock to move."""
    one, two, clock = new_key({"infer"})[1], new_key({"operate"})[1], Clock()
    path = written(tmp_path / "keys.json", one)
    return path, KeyFile(path, clock=clock), clock, one, two


Rotating = tuple[Path, KeyFile, Clock, ApiKey, ApiKey]


def test_a_changed_file_is_in_force_within_a_second(rotating: Rotating) -> None:
    path, keys, clock, one, two = rotating
    assert (keys.get(one.id), keys.get(two.id)) == (one, None)
    written(path, two)
    clock.now += LOOK_SECONDS - 0.01
    assert (keys.get(one.id), keys.get(two.id)) == (one, None)
    clock.now += 0.02
    assert (keys.get(one.id), keys.get(two.id)) == (None, two)


def test_a_file_of_the_same_size_and_time_put_in_its_place_is_seen(rotating: Rotating) -> None:
    path, keys, clock, one, _ = rotating
    before = path.stat()
    other = msgspec.structs.replace(one, stored="f" * 64)
    written(path.with_name("new"), other).replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    clock.now += LOOK_SECONDS
    assert keys.get(one.id) == other


def test_a_mounted_secret_changes_by_its_link(tmp_path: Path) -> None:
    """Kubernetes, Secrets, "Mounted Secrets are updated automatically": ..data becomes a link to another folder."""
    one, two, clock = new_key({"infer"})[1], new_key({"infer"})[1], Clock()
    for name, key in ("v1", one), ("v2", two):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "keys.json", key)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    keys = KeyFile(tmp_path / "keys.json", clock=clock)
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").replace(tmp_path / "..data")
    clock.now += LOOK_SECONDS
    assert (keys.get(one.id), keys.get(two.id)) == (None, two)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text('{"keys": ['),
        lambda path: path.write_text('{"keys": [], "colour": 1}'),
        lambda path: path.write_bytes(b" " * (5 << 20)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["cut", "unknown field", "huge", "gone", "a folder"],
)
def test_a_broken_file_leaves_the_old_keys_and_is_told_loudly(
    rotating: Rotating, spoil: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, keys, clock, one, two = rotating
    spoil(path)

    def errors() -> int:
        return len([r for r in caplog.records if r.levelno == logging.ERROR and "NOT in force" in r.getMessage()])

    for _ in range(5):  # once told, it is not told again at once
        clock.now += LOOK_SECONDS
        assert keys.get(one.id) == one
    assert errors() == 1
    clock.now += TELL_SECONDS
    assert keys.get(one.id) == one
    assert errors() == 2
    if path.is_dir():
        path.rmdir()
    written(path, two)
    clock.now += LOOK_SECONDS
    assert (keys.get(one.id), keys.get(two.id)) == (None, two)


def test_a_start_with_a_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"api_keys_file: .* cannot be read: No such file"):
        KeyFile(tmp_path / "none.json")
