"""`triform repo prune`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triform.repository import open_repository

Triform = Callable[..., Any]


@pytest.fixture
def old(three_versions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Versions 1, 2 and 3, a month old and never released; named by TRIFORM_REPOSITORY."""
    for path in three_versions.rglob("*"):
        os.utime(path, times=(path.stat().st_mtime - 30 * 86400,) * 2)
    monkeypatch.setenv("TRIFORM_REPOSITORY", str(three_versions))
    return three_versions


def test_without_yes_it_only_tells(triform: Triform, old: Path) -> None:
    said = triform("repo", "prune")
    assert (said.code, said.err) == (0, "")
    for piece in (
        "linear",
        "goes",
        "stays: the newest",
        "would remove 2 versions, 0 leftovers",
        "nothing was changed: --yes does",
    ):
        assert piece in said.out
    assert max(map(len, said.out.splitlines()[:-1])) <= 80
    assert open_repository(old).versions("linear") == [1, 2, 3]
    told = triform("repo", "prune", "--json").json
    assert told["dry_run"] is True
    assert {v["version"]: v["stays"] for v in told["models"][0]["versions"]} == {1: None, 2: None, 3: "the newest"}
    assert told["models"][0]["bytes"] > 0


def test_with_yes_it_does_it_and_a_second_one_finds_nothing(triform: Triform, old: Path) -> None:
    assert "removed 2 versions" in triform("repo", "prune", "linear", "--yes").out
    assert open_repository(old).versions("linear") == [3]
    assert "removed 0 versions, 0 leftovers, 0 bytes" in triform("repo", "prune", "--yes").out
    said = triform("release", "set", "linear", "--stable", "1", "--json")
    assert (said.code, said.json["code"]) == (1, "version_not_found")
    assert "was pruned" in said.json["error"]


@pytest.mark.parametrize("option", [("--keep-versions", "3"), ("--older-than", "31")])
def test_each_option_keeps(triform: Triform, old: Path, option: tuple[str, str]) -> None:
    assert triform("repo", "prune", "--yes", *option).code == 0
    assert open_repository(old).versions("linear") == [1, 2, 3]


def test_keep_revisions_says_how_far_back_releases_count(triform: Triform, old: Path) -> None:
    for version in "123":
        triform("release", "set", "linear", "--stable", version)
    stays = triform("repo", "prune", "--keep-revisions", "1", "--json").json["models"][0]["versions"]
    assert [v["stays"] for v in stays] == [None, "previous in revision 3", "stable in revision 3"]
    assert "would remove 0 versions" in triform("repo", "prune").out


@pytest.mark.parametrize("wrong", [("--keep-revisions", "0"), ("--keep-versions", "0"), ("--older-than", "-1")])
def test_what_would_keep_too_little_is_wrong_use(triform: Triform, old: Path, wrong: tuple[str, str]) -> None:
    assert triform("repo", "prune", "--yes", *wrong).code == 2
    assert triform("repo", "prune", "nobody", "--json").json["code"] == "model_not_found"
    assert open_repository(old).versions("linear") == [1, 2, 3]
