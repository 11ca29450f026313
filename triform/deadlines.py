"""Ends ONNX Runtime runs whose time is up: one watching thread a process, started with the first deadline.

    with watchdog.guard(run_options, deadline): session.run(..., run_options)   # sets run_options.terminate when it is due

ONNX Runtime looks at `terminate` between nodes, so one long node still runs to its end; the caller's error is the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from typing import Any

from triform.errors import DeadlineExceeded


def check(deadline: float | None, what: str) -> None:
    """Raises `DeadlineExceeded` where it passed before `what`."""
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlineExceeded(f"the deadline passed before {what}")


class Watchdog:
    """Holds the running deadlines in a heap; thread-safe. Deadlines are seconds of `time.monotonic()`."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._due: list[tuple[float, int, Any]] = []
        self._live: set[int] = set()
        self._ids = itertools.count()
        self._sleeps_until = math.inf
        self._thread: threading.Thread | None = None

    def guard(self, run_options: Any, deadline: float) -> _Guard:
        """For the block in which the run is made."""
        return _Guard(self, run_options, deadline)

    def _begin(self, run_options: Any, deadline: float) -> int:
        with self._wake:
            ticket = next(self._ids)
            self._live.add(ticket)
            heapq.heappush(self._due, (deadline, ticket, run_options))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="triform-deadlines", daemon=True)
                self._thread.start()
            elif deadline < self._sleeps_until:
                self._wake.notify()
        return ticket

    def _end(self, ticket: int) -> None:
        with self._wake:
            self._live.discard(ticket)
            self._forget()

    def _forget(self) -> None:
        """Lets go of runs that have ended, as far as none before them still runs."""
        while self._due and self._due[0][1] not in self._live:
            heapq.heappop(self._due)

    def _watch(self) -> None:
        with self._wake:
            while True:
                self._forget()
                self._sleeps_until = self._due[0][0] if self._due else math.inf
                if not self._due:
                    self._wake.wait()
                elif (left := self._sleeps_until - time.monotonic()) > 0:
                    self._wake.wait(left)
                else:
                    heapq.heappop(self._due)[2].terminate = True


class _Guard:
    """A context manager of its own: one made of a generator takes twice as long."""

    __slots__ = ("_deadline", "_run_options", "_ticket", "_watchdog")

    def __init__(self, watchdog: Watchdog, run_options: Any, deadline: float) -> None:
        self._watchdog = watchdog
        self._run_options = run_options
        self._deadline = deadline

    def __enter__(self) -> None:
        self._ticket = self._watchdog._begin(self._run_options, self._deadline)

    def __exit__(self, *_: object) -> None:
        self._watchdog._end(self._ticket)


# One for the process: it has no state but what runs now, and a thread for each model that was ever loaded would stay for ever.
watchdog = Watchdog()
