"""The audit log: whole under many writers, honest after a crash, and nobody's to change unseen."""

from __future__ import annotations

import fcntl
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from subprocess import Popen
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triform import audit
from triform.audit import FIRST, Action, AuditFile, Bounded, Entry, audited, digest, verify
from triform.errors import ReleaseConflict, StoreError


def did(what: str = "release.set", **fields: Any) -> Action:
    return Action(**{"who": "key:abcd", "what": what, "target": "churn", "where": "192.0.2.1"} | fields)


@pytest.fixture
def log(tmp_path: Path) -> AuditFile:
    return AuditFile(tmp_path / "audit.jsonl")


@pytest.fixture
def five(log: AuditFile) -> AuditFile:
    for number in range(5):
        log.append(did(f"act.{number}"))
    return log


def entries(log: AuditFile) -> list[Entry]:
    return [msgspec.json.decode(line, type=Entry) for line in log.path.read_bytes().splitlines()]


def test_each_line_carries_the_hash_of_the_one_before(five: AuditFile) -> None:
    lines = five.path.read_bytes().splitlines()
    assert [entry.before for entry in entries(five)] == [FIRST, *map(digest, lines[:-1])]
    assert [entry.what for entry in entries(five)] == [f"act.{n}" for n in range(5)]
    verdict = verify(five.path)
    assert (verdict.entries, verdict.head, verdict.faults, verdict.notes) == (5, digest(lines[-1]), [], [])
    assert stat.S_IMODE(five.path.stat().st_mode) == 0o600


ANY_TEXT = st.text(st.characters())  # halves of surrogate pairs included


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_said_stays_one_line(log: AuditFile, who: str, target: str, note: str) -> None:
    before = verify(log.path).entries if log.path.exists() else 0
    log.append(did(who=who, target=target, note=note))
    verdict = verify(log.path)
    assert (verdict.entries, verdict.faults) == (before + 1, [])
    assert entries(log)[-1].target == target[:500].encode(errors="backslashreplace").decode()


def test_an_empty_log_is_whole(log: AuditFile) -> None:
    log.check()
    assert verify(log.path).entries == 0
    assert verify(log.path, contains=FIRST).faults == []


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_before_the_last_line_goes_unseen(five: AuditFile, tmp_path: Path, data: st.DataObject) -> None:
    content = five.path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    at = data.draw(st.integers(0, last - 1))
    change = data.draw(st.sampled_from(["flip", "remove", "add"]))
    byte = content[at] ^ data.draw(st.integers(1, 255))
    middle = {"flip": bytes([byte]), "remove": b"", "add": content[at : at + 1] * 2}[change]
    spoilt = tmp_path / "spoilt"
    spoilt.write_bytes(content[:at] + middle + content[at + 1 :])
    assert verify(spoilt).faults != []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[1:],
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:2], b"{}", *lines[2:]],
        lambda lines: [*lines[:2], b"", *lines[2:]],
        lambda lines: [*lines, b"{}"],
        lambda lines: [line.replace(b"key:abcd", b"key:efgh") for line in lines],
    ],
)
def test_lines_removed_moved_repeated_or_added_are_seen(five: AuditFile, spoil: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = spoil(five.path.read_bytes().splitlines())
    five.path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert verify(five.path).faults != []


def test_a_log_that_was_cut_or_written_anew_is_seen_by_who_kept_its_head(five: AuditFile) -> None:
    head, lines = verify(five.path).head, five.path.read_bytes().splitlines()
    five.append(did("act.5"))
    assert verify(five.path, contains=head).faults == []
    five.path.write_bytes(b"".join(line + b"\n" for line in lines[:3]))
    assert verify(five.path).faults == []  # which is what a chain alone cannot show
    assert "cut, or written anew" in verify(five.path, contains=head).faults[0]


def test_a_torn_last_line_is_told_and_the_log_goes_on(five: AuditFile) -> None:
    content = five.path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start + 1, len(content)):
        five.path.write_bytes(content[:end])
        verdict = verify(five.path)
        assert (verdict.entries, len(verdict.faults)) == (4, 1)
        assert "line 5: it has no end" in verdict.faults[0]
        five.append(did("act.5"))
        five.append(did("act.6"))
        healed = verify(five.path)
        assert five.path.read_bytes().startswith(content[:end])  # nothing of what was there is gone
        assert healed.faults == []
        if end < len(content) - 1:
            assert (healed.entries, healed.notes) == (6, ["line 5: its writer died, as the next line says"])
        else:  # only the line's end was missing
            assert healed.entries == 7
    five.path.write_bytes(content[: start + 10] + b"\n" + content[start:])
    assert verify(five.path).faults != []  # a line that is none, and nobody says why


