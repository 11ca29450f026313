"""Who scores which part, and which processes died over it: the memory of one driver session. Pure; no Ray in here.

    begin(part) -> deaths so far -> 0 or 1: score it in the actor    2 or more: alone, in a child process (alone.py)
    rows(part, n) ... end(part)

A part that begins while its last attempt has not ended tells that the process of that attempt died. The death does not count if
its node is gone too: machines are lost without a part's fault. A new driver starts from nothing, so its predecessor's end does
not count either.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable
from typing import Final, NamedTuple, Protocol

IN_ACTOR: Final = 2  # so many deaths of actors over one part, and it runs alone
IN_ALL: Final = 12  # so many, most of them of actors that only waited for the child, and it is not tried again
LOADING: Final = 3  # so many deaths in a row while loading the model on one node, and that node stops trying


class Attempt(NamedTuple):
    """One try of a process. `process` names it for ever: a restarted actor is another one."""

    process: str
    node: str


class Registry(Protocol):
    """What an actor tells of its work. `begin` and `load` answer with the deaths that count."""

    def introduce(self) -> tuple[str, Attempt]: ...
    def load(self, actor: str, attempt: Attempt) -> int: ...
    def loaded(self, actor: str, attempt: Attempt) -> None: ...
    def begin(self, part: int, attempt: Attempt) -> int: ...
    def rows(self, part: int, attempt: Attempt, rows: int) -> None: ...
    def end(self, part: int, attempt: Attempt, *, scored: bool) -> None: ...


class Attempts:
    """`alive` tells the nodes that are. Not thread-safe: one thread, or one Ray actor, calls it."""

    def __init__(self, alive: Callable[[], Collection[str]]) -> None:
        self._alive = alive
        self._open: dict[int, Attempt] = {}
        self._dead: dict[int, list[Attempt]] = {}
        self._rows: dict[int, int] = {}
        self._loading: dict[str, Attempt] = {}  # by actor
        self._dead_loading: list[Attempt] = []

    def load(self, actor: str, attempt: Attempt) -> int:
        """An actor begins to load the model: how many died of that on its node since the last that did not."""
        before = self._loading.get(actor)
        if before is not None and before.process != attempt.process:
            self._dead_loading.append(before)
        self._loading[actor] = attempt
        return sum(dead.node == attempt.node for dead in self._dead_loading)

    def loaded(self, actor: str, attempt: Attempt) -> None:
        self._loading.pop(actor, None)
        self._dead_loading = [dead for dead in self._dead_loading if dead.node != attempt.node]

    def begin(self, part: int, attempt: Attempt) -> int:
        before = self._open.get(part)
        if before is not None and before.process != attempt.process:
            self._dead.setdefault(part, []).append(before)
        self._open[part] = attempt
        self._rows.pop(part, None)
        dead = self._dead.get(part, [])
        alive = self._alive() if dead else ()
        return sum(one.node in alive for one in dead)

    def is_open(self, part: int) -> bool:
        """Whether the part has begun and not ended."""
        return part in self._open

    def rows(self, part: int, attempt: Attempt, rows: int) -> None:
        """How many rows of the part have been read so far. A zombie is not listened to."""
        if self._open.get(part) == attempt:
            self._rows[part] = rows

    def end(self, part: int, attempt: Attempt, *, scored: bool) -> None:
        """What a zombie ends is not over. The rows of a part that was scored stay until the driver knows of it."""
        if self._open.get(part) == attempt:
            del self._open[part]
            if not scored:
                self._rows.pop(part, None)

    def under_way(self, known: Iterable[int] = ()) -> dict[int, int]:
        """Rows by part. The driver tells the parts whose outcome it has, and hears of them no more."""
        for part in known:
            self._rows.pop(part, None)
        return dict(self._rows)


class OneProcess(Attempts):
    """Without Ray there is one process, and its end is the end of the session."""

    def __init__(self) -> None:
        super().__init__(alive=lambda: ("here",))

    def introduce(self) -> tuple[str, Attempt]:
        return "here", Attempt(uuid.uuid4().hex, "here")
