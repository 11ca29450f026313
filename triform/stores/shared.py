"""A value that the processes of a node share: one of them at a time makes it anew, for all.

<path>.json     the value, replaced whole; a reader takes no lock
<path>.lock     held by whoever makes it anew, and let go with its process however that ends; holds when that was last done
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from triform.errors import StoreError
from triform.stores import durable

T = TypeVar("T")


class Shared(Generic[T]):
    """A value of type `kind` (plain data) that is made anew every so many seconds. Safe for any number of processes.

    `clock`: Unix time, which the processes of a node agree about.
    """

    def __init__(self, path: Path, kind: type[T], *, every: float, clock: Callable[[], float] = time.time) -> None:
        self.every = every
        self._value = path.with_name(f"{path.name}.json")
        self._lock = path.with_name(f"{path.name}.lock")
        self._kind = kind
        self._clock = clock

    def get(self) -> T | None:
        """The value as it was last made; None where there is none, or none that this Triform can read."""
        try:
            return msgspec.json.decode(self._value.read_bytes(), type=self._kind)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        except OSError as error:
            raise _failed(error) from error

    def renew(self, make: Callable[[T | None], T]) -> T | None:
        """The value; made anew by this process first, from the one before, if that is due and nobody else is at it.

        What `make` raises is passed on; the value stays, and its turn comes again after `every` seconds. Raises `StoreError`
        where the disk fails.
        """
        try:
            with self._turn() as ours:
                if ours:
                    before = self.get()
                    after = make(before)
                    if after != before:
                        durable.replace(self._value, msgspec.json.encode(after))
        except OSError as error:
            raise _failed(error) from error
        return self.get()

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether it is due, and this process is the one to do it."""
        if not self._is_due():
            yield False
            return
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _try_lock(handle) or not self._is_due():
                yield False
                return
            try:
                yield True
            finally:
                os.pwrite(handle, f"{self._clock():20.6f}".encode(), 0)
        finally:
            os.close(handle)

    def _is_due(self) -> bool:
        """A time to come is a clock that was set back: it counts as long ago."""
        try:
            done = float(self._lock.read_text() or 0)
        except (FileNotFoundError, ValueError):
            return True
        return not 0 <= self._clock() - done < self.every


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _failed(error: OSError) -> StoreError:
    return StoreError(f"what the processes of this node share cannot be kept: {error.strerror or error}")
