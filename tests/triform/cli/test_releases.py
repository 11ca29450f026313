"""`triform repo list` and `triform release set|show|log|rollback`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Triform = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("released")


def test_repo_list_shows_versions_and_what_is_released(triform: Triform, released: Path) -> None:
    said = triform("repo", "list")
    assert (said.code, said.err) == (0, "")
    assert [cell.strip() for cell in said.out.splitlines()[3].split("│")[1:-1]] == [
        "linear",
        "1, 2, 3",
        "1",
        "2 (10%)",
        "3 (50%)",
        "1",
    ]
    told = triform("repo", "list", "--json").json
    assert told["repository"] == str(released)
    assert [(m["model"], m["versions"], m["release"]["stable"]) for m in told["models"]] == [("linear", [1, 2, 3], 1)]


def test_repo_list_of_nothing_is_no_error(triform: Triform, tmp_path: Path) -> None:
    assert triform("repo", "list", "-r", tmp_path / "none").code == 0
    assert triform("repo", "list", "-r", tmp_path / "none", "--json").json["models"] == []


def test_a_canary_may_bring_its_own_key(triform: Triform) -> None:
    canary = ["--canary", "3", "--weight", "0.1"]
    made = triform("release", "set", "linear", *canary, "--key-header", "x-user", "--key-column", "user", "--json").json
    assert made["canary"]["key"] == {"header": "x-user", "column": "user"}
    assert triform("release", "set", "linear", *canary[:3], "0.2", "--json").json["canary"]["key"] == made["canary"]["key"]
    refused = triform("release", "set", "linear", "--stable", "2", "--key-header", "x-user")
    assert refused.code != 0
    assert "--canary" in refused.err
    assert triform("release", "set", "linear", *canary, "--key-header", " ").code != 0


def test_a_release_is_set_shown_logged_and_rolled_back(triform: Triform) -> None:
    options = ["--stable", "2", "--canary", "3", "--weight", "0.255", "--reason", "try", "--by", "ann"]
    made = triform("release", "set", "linear", *options, "--json")
    assert (made.code, made.json["revision"], made.json["previous"]) == (0, 2, 1)
    assert made.json["canary"] == {"version": 3, "weight": 0.255}
    assert triform("release", "show", "linear", "--json").json == made.json
    shown = triform("release", "show", "linear").out
    for piece in ("3 (25.5%)", "ann: try", made.json["changed_at"][:16]):
        assert piece in shown
    assert max(map(len, shown.splitlines())) <= 80
    back = triform("release", "rollback", "linear", "--reason", "worse", "--json").json
    assert (back["revision"], back["stable"], back["canary"], back["reason"]) == (3, 2, None, "worse")
    assert triform("release", "rollback", "linear").code == 0
    log = triform("release", "log", "linear", "--json").json
    assert [(r["revision"], r["stable"]) for r in log] == [(4, 1), (3, 2), (2, 2), (1, 1)]
    assert [r["revision"] for r in triform("release", "log", "linear", "--limit", "2", "--json").json] == [4, 3]
    assert triform("release", "log", "linear").out.count("@") >= 2  # who did it is known without --by


def test_expect_refuses_when_somebody_was_first(triform: Triform) -> None:
    assert triform("release", "set", "linear", "--stable", "2", "--expect", "1").code == 0
    said = triform("release", "set", "linear", "--stable", "3", "--expect", "1", "--json")
    assert (said.code, said.json["code"]) == (1, "release_conflict")
    assert triform("release", "show", "linear", "--json").json["stable"] == 2


@pytest.mark.parametrize("reason", ["[/red] back [bold]", "a\nb", "é 日本", "\x1b[31mred", "--json"])
def test_any_reason_is_shown_as_it_is_and_never_breaks_the_log(triform: Triform, reason: str) -> None:
    made = triform("release", "set", "linear", f"--reason={reason}", "--by", "[/x]")
    assert made.code == 0
    for command in ("show", "log"):
        said = triform("release", command, "linear")
        assert said.code == 0
        assert "[/x]" in said.out
        assert "\x1b" not in said.out
        unfolded = "".join(said.out.replace("│", "").split())
        assert "".join(reason.replace("\n", "\\n").replace("\x1b", "\\x1b").split()) in unfolded
    assert triform("release", "show", "linear", "--json").json["reason"] == reason


def test_a_model_that_was_never_released_says_so(triform: Triform, released: Path) -> None:
    shutil.rmtree(released / "linear/releases")
    for command in ("show", "rollback"):
        said = triform("release", command, "linear", "--json")
        assert (said.code, said.json["code"]) == (1, "alias_not_found")
    assert triform("release", "log", "linear", "--json").json == []
    assert triform("release", "set", "linear").code == 2
