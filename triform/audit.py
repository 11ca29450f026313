"""The audit log: each `operate` action as a line of JSON that carries the hash of the line before it.

    {"at": ..., "who": "key:k3fx9w2mpa", "what": "release.set", "target": "churn", "where": ..., "result": "ok", "before": sha256}

One file, any number of writing processes (`flock`), each line on the disk before the action counts as done. Whoever changes,
removes or adds a line in the middle breaks the chain there: `triform audit verify`. What the chain cannot show is a file that was
cut at its end, or written anew from some line on: keep the head's hash elsewhere, and verify with it.

A writer that died in mid-line leaves a line that is no JSON. The next one ends it, and says so in its own line (`torn`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec

from triform.errors import StoreError, TriformError

log = logging.getLogger(__name__)

FIRST: Final = "0" * 64  # what stands before the first line
LATE: Final = 1.0  # seconds between an action and its line, of which the line tells
MOST_CHARACTERS: Final = 500  # of a field
_BLOCK: Final = 1 << 16


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody did. `where`: the address it came from; `result`: `ok`, or the code of the error."""

    who: str
    what: str
    target: str
    where: str = ""
    result: str = "ok"
    note: str = ""


class Entry(Action, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of the log. `torn`: the line before is what a writer left that died."""

    at: str  # ISO 8601, UTC
    before: str
    torn: bool = False


class Audit(Protocol):
    def append(self, action: Action, done: float | None = None) -> None:
        """Returns when it is written. `done`: in Unix time, if not now. Raises `StoreError`."""


class Logged:
    """Where no file is configured (on Lambda there is none that would last): a record in the process's log, not chained."""

    def append(self, action: Action, done: float | None = None) -> None:  # noqa: ARG002
        fields = {f"audit_{name}": value for name, value in _said(action).items()}
        log.info("operate: %(audit_what)s %(audit_target)s: %(audit_result)s", fields, extra=fields)


class AuditFile:
    """The log in a file, which is created readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises `StoreError` where nothing could be appended: ask before an action that must not go unrecorded."""
        with self._opened():
            pass

    def append(self, action: Action, done: float | None = None) -> None:
        """A line that is `LATE`, because it had to wait, says in its note when the action was done."""
        done = time.time() if done is None else done
        with self._opened() as file:
            if time.time() > done + LATE:
                action = msgspec.structs.replace(action, note=f"done at {_at(done)}: {action.note}")
            last, torn = _last_line(file)
            entry = Entry(at=_at(time.time()), before=digest(last) if last is not None else FIRST, torn=torn, **_said(action))
            _write(file, b"\n" * torn + msgspec.json.encode(entry) + b"\n")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise StoreError(f"the audit log cannot be written ({error.strerror or error})") from error


class Bounded:
    """Another log, for whoever must not be held up by it (a file on a mount that hangs, a lock that nobody gives back): what it
    does not take within `seconds` is written when it does, in order, `most` actions at most, while this process lives."""

    def __init__(self, audit: Audit, seconds: float = 5.0, most: int = 100) -> None:
        self._audit = audit
        self._seconds = seconds
        self._waiting: queue.Queue[tuple[Action, float, Future[None]]] = queue.Queue(most)
        self._last: Future[None] | None = None
        self._writer: threading.Thread | None = None

    def append(self, action: Action, done: float | None = None) -> None:
        """Raises `StoreError`, too, where it is not written yet: at once where an earlier one is not."""
        late = self._last is not None and not self._last.done()
        written = Future[None]()
        try:
            self._waiting.put_nowait((action, done or time.time(), written))
        except queue.Full:
            raise StoreError(f"the audit log takes nothing, and {self._waiting.maxsize} actions wait for it already") from None
        self._last = written
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, daemon=True, name="audit")
            self._writer.start()
        try:
            written.result(0.0 if late else self._seconds)
        except TimeoutError:
            written.add_done_callback(partial(_tell, action))
            raise StoreError("the audit log has not taken it yet: it is written there as soon as that does") from None

    def _write(self) -> None:
        while True:
            action, done, written = self._waiting.get()
            try:
                self._audit.append(action, done)
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                written.set_exception(error)
            else:
                written.set_result(None)


