"""The release log: set, roll back, look back; one winner a revision."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from triform.errors import (
    AliasNotFound,
    DigestMismatch,
    InvalidRequest,
    ReleaseConflict,
    StoreError,
    VersionNotFound,
)
from triform.releases import Canary, Release, ReleaseLog, Shadow
from triform.repository import ModelRepository, open_repository


@pytest.fixture
def log(three_versions: Path) -> ReleaseLog:
    return ReleaseLog(open_repository(three_versions), "linear")


@pytest.fixture
def released(released_models: Path) -> ReleaseLog:
    """The log of `linear` at revision 1: stable 1, canary 2, shadow 3."""
    return ReleaseLog(open_repository(released_models), "linear")


def test_the_first_revision_is_a_readable_file(released: ReleaseLog, released_models: Path) -> None:
    content = json.loads((released_models / "linear/releases/000001.json").read_text())
    assert content.pop("salt")
    assert content.pop("nonce")
    assert content.pop("changed_at").endswith("+00:00")
    assert content == {
        "revision": 1,
        "stable": 1,
        "previous": None,
        "canary": {"version": 2, "weight": 0.1},
        "shadow": {"version": 3, "sample": 0.5},
        "reason": "first",
        "changed_by": "ann",
    }


def test_what_is_not_named_is_gone_but_stable_stays(released: ReleaseLog) -> None:
    now = released.set(canary=Canary(3, 1.0))
    assert (now.revision, now.stable, now.previous, now.canary, now.shadow) == (2, 1, None, Canary(3, 1.0), None)
    now = released.set()
    assert (now.stable, now.canary) == (1, None)


def test_previous_is_the_stable_before_this_one(released: ReleaseLog) -> None:
    stable = [1, 2, 2, 3]
    releases = [released.set(stable=version) for version in stable]
    assert [r.previous for r in releases] == [None, 1, 1, 2]


def test_the_salt_stays_for_one_rollout(released: ReleaseLog) -> None:
    first = released.set(canary=Canary(2, 0.05))
    wider = released.set(canary=Canary(2, 0.5))
    other = released.set(canary=Canary(3, 0.5))
    again = [released.set(), released.set(canary=Canary(3, 0.5))][1]
    assert first.salt == wider.salt
    assert len({first.salt, other.salt, again.salt}) == 3
    assert len({r.nonce for r in released.history()}) == 6


def test_rollback_takes_the_canary_off_then_goes_back_to_previous(released: ReleaseLog) -> None:
    released.set(stable=2, canary=Canary(3, 0.5))
    now = released.rollback(reason="errors", changed_by="bob")
    assert (now.stable, now.canary, now.reason, now.changed_by) == (2, None, "errors", "bob")
    now = released.rollback()
    assert (now.stable, now.previous, now.revision) == (1, 2, 4)


def test_rollback_needs_neither_the_new_version_nor_its_files(released: ReleaseLog, released_models: Path) -> None:
    released.set(stable=2)
    for file in (released_models / "linear/2").iterdir():
        file.write_bytes(b"")
    assert released.rollback().stable == 1


def test_there_must_be_something_to_roll_back_to(log: ReleaseLog) -> None:
    with pytest.raises(AliasNotFound, match="never released"):
        log.rollback()
    log.set(stable=1)
    with pytest.raises(AliasNotFound, match="nothing to roll back to"):
        log.rollback()
    assert len(log.history()) == 1


def test_history_is_newest_first_and_limited(released: ReleaseLog) -> None:
    for reason in "abc":
        released.set(reason=reason)
    assert [r.reason for r in released.history()] == ["c", "b", "a", "first"]
    assert [r.reason for r in released.history(2)] == ["c", "b"]
    assert released.read(2).reason == "a"
    with pytest.raises(VersionNotFound, match="no release revision 9"):
        released.read(9)


NAN = float("nan")
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"canary": Canary(2, NAN)}, InvalidRequest, "canary weight: expected 0 to 1, got nan"),
    ({"canary": Canary(2, -0.1)}, InvalidRequest, "canary weight"),
    ({"canary": Canary(2, 1.0001)}, InvalidRequest, "canary weight"),
    ({"canary": Canary(2, float("inf"))}, InvalidRequest, "canary weight"),
    ({"shadow": Shadow(2, NAN)}, InvalidRequest, "shadow sample"),
    ({"shadow": Shadow(2, 2.0)}, InvalidRequest, "shadow sample"),
    ({"canary": Canary(1, 0.5)}, InvalidRequest, "version 1 cannot be stable and canary at once"),
    ({"stable": 2, "canary": Canary(2, 0.5)}, InvalidRequest, "version 2 cannot be stable and canary"),
    ({"stable": 9}, VersionNotFound, r"no version 9 .it has: 1, 2, 3.; the release stays as it is"),
    ({"stable": 0}, VersionNotFound, "no version 0"),
    ({"stable": -1}, VersionNotFound, "no version -1"),
    ({"canary": Canary(9, 0.5)}, VersionNotFound, "no version 9"),
    ({"shadow": Shadow(9, 0.5)}, VersionNotFound, "no version 9"),
    ({"reason": "x" * 1001}, InvalidRequest, "1001 characters, 1000 at most"),
    ({"expect": 0}, ReleaseConflict, r"at revision 1 .by ann: stable 1.*, not 0"),
    ({"expect": 2}, ReleaseConflict, "not 2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "told"), WRONG)
def test_what_is_refused_leaves_the_old_release_in_force(
    released: ReleaseLog, change: dict[str, Any], error: type[Exception], told: str
) -> None:
    before = released.current()
    with pytest.raises(error, match=told):
        released.set(**change)
    assert released.current() == before


@pytest.mark.parametrize("stable", [None, 0, 7])
def test_the_first_release_names_a_stable_version_that_is_there(log: ReleaseLog, stable: int | None) -> None:
    with pytest.raises((InvalidRequest, VersionNotFound)):
        log.set(stable=stable)
    assert log.current() is None


def test_a_version_that_does_not_verify_is_not_released(log: ReleaseLog, three_versions: Path) -> None:
    log.set(stable=1)
    model = three_versions / "linear/2/model.onnx"
    model.write_bytes(model.read_bytes()[::-1])
    with pytest.raises(DigestMismatch, match=r"linear/2: model\.onnx"):
        log.set(canary=Canary(2, 0.01))
    assert log.current() == log.read(1)


def test_a_damaged_revision_is_told_and_not_guessed_at(released: ReleaseLog, released_models: Path) -> None:
    (released_models / "linear/releases/000001.json").write_text('{"revision": 1')
    with pytest.raises(StoreError, match="release revision 1 of 'linear' is damaged"):
        released.current()


def test_of_twenty_processes_one_wins_each_revision_and_the_others_are_told(
    released: ReleaseLog, released_models: Path, python: Callable[..., Any]
) -> None:
    race = python(Path(__file__).with_name("race.py"), "release", released_models, "20")
    said = dict(json.loads(line) for line in race.communicate(timeout=120)[0].splitlines())
    assert len(said) == 20
    winners = {r.revision: r.changed_by for r in released.history(100)}
    assert list(winners) == [6, 5, 4, 3, 2, 1]
    for seen in range(1, 6):
        outcomes = {name: told[str(seen)] for name, told in said.items()}
        assert [name for name, told in outcomes.items() if told is None] == [winners[seen + 1]]
        later = [winners[r] for r in winners if r > seen]
        for told in outcomes.values():
            assert told is None or any(f"by {name} " in told or f"by {name}:" in told for name in later)


class Slow:
    """A repository whose next `create_release` waits until another writer was first."""

    def __init__(self, repository: ModelRepository, first: Callable[[], object]) -> None:
        self._repository, self._first = repository, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        first, self._first = self._first, lambda: None
        first()
        return self._repository.create_release(model, revision, content)


def test_two_who_roll_back_at_once_do_not_undo_each_other(released: ReleaseLog) -> None:
    released.set(stable=2)
    slow = ReleaseLog(cast(ModelRepository, Slow(released.repository, released.rollback)), "linear")
    assert slow.rollback().stable == 1
    assert released.current() == released.read(3)  # the second found it done


def test_two_who_take_a_canary_off_leave_stable_alone(released: ReleaseLog) -> None:
    released.set(stable=2)
    released.set(canary=Canary(3, 0.5))
    slow = ReleaseLog(cast(ModelRepository, Slow(released.repository, released.rollback)), "linear")
    now = slow.rollback()
    assert (now.stable, now.canary, now.revision) == (2, None, 4)


def test_a_rollback_of_a_canary_that_is_promoted_meanwhile_takes_that_back(released: ReleaseLog) -> None:
    released.set(canary=Canary(2, 0.5))
    slow = ReleaseLog(cast(ModelRepository, Slow(released.repository, lambda: released.set(stable=2))), "linear")
    now = slow.rollback()
    assert (now.stable, now.canary, now.revision) == (1, None, 4)


def test_a_rollback_of_stable_leaves_it_whatever_came_between(released: ReleaseLog) -> None:
    released.set(stable=2)
    slow = ReleaseLog(cast(ModelRepository, Slow(released.repository, lambda: released.set(canary=Canary(3, 0.5)))), "linear")
    now = slow.rollback()
    assert (now.stable, now.canary) == (1, None)


def test_rollback_wins_among_writers_who_do_not_stop(released: ReleaseLog) -> None:
    """They change nothing but the canary: else one of them may leave a stable version that a rollback is to leave, and that
    finds its work done."""
    released.set(stable=2)  # so that there is something to go back to, whoever writes first
    stop = threading.Event()
    written: list[Release] = []

    def write() -> None:
        while not stop.is_set():
            try:
                written.append(released.set(canary=Canary(3, 0.5), changed_by="writer"))
            except ReleaseConflict:
                continue

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        back = [released.rollback(reason="now") for _ in range(3)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [released.read(b.revision) for b in back] == back
    assert all(b.canary is None for b in back)
    assert len(released.history(10_000)) == 2 + len(back) + len(written)
