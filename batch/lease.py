"""Who is at work on an output: a lease, so that two schedulers do not run the same night twice.

    <output>/_lease/000007.json    who took it, and for how long without a sign of life; created exclusively
                   /000007.beat    written again and again while the holder lives: its age is the time since
                   /000007.end     given back

It saves work, not rows: without it two drivers of one run still make one set of rows. Ages are told by the storage's own clock.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from triform.errors import JobError, LeaseHeld, TriformError
from triform.runs.folder import read_json
from triform.stores.files import FileStore, last_number

BEATS: int = 4  # in the time of a lease


class Entry(msgspec.Struct, frozen=True):
    """An entry of the log."""

    host: str
    pid: int
    seconds: float
    nonce: str
    space: str = ""  # of process ids: the machine's start and the namespace, where it is known

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A lease that is held. Use `held`."""

    def __init__(self, files: FileStore, number: int, entry: Entry) -> None:
        self._files, self._number, self._entry = files, number, entry
        self._over = threading.Event()
        self.lost: str | None = None
        self._thread = threading.Thread(target=self._beat, name="batch-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `LeaseHeld` if somebody else has taken it, because this process gave no sign of life for too long."""
        if self.lost is not None:
            raise LeaseHeld(f"the lease on {self._files.location} was lost to {self.lost}, which goes on with the work")

    def give_back(self) -> None:
        self._over.set()
        self._thread.join()
        with suppress(TriformError, OSError):  # it ends by itself; what the job came to must not be hidden by this
            self._files.create(_name(self._number, "end"), b"")

    def _beat(self) -> None:
        while not self._over.wait(self._entry.seconds / BEATS):
            try:
                self._files.replace(_name(self._number, "beat"), b"")
                taken = read_json(self._files, _name(self._number + 1), Entry)
            except (TriformError, OSError):
                continue  # a store that fails for longer than the lease lasts loses it, and `check` learns of it later
            if taken is not None:
                self.lost = str(taken)
                return


@contextmanager
def held(files: FileStore, seconds: float | None) -> Iterator[Lease | None]:
    """The lease of an output, given back at the end; nothing where `seconds` is None.

    `seconds`: without a sign of life from this process, after which another may take it. Raises `LeaseHeld`.
    """
    if seconds is None:
        yield None
        return
    lease = _take(files, Entry(socket.gethostname(), os.getpid(), seconds, uuid.uuid4().hex, _space()))
    try:
        yield lease
    finally:
        lease.give_back()


def _take(files: FileStore, entry: Entry) -> Lease:
    files.make_folder("_lease")
    for _ in range(20):
        latest = last_number(lambda number: files.exists(_name(number)))
        _check_free(files, latest)
        files.create(_name(latest + 1), msgspec.json.encode(entry))
        if read_json(files, _name(latest + 1), Entry) == entry:  # else another was quicker; a lost response does not matter
            return Lease(files, latest + 1, entry)
    raise JobError(f"the lease on {files.location} could not be taken: others take it and give it back all the time")


def _check_free(files: FileStore, number: int) -> None:
    """Raises `LeaseHeld` if that entry is still in force."""
    entry = read_json(files, _name(number), Entry) if number else None
    if entry is None or files.exists(_name(number, "end")):
        return
    if entry.space and entry.space == _space() and not _runs(entry.pid):
        return
    age = files.age(_name(number, "beat"))
    age = files.age(_name(number)) if age is None else age
    if age is not None and age < entry.seconds:
        raise LeaseHeld(
            f"{entry} is at work on {files.location} (last seen {age:.0f} s ago); the lease ends {entry.seconds:g} s after its "
            "last sign of life, then the same command goes on"
        )


def _space() -> str:
    """Where a process id means the same process: containers may share a host's name and not its processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _name(number: int, kind: str = "json") -> str:
    return f"_lease/{number:06d}.{kind}"
