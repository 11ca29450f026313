"""A thread that looks at a target while it is asked: Target.look, once a second -> Watched."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from loadtests.targets import Target

SECONDS: Final = 1.0


class Seen(msgspec.Struct, frozen=True):
    """`at`: Unix time; `serving`: replicas or environments; `starts`: of them so far; `queue_ms`: that a request waited for its
    model, None where nobody knows."""

    at: float
    serving: int
    starts: int
    queue_ms: float | None


class Watched:
    """`seen`, in order. `missed`: looks that did not succeed."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.missed = 0


@contextmanager
def watching(target: Target) -> Iterator[Watched]:
    """Looks until the block is left."""
    watched, ended = Watched(), threading.Event()
    look = target.look
    if look is None:
        yield watched
        return

    def run() -> None:
        while True:
            try:
                now = look()
            except Exception:  # noqa: BLE001 - a target under load may not tell; that it did not is told
                watched.missed += 1
            else:
                queue = None if math.isnan(now.queue) else now.queue * 1e3
                watched.seen.append(Seen(time.time(), now.serving, now.starts, queue))
            if ended.wait(SECONDS):
                return

    thread = threading.Thread(target=run, name="loadtest-watch", daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        ended.set()
        thread.join(30)