WRITE = """
import sys
from pathlib import Path
from triform.audit import Action, AuditFile
log = AuditFile(Path(sys.argv[1]))
for number in range(100):
    log.append(Action(who=sys.argv[2], what=str(number), target="x" * 400))
"""


def test_writers_at_once_keep_one_chain(log: AuditFile, python: Callable[..., Popen[str]]) -> None:
    children = [python("-c", WRITE, log.path, str(writer)) for writer in range(3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: log.append(did(str(n))), range(100)))
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 3, said
    assert (verify(log.path).entries, verify(log.path).faults) == (400, [])
    for writer in range(3):
        assert [entry.what for entry in entries(log) if entry.who == str(writer)] == [str(n) for n in range(100)]


def test_a_long_last_line_is_found_whole(log: AuditFile) -> None:
    log.path.write_bytes(b"x" * 200_000)
    log.append(did())
    log.append(did())
    assert verify(log.path).notes == ["line 1: its writer died, as the next line says"]


def test_an_action_is_on_record_as_it_ended(log: AuditFile) -> None:
    with audited(log, did("good")):
        pass
    with pytest.raises(ReleaseConflict), audited(log, did("lost")):
        raise ReleaseConflict("somebody was first")
    with pytest.raises(KeyboardInterrupt), audited(log, did("stopped")):
        raise KeyboardInterrupt
    assert [(e.what, e.result) for e in entries(log)] == [
        ("good", "ok"),
        ("lost", "release_conflict"),
        ("stopped", "KeyboardInterrupt"),
    ]


def test_what_could_not_be_recorded_is_not_begun(tmp_path: Path) -> None:
    begun = False
    with pytest.raises(StoreError, match="audit log cannot be written"), audited(AuditFile(tmp_path / "no/log"), did()):
        begun = True
    assert not begun
    with pytest.raises(StoreError, match="cannot be read"):
        verify(tmp_path / "no/log")


def held_up(bounded: Bounded, *actions: Action, seconds: float = 0.05) -> None:
    """The log takes none of these."""
    bounded._seconds = seconds
    for action in actions:
        with pytest.raises(StoreError, match="has not taken it yet"):
            bounded.append(action)


def caught_up(bounded: Bounded) -> None:
    """The log has taken, or refused, all."""
    assert bounded._last is not None
    wait([bounded._last], timeout=60)
    bounded._seconds = 60.0


def test_who_must_not_wait_does_not_and_nothing_is_lost(
    log: AuditFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock is somebody's who does not give it back, as on a mount that hangs."""
    monkeypatch.setattr(audit, "LATE", 0.0)
    bounded = Bounded(log, seconds=60.0, most=3)
    bounded.append(did("act.0"))
    with log.path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held_up(bounded, *(did(f"act.{number}", note="it was bad") for number in range(1, 5)))
        with pytest.raises(StoreError, match="3 actions wait for it already"):
            bounded.append(did("act.5"))
        assert [entry.what for entry in entries(log)] == ["act.0"]
    caught_up(bounded)
    bounded.append(did("act.6"))
    written = entries(log)
    assert [entry.what for entry in written] == [f"act.{number}" for number in (0, 1, 2, 3, 4, 6)]
    for late in written[1:5]:
        assert late.note.startswith("done at ")
        assert late.note.endswith(": it was bad")
        assert late.note[8:32] <= late.at
    assert verify(log.path).faults == []
    assert "act.4 churn (it was bad) is on record now" in caplog.text


def test_what_is_not_written_late_either_is_told(log: AuditFile, caplog: pytest.LogCaptureFixture) -> None:
    bounded = Bounded(log)
    log.append(did("act.0"))
    with log.path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held_up(bounded, did("act.1"), did("act.2"))
        log.path.unlink()
        log.path.mkdir()
    caught_up(bounded)
    with pytest.raises(StoreError, match="cannot be written"):
        bounded.append(did("act.3"))
    assert "act.2 churn () is not on record: the audit log cannot be written" in caplog.text
