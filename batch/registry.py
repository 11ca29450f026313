"""The driver session's `Attempts` in a Ray actor, and how actors and driver reach it.

    actors -> RemoteAttempts -> the actor on the driver's node <- Watch <- the driver's progress

It asks for no CPU and ends with the driver. Whoever does not get an answer in time goes on without: it must never stop a job.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Final

from batch.attempts import Attempt, Attempts

PATIENCE: Final = 10.0  # seconds that an actor waits for an answer
ROWS_EVERY: Final = 0.5  # seconds between two notes of rows


def start_registry() -> Any:
    """The actor's handle. It stands on the driver's node: a node that is lost takes none of its memory away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    kind = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Attempts)
    return kind.remote(_alive)


def _alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class RemoteAttempts:
    """A `Registry` for an actor. One that does not answer knows of no deaths."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._said = 0.0

    def introduce(self) -> tuple[str, Attempt]:
        """The actor, which keeps its name when it is started again, and this life of it."""
        import ray

        here = ray.get_runtime_context()
        return here.get_actor_id(), Attempt(uuid.uuid4().hex, here.get_node_id())

    def load(self, actor: str, attempt: Attempt) -> int:
        return _answer(self._handle.load.remote(actor, attempt))

    def loaded(self, actor: str, attempt: Attempt) -> None:
        _answer(self._handle.loaded.remote(actor, attempt))

    def begin(self, part: int, attempt: Attempt) -> int:
        return _answer(self._handle.begin.remote(part, attempt))

    def rows(self, part: int, attempt: Attempt, rows: int) -> None:
        if time.monotonic() - self._said >= ROWS_EVERY:
            self._said = time.monotonic()
            self._handle.rows.remote(part, attempt, rows)

    def end(self, part: int, attempt: Attempt, *, scored: bool) -> None:
        self._handle.end.remote(part, attempt, scored=scored)  # not waited for: what this actor asks next comes after it


def _answer(question: Any) -> int:
    import ray

    try:
        return int(ray.get(question, timeout=PATIENCE) or 0)
    except ray.exceptions.RayError:  # too late, or the registry is gone
        return 0


class Watch:
    """The rows of unfinished parts, as the driver last heard. Never waits: a question stays open until it is answered."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._question: Any = None
        self._known: set[int] = set()
        self._told: dict[int, int] = {}

    def follow(self, handle: Any) -> None:
        self._handle = handle

    def ask(self, known: list[int]) -> dict[int, int]:
        """The rows of unfinished parts, waited for; for a driver that only reaches whoever holds this watch."""
        import ray

        told: dict[int, int] = ray.get(self._handle.under_way.remote(known), timeout=PATIENCE) if self._handle is not None else {}
        return told

    def finished(self, part: int) -> None:
        """The driver has the part's outcome."""
        self._known.add(part)

    def rows_under_way(self) -> int:
        if self._handle is not None:
            self._listen()
        return sum(rows for part, rows in self._told.copy().items() if part not in self._known)

    def _listen(self) -> None:
        import ray

        try:
            if self._question is not None and ray.wait([self._question], timeout=0)[0]:
                self._told, self._question = ray.get(self._question, timeout=1), None
            if self._question is None:
                self._question = self._handle.under_way.remote(list(self._known))
        except ray.exceptions.RayError:
            self._question = None
