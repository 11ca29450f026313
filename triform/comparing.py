"""Compares one part of a run with what another version, the candidate, would have answered. No Ray in here; what the run has
written is only read.

    input file: row groups -> record batches -> candidate (answering.py) --+
    the run's data and dead letters of the same rows ----------------------+-> row by row: disagreement.py -> ComparedPart
    the first rows of each window -> both versions, in turn -> times ------+

Whatever a candidate does is counted, never raised: rows that it refuses, a run that raises, one that takes too long or too much
memory (that batch's rows are its errors then, and the part ends there).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from triform import arrow, buffers
from triform.answering import PATIENCE, SLOWEST, Answered, Side, answer, answer_read
from triform.arrow import Refused
from triform.batch_rows import BATCH_ROWS, batch_rows
from triform.disagreement import ColumnCount, ComparedPart, added
from triform.errors import NotReconciled, ResourceExhausted, RunFailed, TriformError, by_code
from triform.features import Features, OutputColumn
from triform.golden import Tolerance
from triform.predictor import Predictor
from triform.rollout.agreement import recorded, widest
from triform.rollout.windows import SHADOW, Arm, Shadowed, Sketch, Window, merge_sketches, rows_bucket
from triform.scoring import Part
from triform.sources import Source, Sources, unreadable

WINDOWS: Final = 10  # of a part, unless they would have fewer rows than TIMED_ROWS
TIMED_ROWS: Final = 2048  # the first ones of a window, which both versions answer for their times ...
TIMED_RUN: Final = 256  # ... so many at once


def shared_columns(stable: Features, candidate: Features) -> list[tuple[OutputColumn, OutputColumn]]:
    """The output columns that both versions have, in the first one's order."""
    others = {column.name: column for column in candidate.outputs}
    return [(column, others[column.name]) for column in stable.outputs if column.name in others]


def score_column(stable: Features, candidate: Features) -> str | None:
    """The column whose distribution the gate looks at: of the first output of floats the last. As `tally.scores_of` has it."""
    floats = [a for a, b in shared_columns(stable, candidate) if a.tensor.dtype.kind == b.tensor.dtype.kind == "f"]
    return next((c.name for c in reversed(floats) if c.tensor.name == floats[0].tensor.name), None)


