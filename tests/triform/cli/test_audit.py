"""`triform audit verify`, and that the commands which change something are on record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Triform = Callable[..., Any]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIFORM_AUDIT", str(tmp_path / "audit.jsonl"))
    return tmp_path / "audit.jsonl"


def told(log: Path) -> list[tuple[str, str, str]]:
    return [(line["what"], line["target"], line["result"]) for line in map(json.loads, log.read_text().splitlines())]


def test_what_changes_something_is_on_record_as_it_ended(triform: Triform, released: Path, log: Path, tmp_path: Path) -> None:
    triform("release", "set", "linear", "--stable", "2", "--reason", "better", "--by", "ann")
    triform("release", "set", "linear", "--stable", "3", "--expect", "1")
    triform("release", "rollback", "linear")
    triform("release", "set", "linear", "--stable", "9")
    triform("repo", "prune")
    triform("repo", "prune", "linear", "--yes")
    triform("keys", "new", "--file", tmp_path / "keys.json")
    triform("keys", "revoke", "nobody", "--file", tmp_path / "keys.json")
    for reads in ("show", "linear"), ("log", "linear"):
        triform("release", *reads)
    found = told(log)
    assert [(what, result) for what, _, result in found] == [
        ("release.set", "ok"),
        ("release.set", "release_conflict"),
        ("release.rollback", "ok"),
        ("release.set", "version_not_found"),
        ("repo.prune", "ok"),
        ("keys.new", "ok"),
        ("keys.revoke", "not_found"),
    ]
    assert {target for _, target, _ in found[:5]} == {"linear"}
    first = json.loads(log.read_text().splitlines()[0])
    assert (first["who"], first["note"]) == ("ann", "stable 2, reason better")
    assert "@" in first["where"]


def test_verify_tells_head_and_faults(triform: Triform, released: Path, log: Path) -> None:
    for version in "23":
        triform("release", "set", "linear", "--stable", version)
    said = triform("audit", "verify")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("ok: 2 entries, head ")
    head = triform("audit", "verify", "--json").json["head"]
    assert head in said.out
    triform("release", "rollback", "linear")
    assert triform("audit", "verify", log, "--contains", head).code == 0
    content = log.read_bytes()
    log.write_bytes(content[:-5])
    torn = triform("audit", "verify", "--json")
    assert (torn.code, torn.json["ok"], "has no end" in torn.json["faults"][0]) == (1, False, True)
    log.write_bytes(content.replace(b'"result":"ok"', b'"result":"no"', 1))
    said = triform("audit", "verify")
    assert (said.code, "fault: line 2: it does not follow" in said.out, "damaged: 3 entries" in said.out) == (1, True, True)
    assert triform("audit", "verify", log, "--contains", head).code == 1


def test_what_cannot_be_recorded_is_not_done(triform: Triform, released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFORM_AUDIT", str(released / "none/audit.jsonl"))
    said = triform("release", "set", "linear", "--stable", "2", "--json")
    assert (said.code, said.json["code"]) == (1, "store_unavailable")
    assert triform("release", "show", "linear", "--json").json["stable"] == 1


def test_without_a_log_there_is_nothing_to_verify(triform: Triform) -> None:
    assert triform("audit", "verify", "--json").json["code"] == "configuration"
    assert triform("audit", "verify", "/nowhere/audit.jsonl").code == 1
