"""What a process counts of stable and canary until somebody takes it as a window: bounded, however many requests come.

    a request: failed or not, its time    a run: its rows and time    an answer: its scores  ->  Tally  ->  windows.Window

Belongs to who answers requests: on an event loop to that loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np

from triform.rollout.windows import Arm, Sketch, Window, bin_of, rows_bucket, score_bins

Side = Literal["stable", "canary"]
MOST_KEYS: Final = 1000  # of failures, whose repetition is not counted; every one beyond them is
MOST_SCORES: Final = 4096  # that wait to be put into bins


class _Arm:
    """One side, as it grows."""

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.seconds: dict[int, int] = {}
        self.execute: dict[int, dict[int, int]] = {}
        self.scores: np.ndarray[Any, Any] | None = None
        self.failed: set[bytes] = set()
        self.waiting: list[np.ndarray[Any, Any]] = []
        self.waiting_scores = 0

    def bin(self, edges: Sequence[float]) -> None:
        """Puts the scores that wait into the bins."""
        if self.waiting:
            counts = np.array(score_bins(np.concatenate(self.waiting), edges))
            self.scores = counts if self.scores is None else self.scores + counts
            self.waiting, self.waiting_scores = [], 0

    def arm(self, edges: Sequence[float]) -> Arm:
        self.bin(edges)
        return Arm(
            requests=self.requests,
            errors=self.errors,
            request_seconds=Sketch(self.seconds),
            execute={bucket: Sketch(bins) for bucket, bins in self.execute.items()},
            scores=() if self.scores is None else tuple(self.scores.tolist()),
        )


class Tally:
    """`edges`: of the bins of scores, the policy's. `clock` is monotonic."""

    def __init__(self, edges: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self.edges = edges
        self._clock = clock
        self._began = clock()
        self._arms = {"stable": _Arm(), "canary": _Arm()}

    def request(self, side: Side, seconds: float, *, failed_by: bytes | None = None) -> None:
        """A request that this side was given and has finished. `failed_by`: its key, where the version failed it; a key that
        fails again counts no second time."""
        arm = self._arms[side]
        arm.requests += 1
        _count(arm.seconds, seconds)
        if failed_by is not None and failed_by not in arm.failed:
            arm.errors += 1
            if len(arm.failed) < MOST_KEYS:
                arm.failed.add(failed_by)

    def ran(self, side: Side, rows: int, seconds: float) -> None:
        """A run of the model with so many rows."""
        _count(self._arms[side].execute.setdefault(rows_bucket(rows), {}), seconds)

    def scored(self, side: Side, values: np.ndarray[Any, Any]) -> None:
        """The scores of an answer; of a large one every n-th, so that nobody waits for the rest."""
        arm = self._arms[side]
        some = values.reshape(-1)[:: 1 + values.size // MOST_SCORES].astype(np.float64)  # a copy: the answer is not kept
        arm.waiting.append(some)
        arm.waiting_scores += max(1, some.size)
        if arm.waiting_scores >= MOST_SCORES:
            arm.bin(self.edges)

    def take(self, step: int = 0, edges: Sequence[float] | None = None) -> Window:
        """What has been counted since the last time; the next window begins. `edges`: of its bins, from then on."""
        now = self._clock()
        window = Window(
            step=step,
            seconds=now - self._began,
            stable=self._arms["stable"].arm(self.edges),
            canary=self._arms["canary"].arm(self.edges),
        )
        self._began, self._arms = now, {"stable": _Arm(), "canary": _Arm()}
        self.edges = self.edges if edges is None else edges
        return window


def _count(bins: dict[int, int], seconds: float) -> None:
    index = bin_of(seconds)
    bins[index] = bins.get(index, 0) + 1
