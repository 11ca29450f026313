"""Where the answers of two versions differ: counted column by column, in sums, extremes and histograms that can be added up.

    both answers of a batch, a column of Arrow -> rollout/agreement.py -> ColumnCount -> ComparedColumn
    ComparedPart by ComparedPart -> merge_columns, refused_by_code -> those of a run

The rows themselves are not kept: of each column the one that differs most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from triform import buffers
from triform.golden import Tolerance
from triform.rollout.agreement import Apart, apart, widest
from triform.rollout.windows import SHADOW, Arm, Window, score_bins
from triform.signature import Array

LONGEST: Final = 120  # characters of an example's value


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A row in which the versions disagree, and what each said. `part` is the run's; `row` its number in the file, from 0."""

    part: int
    row: int
    stable: str
    candidate: str


class ComparedColumn(msgspec.Struct, frozen=True, kw_only=True):
    """An output column of both versions. `rows` disagree. `largest`, `relative`: the largest finite difference, and as a share of
    the first version's value. `stable` and `candidate` count the scores of all rows that the version has answered (of a list the
    last value), in the fixed bins (the last one NaN); empty where the column holds no floats."""

    name: str
    tolerance: Tolerance
    rows: int = 0
    largest: float = 0.0
    relative: float = 0.0
    example: Example | None = None
    stable: tuple[int, ...] = ()
    candidate: tuple[int, ...] = ()


class ComparedPart(msgspec.Struct, frozen=True, kw_only=True):
    """What came of comparing a part. `windows` are what the gate reads, in the order of the rows; the last is complete unless the
    candidate could not be asked for all of them: `code` and `error` say why."""

    part: int
    windows: tuple[Window, ...]
    columns: tuple[ComparedColumn, ...] = ()
    stable_refused: dict[str, int] = {}  # rows by error code
    candidate_refused: dict[str, int] = {}
    code: str = ""
    error: str = ""

    @property
    def rows(self) -> int:
        """Rows that both versions have answered."""
        return sum(window.shadowed.rows for window in self.windows)

    @property
    def disagreed(self) -> int:
        return sum(window.shadowed.disagreed for window in self.windows)


def crashed(part: int, answered: int, error: str) -> ComparedPart:
    """Of a part over which processes died: all rows that the run has answered are the candidate's errors."""
    window = Window(
        step=SHADOW,
        seconds=0.001,
        stable=Arm(requests=answered),
        canary=Arm(requests=answered, errors=answered),
        reported=0,
    )
    return ComparedPart(part=part, windows=(window,), code="part_crashed", error=error)


class ColumnCount:
    """Counts one output column of a part, batch by batch, in `seen`. `edges`: of the bins."""

    def __init__(self, part: int, name: str, tolerance: Tolerance, edges: Sequence[float]) -> None:
        self._part, self._edges = part, edges
        self._example_by = -1.0
        self.seen = ComparedColumn(name=name, tolerance=tolerance)

    def score(self, stable: pa.Array, candidate: pa.Array | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Counts all that each has answered, whether the other has or not; returns what came to the bins now."""
        now = (self._bins(stable), () if candidate is None else self._bins(candidate))
        self.seen = msgspec.structs.replace(
            self.seen, stable=added(self.seen.stable, now[0]), candidate=added(self.seen.candidate, now[1])
        )
        return now

    def _bins(self, values: pa.Array) -> tuple[int, ...]:
        """Of each row the last value, as `tally.scores_of` has it."""
        leaves, owners, _ = _leaves(values)
        last = np.diff(owners, append=len(values)) > 0
        return score_bins(leaves[last], self._edges) if leaves.dtype.kind == "f" else ()

    def compare(self, stable: pa.Array, candidate: pa.Array, numbers: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which rows disagree. `numbers`: of the rows, in their file."""
        mask, found, owners = rows_apart(stable, candidate, self.seen.tolerance)
        by = np.zeros(len(mask))
        np.maximum.at(by, owners, found.by)
        by[~mask] = -1.0
        example, worst = self.seen.example, int(np.argmax(by)) if mask.any() else None
        if worst is not None and by[worst] > self._example_by:
            self._example_by = float(by[worst])
            said = [str(values[worst].as_py())[:LONGEST] for values in (stable, candidate)]
            example = Example(part=self._part, row=int(numbers[worst]), stable=said[0], candidate=said[1])
        self.seen = msgspec.structs.replace(
            self.seen,
            rows=self.seen.rows + int(mask.sum()),
            largest=max(self.seen.largest, float(found.by.max(initial=0.0))),
            relative=max(self.seen.relative, float(found.share.max(initial=0.0))),
            example=example,
        )
        return mask


def rows_apart(first: pa.Array, second: pa.Array, tolerance: Tolerance) -> tuple[NDArray[np.bool_], Apart, NDArray[np.intp]]:
    """Rows that disagree; the elements of those that are as long on both sides; and whose element each is."""
    (a, of_a, depth_a), (b, of_b, depth_b) = _leaves(first), _leaves(second)
    mask = np.bincount(of_a, minlength=len(first)) != np.bincount(of_b, minlength=len(first))
    mask |= depth_a != depth_b
    owners = of_a[~mask[of_a]]
    found = apart(a[~mask[of_a]], b[~mask[of_b]], tolerance)
    mask[owners[found.mask]] = True
    return mask, found, owners


def _leaves(values: pa.Array) -> tuple[Array, NDArray[np.intp], int]:
    """The values in (nested) lists as one array, text as `str` objects; the row that each is of; how deep they lay."""
    owners, depth = np.arange(len(values)), 0
    while pa.types.is_list(values.type):
        owners = np.repeat(owners, buffers.to_numpy(pc.list_value_length(values)))
        values, depth = values.flatten(), depth + 1
    if pa.types.is_string(values.type):
        return np.array(values.to_pylist(), dtype=object), owners, depth
    return buffers.to_numpy(values), owners, depth


def merge_columns(parts: Iterable[ComparedPart]) -> list[ComparedColumn]:
    """The columns of several parts, added up; the example is that of the largest difference."""
    merged: dict[str, ComparedColumn] = {}
    for part in parts:
        for column in part.columns:
            before = merged.get(column.name)
            merged[column.name] = column if before is None else _sum(before, column)
    return list(merged.values())


def _sum(a: ComparedColumn, b: ComparedColumn) -> ComparedColumn:
    example = b.example if b.example and (a.example is None or b.largest > a.largest) else a.example
    return ComparedColumn(
        name=a.name,
        tolerance=widest((a.tolerance, b.tolerance)),
        rows=a.rows + b.rows,
        largest=max(a.largest, b.largest),
        relative=max(a.relative, b.relative),
        example=example,
        stable=added(a.stable, b.stable),
        candidate=added(a.candidate, b.candidate),
    )


def added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Counts in the same bins; none is nothing."""
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def refused_by_code(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows by reason, the commonest first."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(total.most_common())
