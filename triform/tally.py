"""What a process counts of stable and canary until somebody takes it as a window: bounded, however many requests come.

    a request: failed or not, its time    a run: its rows and time    an answer: its scores  ->  Tally  ->  windows.Window
    a request that a shadow answered, too: its rows, and those that disagree

Small answers wait, as they are, until some can be counted together; times and scores (copied) wait, as bare numbers, until
there are some to be put into bins together. A request's time is that of its record, from where the host began it: HTTP before it
asks who the caller is, gRPC after. Belongs to who answers requests: on an event loop to that loop.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from triform.rollout.windows import BINS, BUCKETS, Arm, Shadowed, Sketch, Window, bins_of, bins_of_runs, score_bins

if TYPE_CHECKING:
    from triform.telemetry import InferenceRecord

Side = Literal["stable", "canary"]
Scores = np.ndarray[Any, Any]
Outputs = Mapping[str, Scores]
MOST_WAITING: Final = 1024  # requests, whose numbers wait for their bins: of fewer numpy's calls take more time than its work
MOST_SCORES: Final = 4096  # of one answer
MOST_BYTES: Final = 256 << 10  # of scores that wait: to put more into bins would hold callers up for milliseconds
MOST_ANSWERS: Final = 32  # that are still to be counted; each keeps what its run of the model has answered, and so is of ...
FEW_ROWS: Final = 8  # ... so many at most ...
SMALL_ROW: Final = 256  # ... with so many bytes each
NOTHING: Final = {"requests": 0, "rows": 0, "disagreed": 0}  # that a shadow was compared with


class _Arm:
    """One side, as it grows. `edges`: of the bins of scores."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.requests = self.errors = 0
        self._edges = edges
        self._dtype: np.dtype[Any] = np.dtype(np.float32)  # of the scores that wait
        self._seconds = np.zeros(BINS, np.int64)
        self._execute = np.zeros((BUCKETS, BINS), np.int64)
        self._scores: np.ndarray[Any, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self.waiting = array("d")  # times of requests
        self.waiting_runs = array("d")  # times
        self.waiting_rows = array("q")  # of those
        self.waiting_scores = bytearray()

    def score(self, values: Scores) -> None:
        """Copies them, so that nothing else is kept in memory; of many every n-th, so that nobody waits for the rest."""
        dtype = values.dtype
        if dtype is not self._dtype and dtype != self._dtype:
            self.fold()
            self._dtype = dtype
        few = values if values.size <= MOST_SCORES else values.ravel()[:: 1 + values.size // MOST_SCORES]
        self.waiting_scores += few.tobytes()
        if len(self.waiting_scores) > MOST_BYTES:
            self.fold()

    def fold(self) -> None:
        """Puts what waits into the bins."""
        self._seconds += bins_of(self.waiting)
        if self.waiting_runs:
            self._execute += bins_of_runs(self.waiting_rows, np.maximum(0.0, self.waiting_runs))
        if self.waiting_scores:
            counts = np.array(score_bins(np.frombuffer(self.waiting_scores, self._dtype), self._edges))
            self._scores = counts if self._scores is None else self._scores + counts
        self._begin()

    def arm(self) -> Arm:
        self.fold()
        return Arm(
            requests=self.requests,
            errors=self.errors,
            request_seconds=Sketch.counted(self._seconds),
            execute={bucket: Sketch.counted(bins) for bucket, bins in enumerate(self._execute) if bins.any()},
            scores=() if self._scores is None else tuple(self._scores.tolist()),
        )


class Tally:
    """`edges`: of the bins of scores, the policy's; `canary`: its version. `clock` is monotonic."""

    def __init__(self, edges: Sequence[float], canary: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_stable = self._of_canary = 0  # requests that either has answered, in all windows
        self._answers: list[tuple[InferenceRecord, Outputs]] = []  # that wait to be counted
        self._small = set[int | None]()  # versions whose answers may wait
        self._edges = edges
        self._canary = canary
        self._clock = clock
        self._began = clock()
        self._stable, self._its = _Arm(edges), _Arm(edges)  # the canary's
        self._shadowed = dict(NOTHING)

    def ran(self, side: Side, rows: int, seconds: float) -> None:
        """A run of the model with so many rows."""
        arm = self._arm(side)
        arm.waiting_rows.append(rows)
        arm.waiting_runs.append(seconds)
        if len(arm.waiting_runs) >= MOST_WAITING:  # of requests whose callers went away, too
            arm.fold()

    def scored(self, side: Side, outputs: Outputs) -> None:
        """The scores of an answer."""
        if (scores := scores_of(outputs)) is not None:
            self._arm(side).score(scores)

    def request(self, side: Side, seconds: float | None, *, failed: bool = False) -> None:
        """A request that this side was given has finished, after what it ran and scored; `seconds`: that a caller waited for it,
        if one did. `failed`: whether the version failed it. A caller who fails again counts again, as his requests do: how much
        that makes the counts vary is the gate's to see (rollout/comparison.py)."""
        arm = self._arm(side)
        arm.requests += 1
        if seconds is not None:
            arm.waiting.append(seconds)
        arm.errors += failed
        if len(arm.waiting) >= MOST_WAITING:
            arm.fold()

    def answered(self, record: InferenceRecord, outputs: Outputs) -> None:
        """A request that one version has answered with these: `request`, `ran` and `scored` in one, as nearly all are counted."""
        self._answers.append((record, outputs))
        if record.version not in self._small or record.rows > FEW_ROWS or len(self._answers) >= MOST_ANSWERS:
            self._count()

    def expect(self, version: int, row_bytes: int | None) -> None:
        """That this version may answer, with so many bytes a row, or None if nobody knows: its answers may wait if they are
        small."""
        if row_bytes is not None and row_bytes <= SMALL_ROW:
            self._small.add(version)

    def _count(self) -> None:
        """Counts the answers that wait, one after another: alone, each would find the processor's caches taken."""
        answers, self._answers = self._answers, []
        for record, outputs in answers:
            if record.version == self._canary:
                arm = self._its
                self._of_canary += 1
            else:
                arm = self._stable
                self._of_stable += 1
            arm.requests += 1
            arm.waiting.append(record.seconds)
            if record.batch_rows:  # else another request of the run tells of it
                arm.waiting_rows.append(record.batch_rows)
                arm.waiting_runs.append(record.stages["execute"])
            if (scores := scores_of(outputs)) is not None:
                arm.score(scores)
            if len(arm.waiting) >= MOST_WAITING:
                arm.fold()

    @property
    def answers_of_stable(self) -> int:
        """How many requests it has answered, in all windows."""
        self._count()
        return self._of_stable

    @property
    def answers_of_canary(self) -> int:
        """The same of the canary's."""
        self._count()
        return self._of_canary

    def stable_answered(self) -> None:
        """A request that `answered` is not told of."""
        self._of_stable += 1

    def _arm(self, side: Side) -> _Arm:
        return self._its if side == "canary" else self._stable

    def shadowed(self, rows: int, disagreed: int) -> None:
        """A request that both sides have answered, with so many rows that could be compared."""
        if rows:
            self._shadowed["requests"] += 1
            self._shadowed["rows"] += rows
            self._shadowed["disagreed"] += disagreed

    def take(self, step: int = 0, edges: Sequence[float] | None = None) -> Window:
        """What has been counted since the last time; the next window begins. `edges`: of its bins, from then on."""
        self._count()
        now = self._clock()
        window = Window(
            step=step,
            seconds=now - self._began,
            stable=self._stable.arm(),
            canary=self._its.arm(),
            shadowed=Shadowed(**self._shadowed),
        )
        self._edges = self._edges if edges is None else edges
        self._began, self._shadowed = now, dict(NOTHING)
        self._stable, self._its = _Arm(self._edges), _Arm(self._edges)
        return window


def scores_of(outputs: Outputs) -> Scores | None:
    """One a row: of the first output of floats, where a row has several values the last (of two classes the positive one's
    probability). All of them together would be the same whichever class each is of. As `comparing.score_column` has it."""
    for values in outputs.values():
        if values.dtype.kind == "f":
            return values if values.size == len(values) else values[(slice(None), *(slice(-1, None),) * (values.ndim - 1))]
    return None
