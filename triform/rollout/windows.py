"""What replicas measure, by window and side, small enough to be sent and kept: counts and mergeable histograms, never samples.

    replica: requests -> Sketch, Arm -> Window      replicas' Windows -> merge -> one Window -> guards.py, evidence.py

Both sides of a window are of the same time: the gate compares a canary with *concurrent* stable. `requests` counts what was given
to a side, answered or not, and an error is the version's failure: a caller's mistake is none. A caller who tries again and again
counts each time, among the requests and the errors: how much more than binomially counts vary with that is seen from the windows
(comparison.py: the design effect).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from triform.errors import InvalidInput

STEPS_PER_OCTAVE: Final = 32  # bins of a sketch: edges are 2 ** (i / 32) seconds, so times are known to 2.2%
FASTEST, SLOWEST = -20 * STEPS_PER_OCTAVE, 10 * STEPS_PER_OCTAVE  # bins from 1 microsecond to 17 minutes
BUCKETS: Final = 10  # of executed rows: 1, 2, 4, 8, ... 256, more


class Sketch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A histogram with logarithmic bins: bin i counts times t with edge(i) < t <= edge(i + 1).

    Merging adds, and loses nothing (DDSketch: Masson, Rim & Lee 2019, VLDB).
    """

    bins: dict[int, int] = {}

    @classmethod
    def of(cls, seconds: npt.ArrayLike) -> Sketch:
        """Raises as `bins_of`."""
        return cls.counted(bins_of(seconds))

    @classmethod
    def counted(cls, bins: npt.NDArray[np.intp]) -> Sketch:
        """Of the count of each bin, [BINS], as `bins_of` gives them."""
        (found,) = bins.nonzero()
        return cls(dict(zip((found + FASTEST).tolist(), bins[found].tolist(), strict=True)))

    @property
    def total(self) -> int:
        return sum(self.bins.values())

    def above(self, seconds: float) -> int:
        """How many took longer, those in the bin that holds `seconds` left out."""
        first = math.ceil(STEPS_PER_OCTAVE * math.log2(seconds) - 1e-9)
        return sum(n for i, n in self.bins.items() if i >= first)

    def quantile(self, share: float) -> float | None:
        """Seconds, to 2.2%; None of nothing."""
        left = share * self.total
        for i in sorted(self.bins):
            left -= self.bins[i]
            if left <= 0:
                return edge(i + 1)
        return None


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One side of a window."""

    requests: int = 0
    errors: int = 0
    request_seconds: Sketch = Sketch()  # end to end
    execute: dict[int, Sketch] = {}  # time of a run of the model, by `rows_bucket`
    scores: tuple[int, ...] = ()  # rows in each of the policy's bins; the last one counts NaN


class Shadowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rows that both versions have answered, and in how many the answers are further apart than the recorded tolerance."""

    requests: int = 0
    rows: int = 0
    disagreed: int = 0


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`step`: of the policy (0 is the first; SHADOW before it). `seconds`: by a monotonic clock. `reported` of `expected`
    replicas."""

    step: int
    seconds: float
    stable: Arm = Arm()
    canary: Arm = Arm()
    shadowed: Shadowed = Shadowed()
    reported: int = 1
    expected: int = 1

    @property
    def complete(self) -> bool:
        """Whether it is the whole story. What a replica did not report may be just what went wrong."""
        return self.expected > 0 and self.reported >= self.expected and self.fault() is None

    def fault(self) -> str | None:
        """What cannot be in it; such a window counts as missing."""
        if not 1e-3 <= self.seconds <= 1e7:
            return f"seconds: expected 0.001 to 10,000,000, got {self.seconds}"
        if self.step < SHADOW or self.reported < 0 or self.expected < 0:
            return "step, reported or expected: negative"
        for name, arm in ("stable", self.stable), ("canary", self.canary):
            if not 0 <= arm.errors <= arm.requests:
                return f"{name}: {arm.errors} errors of {arm.requests} requests"
            sketches = (arm.request_seconds, *arm.execute.values())
            if not all(map(_is_sound, sketches)) or min(arm.scores, default=0) < 0:
                return f"{name}: a count that is negative, or of no bin"
            if any(not 0 <= bucket < BUCKETS for bucket in arm.execute):
                return f"{name}: execute has a bucket of rows that there is not"
        s = self.shadowed
        if not (0 <= s.disagreed <= s.rows and 0 <= s.requests <= s.rows):
            return f"shadowed: {s.disagreed} disagreed of {s.rows} rows in {s.requests} requests"
        return None


SHADOW: Final = -1  # the step of windows before the canary has traffic


def _is_sound(sketch: Sketch) -> bool:
    bins = sketch.bins
    return not bins or (min(bins.values()) >= 0 and min(bins) >= FASTEST and max(bins) <= SLOWEST)


def edge(index: int) -> float:
    return float(2.0 ** (index / STEPS_PER_OCTAVE))


BINS: Final = SLOWEST - FASTEST + 1
_UPPER: Final = np.array([edge(index + 1) for index in range(FASTEST, SLOWEST)])  # edges, of each bin but the slowest
_ROWS: Final = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])  # of each bucket but the last


def bins_of(seconds: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """How many times are in each bin, the fastest first: [BINS]. Raises `InvalidInput` for one that is negative or not finite."""
    return np.bincount(_places(seconds), minlength=BINS)


def bins_of_runs(rows: npt.ArrayLike, seconds: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """The same of runs with so many rows each, by `rows_bucket`: [BUCKETS, BINS]."""
    places = BINS * np.searchsorted(_ROWS, rows) + _places(seconds)
    return np.bincount(places, minlength=BUCKETS * BINS).reshape(BUCKETS, BINS)


def _places(seconds: npt.ArrayLike) -> npt.NDArray[np.intp]:
    times = np.asarray(seconds, np.float64)
    if times.size and not 0 <= times.min() <= times.max() < math.inf:  # of what has a NaN both are NaN
        raise InvalidInput(f"times of {times.min()} to {times.max()} seconds")
    return np.searchsorted(_UPPER, times)


def rows_bucket(rows: int) -> int:
    """0 for one row, 1 for 2, 2 for up to 4, 3 for up to 8: batches that take about as long."""
    return int(np.searchsorted(_ROWS, rows))


def score_bins(values: Iterable[float], edges: Sequence[float]) -> tuple[int, ...]:
    """Counts below the first of `edges`, between each two, from the last on, and of NaN."""
    scores = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    nan = np.isnan(scores)
    counts = np.bincount(np.searchsorted(np.asarray(edges), scores[~nan], side="right"), minlength=len(edges) + 1)
    return (*counts.tolist(), int(nan.sum()))


def merge(windows: Sequence[Window]) -> Window:
    """The windows that replicas have measured at the same time and step, as one; `expected` is the most that any knows of.

    Raises `InvalidInput` for none, for several steps, and for score bins of several lengths.
    """
    if not windows or len({w.step for w in windows}) > 1:
        raise InvalidInput(f"windows of the steps {sorted({w.step for w in windows})} cannot be merged: expected one step")
    shadowed = [w.shadowed for w in windows]
    return Window(
        step=windows[0].step,
        seconds=max(w.seconds for w in windows),
        stable=merge_arms([w.stable for w in windows]),
        canary=merge_arms([w.canary for w in windows]),
        shadowed=Shadowed(
            requests=sum(s.requests for s in shadowed),
            rows=sum(s.rows for s in shadowed),
            disagreed=sum(s.disagreed for s in shadowed),
        ),
        reported=sum(w.reported for w in windows),
        expected=max(w.expected for w in windows),
    )


def joined(first: Window, second: Window) -> Window:
    """Two windows of one step, one after the other, as one; it is complete if both are. Raises as `merge`."""
    both = merge([first, second])
    return msgspec.structs.replace(
        both,
        seconds=first.seconds + second.seconds,
        reported=min(first.reported, second.reported),
        expected=first.expected if first.reported <= second.reported else second.expected,
    )


def merge_arms(arms: Sequence[Arm]) -> Arm:
    """Their sum. Raises `InvalidInput` for score bins of several lengths."""
    scores = [a.scores for a in arms if a.scores]
    if len({len(s) for s in scores}) > 1:
        raise InvalidInput(f"scores in {sorted({len(s) for s in scores})} bins cannot be merged: expected one number of bins")
    buckets = sorted({b for a in arms for b in a.execute})
    return Arm(
        requests=sum(a.requests for a in arms),
        errors=sum(a.errors for a in arms),
        request_seconds=merge_sketches(a.request_seconds for a in arms),
        execute={b: merge_sketches(a.execute[b] for a in arms if b in a.execute) for b in buckets},
        scores=tuple(sum(column) for column in zip(*scores, strict=True)),
    )


def merge_sketches(sketches: Iterable[Sketch]) -> Sketch:
    """Their sum."""
    bins: dict[int, int] = {}
    for sketch in sketches:
        for index, n in sketch.bins.items():
            bins[index] = bins.get(index, 0) + n
    return Sketch(bins)
