"""`triform keys new|list|revoke`."""

from __future__ import annotations

import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from triform.api_keys import Presented, read_file, stored_of

Triform = Callable[..., Any]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key file that is not there yet, named by TRIFORM_API_KEYS_FILE."""
    monkeypatch.setenv("TRIFORM_API_KEYS_FILE", str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


def test_a_key_is_printed_once_and_kept_as_a_hash(triform: Triform, file: Path) -> None:
    said = triform(
        "keys", "new", "--role", "infer", "--role", "operate", "--model", "churn", "--days", "90", "--note", "team [A]"
    )
    assert said.code == 0
    presented = Presented.parse(said.out.strip())
    assert presented is not None
    (kept,) = read_file(file).values()
    assert (kept.id, kept.stored) == (presented.id, stored_of(presented.client_key).hex())
    assert (kept.roles, kept.models, kept.note) == ({"infer", "operate"}, {"churn"}, "team [A]")
    assert kept.created is not None
    assert kept.expires is not None
    assert (kept.expires - kept.created).days == 90
    assert presented.secret not in file.read_text() + said.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".lock"] == ["keys.json"]


def test_what_nothing_is_said_of(triform: Triform, file: Path) -> None:
    made = triform("keys", "new", "--json").json
    (kept,) = read_file(file).values()
    assert made["key"].startswith(f"trf_{kept.id}_")
    assert (kept.roles, kept.models) == ({"infer"}, None)
    assert kept.expires is not None  # in a year: a key that nobody thinks of ends by itself
    triform("keys", "new", "--days", "0")
    assert [key.expires is None for key in read_file(file).values()] == [False, True]


def test_keys_are_listed_without_secrets_and_revoked(triform: Triform, file: Path) -> None:
    made = [triform("keys", "new", "--note", note, "--json").json for note in ("a", "b\x1b[31m")]
    listed = triform("keys", "list")
    assert (listed.code, listed.err) == (0, "")
    told = triform("keys", "list", "--json")
    assert [(key["id"], key["roles"], key["expired"]) for key in told.json] == [(key["id"], ["infer"], False) for key in made]
    for key in made:
        assert key["id"] in listed.out
        assert not any(key["key"].split("_", 2)[2] in out for out in (listed.out, told.out))
    assert "stored" not in told.out
    assert "\x1b" not in listed.out
    file.chmod(0o640)  # so that a group may read it, and it stays so
    assert triform("keys", "revoke", made[0]["id"]).code == 0
    assert list(read_file(file)) == [made[1]["id"]]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    again = triform("keys", "revoke", made[0]["id"])
    assert (again.code, f"there are: {made[1]['id']}" in "".join(again.err.split("\n"))) == (1, True)


@pytest.mark.parametrize(
    "wrong", [("--role", "admin"), ("--model", "../x"), ("--days", "-1"), ("--days", "nan"), ("--role", "infer,operate")]
)
def test_wrong_use_makes_no_key(triform: Triform, file: Path, wrong: tuple[str, str]) -> None:
    assert triform("keys", "new", *wrong).code == 2
    assert not file.exists()


def test_a_broken_file_is_not_written_over(triform: Triform, file: Path) -> None:
    file.write_text('{"keys": [')
    for command in ("new",), ("list",), ("revoke", "abcd"):
        said = triform("keys", *command)
        assert (said.code, "api_keys_file" in said.err) == (2, True)
    assert file.read_text() == '{"keys": ['


def test_without_a_file_there_is_nothing_to_do(triform: Triform) -> None:
    assert triform("keys", "list", "--json").json["code"] == "configuration"
    assert triform("keys", "new", "--file", "/nowhere/at/all/keys.json").code == 1


def test_keys_made_at_once_are_all_there(file: Path, python: Callable[..., Popen[str]]) -> None:
    code = "import sys; sys.argv = ['triform', 'keys', 'new']; from triform.cli import main; main()"
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: python("-c", code).communicate(timeout=120), range(2)))
    ids = {out.split("_")[1] for out, _ in said}
    assert set(read_file(file)) == ids
    assert len(ids) == 2