def compare_part(
    part: Part,
    stable: Predictor,
    candidate: Predictor,
    *,
    answers: pq.ParquetFile,
    refused: Mapping[int, str],
    edges: Sequence[float],
    sources: Sources | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> ComparedPart:
    """`answers`: the part's data file; `refused`: the codes of its dead letters by row number in the input file; `edges`: of the
    score bins; `on_rows` is told how many rows were compared so far.

    Raises what is wrong with the files: `InputUnreadable`, `InputChanged`, `NotReconciled`.
    """
    if (rows := answers.metadata.num_rows) != part.rows - len(refused):
        told = f"{rows:,} rows in the run's data file, {part.rows:,} planned, {len(refused):,} dead letters"
        raise NotReconciled(f"{part.label}: {told}; `python -m batch verify` tells more")
    return _Comparing(part, Side.of(stable), Side.of(candidate), answers, refused, edges).run(sources or Sources(), on_rows)


class _Tally:
    """What one window counts; of pairs the first is the run's own version."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.read = self.requests = self.rows = self.disagreed = 0
        self.errors = [0, 0]
        self.execute: tuple[dict[int, Sketch], dict[int, Sketch]] = ({}, {})
        self.scores: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def note(self, bucket: int, seconds: Sequence[float]) -> None:
        for kept, value in zip(self.execute, seconds, strict=True):
            kept[bucket] = merge_sketches((kept.get(bucket, Sketch()), Sketch.of([value])))

    def window(self, *, complete: bool) -> Window:
        stable, canary = (
            Arm(requests=self.requests, errors=self.errors[side], execute=self.execute[side], scores=self.scores[side])
            for side in (0, 1)
        )
        return Window(
            step=SHADOW,
            seconds=max(time.perf_counter() - self.started, 0.001),
            stable=stable,
            canary=canary,
            shadowed=Shadowed(requests=self.rows, rows=self.rows, disagreed=self.disagreed),
            reported=1 if complete else 0,
        )


class _Comparing:
    """The work on one part; used once."""

    def __init__(
        self,
        part: Part,
        stable: Side,
        candidate: Side,
        answers: pq.ParquetFile,
        refused: Mapping[int, str],
        edges: Sequence[float],
    ) -> None:
        self.part, self.sides, self.refused = part, (stable, candidate), refused
        pairs = shared_columns(stable.features, candidate.features)
        self.columns = {a.name: ColumnCount(part.number, a.name, self._tolerance(a, b), edges) for a, b in pairs}
        self.judged = score_column(stable.features, candidate.features)
        self.answers = answers
        self.dead: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.windows: list[Window] = []
        self.now = _Tally()
        self.fault = ("", "")
        self.deadline: float | None = None  # the candidate's, over the part

    def _tolerance(self, *columns: OutputColumn) -> Tolerance:
        return widest(
            recorded(side.predictor.manifest, side.predictor.provider, column.tensor.dtype)
            for side, column in zip(self.sides, columns, strict=True)
        )

    def run(self, sources: Sources, on_rows: Callable[[int], None]) -> ComparedPart:
        part = self.part
        columns = list(dict.fromkeys(name for side in self.sides for name in side.features.columns))
        text = sorted(name for side in self.sides for name in side.features.text)
        each = max(TIMED_ROWS, -(-part.rows // WINDOWS))
        with sources.open(part.path, part.identity, text) as source:
            with unreadable(part.path, part.row_groups):
                size = batch_rows(source.parquet, part.row_groups, columns, most=min(each, BATCH_ROWS))
            taken, done = _Answers(self.answers, list(self.columns), size), 0
            for batch in source.batches(size, part.row_groups, columns):
                if self.now.read >= each:
                    self._close()
                if self.now.read == 0:
                    self._time(batch.slice(0, TIMED_ROWS))
                self._compare(batch, part.first_row + done, source, taken)
                done += batch.num_rows
                on_rows(done)
                if self.fault[0]:
                    break
        self._close()
        return ComparedPart(
            part=part.number,
            windows=tuple(self.windows),
            columns=tuple(column.seen for column in self.columns.values()),
            stable_refused=dict(self.dead[0]),
            candidate_refused=dict(self.dead[1]),
            code=self.fault[0],
            error=self.fault[1],
        )

    def _close(self) -> None:
        self.windows.append(self.now.window(complete=not self.fault[0]))
        self.now = _Tally()

    def _time(self, batch: pa.RecordBatch) -> None:
        """Both versions on the same rows, in turn, who is first too; the first window says how long the candidate may take."""
        deadline = self.deadline or time.monotonic() + PATIENCE
        spent = timed = 0.0
        with suppress(Exception):  # what fails here is found row by row in `_compare`, and what is slow stops there
            inputs = [arrow.encode(side.features, batch).inputs for side in self.sides]
            rows = min(len(next(iter(tensors.values()))) for tensors in inputs)
            for number, start in enumerate((0, *range(0, rows, TIMED_RUN))):
                stop, seconds = min(start + TIMED_RUN, rows), [0.0, 0.0]
                with suppress(RunFailed):
                    for side in (0, 1) if number % 2 else (1, 0):
                        some = {name: array[start:stop] for name, array in inputs[side].items()}
                        began = time.perf_counter()
                        self.sides[side].predictor.run(some, deadline=deadline)
                        seconds[side] = time.perf_counter() - began
                    if number:  # the first run of a size is slower than all that follow
                        self.now.note(rows_bucket(stop - start), seconds)
                        spent, timed = spent + seconds[0], timed + stop - start
        if self.deadline is None:
            self.deadline = time.monotonic() + max(PATIENCE, SLOWEST * spent / max(timed, 1.0) * self.part.rows)

    def _compare(self, batch: pa.RecordBatch, start: int, source: Source, answers: _Answers) -> None:
        codes = {row - start: code for row, code in self.refused.items() if start <= row < start + batch.num_rows}
        ours = np.delete(np.arange(batch.num_rows), list(codes))
        first, second = answers.take(len(ours)), self._ask(batch, start, source)
        self._count(batch.num_rows, (ours, second.rows), (codes, {r.row: r.code for r in second.refused}))
        both = np.intersect1d(ours, second.rows, assume_unique=True)
        places = [buffers.from_numpy(np.searchsorted(rows, both)) for rows in (ours, second.rows)]
        apart = np.zeros(len(both), dtype=np.bool_)
        for name, column in self.columns.items():
            bins = column.score(first[name], second.columns.get(name))
            if name == self.judged:
                self.now.scores = added(self.now.scores[0], bins[0]), added(self.now.scores[1], bins[1])
            if len(both):
                apart |= column.compare(first[name].take(places[0]), second.columns[name].take(places[1]), start + both)
        self.now.read += batch.num_rows
        self.now.rows += len(both)
        self.now.disagreed += int(apart.sum())

    def _ask(self, batch: pa.RecordBatch, start: int, source: Source) -> Answered:
        """What the candidate answers; where it cannot be asked it has refused the whole batch."""
        try:
            return answer_read(partial(answer, self.sides[1], deadline=self.deadline), batch, start, source.unread)
        except Exception as error:  # noqa: BLE001 - whatever a candidate does is counted
            self.fault = _told(error)
            return Answered(np.arange(0), {}, [Refused(row, *self.fault) for row in range(batch.num_rows)])

    def _count(self, rows: int, answered: Sequence[NDArray[np.intp]], codes: Sequence[Mapping[int, str]]) -> None:
        """Requests and errors. What both refuse although no run of theirs failed is the data's fault, no version's."""
        there, failed = np.zeros((2, rows), dtype=np.bool_), np.zeros(rows, dtype=np.bool_)
        for side in 0, 1:
            there[side, answered[side]] = True
            self.dead[side].update(codes[side].values())
            own = {code for code in set(codes[side].values()) if issubclass(by_code(code), RunFailed)}
            if not (side and self.fault[0]):  # then nobody knows which rows of the batch were at fault
                failed[[row for row, code in codes[side].items() if code in own]] = True
        asked = there.any(axis=0) | failed
        self.now.requests += int(asked.sum())
        for side in 0, 1:
            self.now.errors[side] += int((asked & ~there[side]).sum())


def _told(error: Exception) -> tuple[str, str]:
    if isinstance(error, TriformError):
        return error.code, str(error)
    if isinstance(error, MemoryError):
        return ResourceExhausted.code, f"memory ran out: {error}"
    return TriformError.code, f"{type(error).__name__}: {error}"


class _Answers:
    """The run's answers to a part, in their order, as many rows at a time as are asked for."""

    def __init__(self, file: pq.ParquetFile, columns: list[str], rows: int) -> None:
        self._batches = file.iter_batches(rows, columns=columns, use_threads=False)
        self._left = pa.schema([file.schema_arrow.field(name) for name in columns]).empty_table()

    def take(self, rows: int) -> dict[str, pa.Array]:
        while self._left.num_rows < rows:
            batch = pa.Table.from_batches([next(self._batches)])
            self._left = pa.concat_tables([self._left, batch.select(self._left.column_names)])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        return {name: pa.concat_arrays(taken[name].chunks or [pa.array([], taken[name].type)]) for name in taken.column_names}