def _tell(action: Action, written: Future[None]) -> None:
    """What came of an action that nobody waits for any more."""
    error = written.exception()
    told = "is on record now" if error is None else f"is not on record: {error}"
    log.warning("%s %s (%s) %s", action.what, action.target, action.note, told)


def open_audit(path: str | None) -> Audit:
    return Logged() if path is None else AuditFile(Path(path))


@contextmanager
def audited(audit: Audit, action: Action) -> Iterator[None]:
    """Records the action as it ended, well or not. Raises `StoreError` before it is begun where it could not be recorded."""
    if isinstance(audit, AuditFile):
        audit.check()
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, TriformError) else type(error).__name__
        audit.append(msgspec.structs.replace(action, result=code))
        raise
    audit.append(action)


class Verdict(msgspec.Struct, frozen=True):
    """What a check of a log has found. `head`: the hash of the last whole line."""

    entries: int
    head: str
    faults: list[str] = []
    notes: list[str] = []


def verify(path: Path, *, contains: str | None = None) -> Verdict:
    """Walks the chain. `contains`: the head of an earlier check, which must be the hash of a line. Raises `StoreError`."""
    walk = _Walk(contains)
    try:
        with path.open("rb") as file:
            for line in file:
                walk.see(line)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    return walk.verdict()


class _Walk:
    def __init__(self, contains: str | None) -> None:
        self.contains = contains
        self.found = contains in (None, FIRST)
        self.lines = self.entries = 0
        self.before = FIRST
        self.broken = False  # the line before is no entry; the next one may say why
        self.faults: list[str] = []
        self.notes: list[str] = []

    def see(self, line: bytes) -> None:
        self.lines += 1
        if not line.endswith(b"\n"):
            self.faults.append(f"line {self.lines}: it has no end; its writer died, and what it did is not on record")
            return
        entry = _entry(line[:-1])
        if entry is not None and entry.before != self.before:
            self.faults.append(f"line {self.lines}: it does not follow what stands before it: that was changed, removed or added")
        if self.broken and entry is not None and entry.torn:
            self.notes.append(f"line {self.lines - 1}: its writer died, as the next line says")
        elif self.broken:
            self.faults.append(f"line {self.lines - 1}: it is no entry")
        self.broken = entry is None
        self.entries += entry is not None
        self.before = digest(line[:-1])
        self.found = self.found or self.before == self.contains

    def verdict(self) -> Verdict:
        if self.broken:
            self.faults.append(f"line {self.lines}: it is no entry")
        if not self.found:
            self.faults.append("the head that was named is not here: the log was cut, or written anew")
        return Verdict(self.entries, self.before, self.faults, self.notes)


def _said(action: Action) -> dict[str, str]:
    """As UTF-8 can hold it, and not too long."""
    fields: dict[str, str] = msgspec.structs.asdict(action)
    return {name: value[:MOST_CHARACTERS].encode(errors="backslashreplace").decode() for name, value in fields.items()}


def digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _at(seconds: float) -> str:
    """Unix time in ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def _entry(line: bytes) -> Entry | None:
    try:
        return msgspec.json.decode(line, type=Entry)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _last_line(file: int) -> tuple[bytes | None, bool]:
    """The last line without its end, None of an empty file; and whether it lacks its end."""
    end = os.fstat(file).st_size
    if end == 0:
        return None, False
    tail, start = b"", end
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(_BLOCK, start)
        start -= step
        tail = os.pread(file, step, start) + tail
    torn = not tail.endswith(b"\n")
    return (tail if torn else tail[:-1]).rpartition(b"\n")[2], torn


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
    os.fsync(file)
