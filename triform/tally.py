"""What a process counts of stable and canary until somebody takes it as a window: bounded, however many requests come.

    a request: failed or not, its time    a run: its rows and time    an answer: its scores  ->  Tally  ->  windows.Window
    a request that a shadow answered, too: its rows, and those that disagree

Records, scores (copied) and numbers wait in lists until there are some to be put into bins together. A request's time is that of
its record, from where the host began it: HTTP before it asks who the caller is, gRPC after. Belongs to who answers requests: on
an event loop to that loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from triform.rollout.windows import Arm, Shadowed, Sketch, Window, bins_of, rows_bucket, score_bins

if TYPE_CHECKING:
    from triform.telemetry import InferenceRecord

Side = Literal["stable", "canary"]
Outputs = Mapping[str, np.ndarray[Any, Any]]
MOST_KEYS: Final = 1000  # of failures, whose repetition is not counted; every one beyond them is
MOST_WAITING: Final = 256  # requests, whose numbers wait for their bins
MOST_SCORES: Final = 4096  # of one answer
NOTHING: Final = {"requests": 0, "rows": 0, "disagreed": 0}  # that a shadow was compared with


class _Arm:
    """One side, as it grows."""

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.failed: set[bytes] = set()
        self.waiting: list[float] = []  # times of requests
        self.waiting_runs: list[tuple[int, float]] = []
        self.waiting_scores: list[bytes] = []
        self.dtype: np.dtype[Any] = np.dtype(np.float32)  # of those
        self._seconds: dict[int, int] = {}
        self._execute: dict[int, dict[int, int]] = {}
        self._scores: np.ndarray[Any, Any] | None = None

    def fold(self, edges: Sequence[float]) -> None:
        """Puts what waits into the bins."""
        _count(self._seconds, self.waiting)
        runs: dict[int, list[float]] = {}
        for rows, seconds in self.waiting_runs:
            runs.setdefault(rows_bucket(rows), []).append(max(0.0, seconds))
        for bucket, times in runs.items():
            _count(self._execute.setdefault(bucket, {}), times)
        if self.waiting_scores:
            counts = np.array(score_bins(np.frombuffer(b"".join(self.waiting_scores), self.dtype), edges))
            self._scores = counts if self._scores is None else self._scores + counts
        self.waiting, self.waiting_runs, self.waiting_scores = [], [], []

    def arm(self, edges: Sequence[float]) -> Arm:
        self.fold(edges)
        return Arm(
            requests=self.requests,
            errors=self.errors,
            request_seconds=Sketch(self._seconds),
            execute={bucket: Sketch(bins) for bucket, bins in self._execute.items()},
            scores=() if self._scores is None else tuple(self._scores.tolist()),
        )


# Of a request that one version has answered: its scores as bytes, which keep nothing else in memory.
Answered = tuple["InferenceRecord", "np.dtype[Any] | None", bytes]


class Tally:
    """`edges`: of the bins of scores, the policy's; `canary`: its version. `clock` is monotonic."""

    def __init__(self, edges: Sequence[float], canary: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.edges = edges
        self._canary = canary
        self._clock = clock
        self._began = clock()
        self._arms = {"stable": _Arm(), "canary": _Arm()}
        self._shadowed = dict(NOTHING)
        self._answered: list[Answered] = []
        self._by_canary = 0

    def ran(self, side: Side, rows: int, seconds: float) -> None:
        """A run of the model with so many rows."""
        self._arms[side].waiting_runs.append((rows, seconds))

    def scored(self, side: Side, outputs: Outputs) -> None:
        """The scores of an answer."""
        dtype, scores = _scores(outputs)
        if dtype is not None:
            self._score(side, dtype, scores)

    def _score(self, side: Side, dtype: np.dtype[Any], scores: bytes) -> None:
        arm = self._arms[side]
        if dtype != arm.dtype:
            arm.fold(self.edges)
            arm.dtype = dtype
        arm.waiting_scores.append(scores)
        if len(arm.waiting_scores) > MOST_WAITING:  # of requests whose callers went away
            arm.fold(self.edges)

    def request(self, side: Side, seconds: float | None, *, failed_by: bytes | None = None) -> None:
        """A request that this side was given has finished, after what it ran and scored; `seconds`: that a caller waited for it,
        if one did. `failed_by`: its key, where the version failed it; a key that fails again counts no second time."""
        arm = self._arms[side]
        arm.requests += 1
        if seconds is not None:
            arm.waiting.append(seconds)
        if failed_by is not None and failed_by not in arm.failed:
            arm.errors += 1
            if len(arm.failed) < MOST_KEYS:
                arm.failed.add(failed_by)
        if len(arm.waiting) >= MOST_WAITING or len(arm.waiting_runs) >= MOST_WAITING:
            arm.fold(self.edges)

    def answered(self, record: InferenceRecord, outputs: Outputs) -> None:
        """A request that one version has answered with these: `request`, `ran` and `scored` in one."""
        self._answered.append((record, *_scores(outputs)))
        if len(self._answered) >= MOST_WAITING:
            self._settle()

    def answers_of_canary(self) -> int:
        """How many requests `answered` was told of that the canary has, so far."""
        self._settle()
        return self._by_canary

    def _settle(self) -> None:
        """Gives to each side what it has answered."""
        answered, self._answered = self._answered, []
        for record, dtype, scores in answered:
            side: Side = "canary" if record.version == self._canary else "stable"
            self._by_canary += side == "canary"
            if record.batch_rows:  # else another request of the run tells of it
                self.ran(side, record.batch_rows, record.stages["execute"])
            if dtype is not None:
                self._score(side, dtype, scores)
            self.request(side, record.seconds)

    def shadowed(self, rows: int, disagreed: int) -> None:
        """A request that both sides have answered, with so many rows that could be compared."""
        if rows:
            self._shadowed["requests"] += 1
            self._shadowed["rows"] += rows
            self._shadowed["disagreed"] += disagreed

    def take(self, step: int = 0, edges: Sequence[float] | None = None) -> Window:
        """What has been counted since the last time; the next window begins. `edges`: of its bins, from then on."""
        self._settle()
        now = self._clock()
        window = Window(
            step=step,
            seconds=now - self._began,
            stable=self._arms["stable"].arm(self.edges),
            canary=self._arms["canary"].arm(self.edges),
            shadowed=Shadowed(**self._shadowed),
        )
        self._began, self._arms, self._shadowed = now, {"stable": _Arm(), "canary": _Arm()}, dict(NOTHING)
        self.edges = self.edges if edges is None else edges
        return window


def _scores(outputs: Outputs) -> tuple[np.dtype[Any] | None, bytes]:
    """A copy of the first output of floats, if there is one; of a large one every n-th, so that nobody waits for the rest."""
    for values in outputs.values():
        if values.dtype.kind == "f":
            few = values if values.size <= MOST_SCORES else values.ravel()[:: 1 + values.size // MOST_SCORES]
            return few.dtype, few.tobytes()
    return None, b""


def _count(bins: dict[int, int], times: Sequence[float]) -> None:
    for index, number in bins_of(times).items():
        bins[index] = bins.get(index, 0) + number
