"""What a report reads of a run's tables: a bounded sample of the answers, and a few dead letters of each reason.

    data/*.parquet -> up to SAMPLE_PARTS parts -> up to SAMPLE_GROUPS row groups of each -> their first rows -> Answer by column
    dead_letters/*.parquet -> the columns that say where and why -> the first EXAMPLES by reason

At most SAMPLE_ROWS rows of data are decoded, however large the run is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from triform.errors import NotReconciled
from triform.runs.commit import RunManifest
from triform.runs.folder import RunFolder, part_name
from triform.runs.plan import Plan

T = TypeVar("T")
SAMPLE_ROWS: Final = 200_000
SAMPLE_PARTS: Final = 256
SAMPLE_GROUPS: Final = 16
MAX_COLUMNS: Final = 12
MAX_WORDS: Final = 1_000  # distinct texts of a column that are counted one by one
MAX_WORD: Final = 80  # characters
FEW: Final = 20  # an integer column with so many values at most holds classes, not quantities
EXAMPLES: Final = 3
EXAMPLE_PARTS: Final = 32
STAMPS: Final = ("_model_version", "_scored_at")


class Answer(NamedTuple):
    """A sample of one output column: `words` counts classes; `values` are the finite numbers of a column of quantities."""

    name: str
    kind: str
    rows: int
    null: int
    nan: int
    above: int  # +infinity
    below: int  # -infinity
    values: NDArray[np.float64] | None
    words: dict[str, int]  # the commonest first
    others: int  # rows whose text came after MAX_WORDS others


class Sample(NamedTuple):
    """`rows` of `of` answered ones, from `parts` parts. `skipped` names what is not in `answers`, and why."""

    rows: int
    of: int
    parts: int
    answers: list[Answer]
    skipped: list[str]


class Example(NamedTuple):
    file: str
    row: int
    code: str
    reason: str


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """Up to `most` of the items, at even distances."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def sample(folder: RunFolder, plan: Plan, done: RunManifest) -> Sample:
    """Raises `NotReconciled` for a table that cannot be read."""
    parts = evenly([part for part in done.parts if part.rows_out], SAMPLE_PARTS)
    total = sum(part.rows_out for part in parts)
    columns: list[_Column] = []
    skipped: list[str] = []
    rows = 0
    for at, part in enumerate(parts):
        with part_table(folder, folder.data(committed=True), part.part) as file:
            if at == 0:
                columns, skipped = _columns(file.schema_arrow, plan)
            quota = part.rows_out * SAMPLE_ROWS // max(total, SAMPLE_ROWS)
            for batch in _rows(file, [column.name for column in columns], quota):
                rows += batch.num_rows
                for column in columns:
                    column.add(batch.column(column.name))
    return Sample(rows, done.rows_out, len(parts), [column.finish() for column in columns], skipped)


def examples(folder: RunFolder, done: RunManifest) -> list[Example]:
    """Some dead letters, those of the commonest reason first; raises `NotReconciled` for a table that cannot be read."""
    wanted = dict.fromkeys(done.dead, EXAMPLES)
    found: list[Example] = []
    parts = [part for part in done.parts if part.dead_letters is not None]
    for part in evenly(parts, EXAMPLE_PARTS):
        if not any(wanted[code] for code in part.dead):
            continue
        with part_table(folder, folder.dead_letters(committed=True), part.part) as file:
            for batch in file.iter_batches(4096, columns=["source_file", "row_number", "code", "reason"], use_threads=False):
                for code in [code for code, missing in wanted.items() if missing]:
                    some = batch.filter(pc.equal(batch.column("code"), code)).slice(0, wanted[code]).to_pylist()
                    found += [Example(d["source_file"], d["row_number"], d["code"], d["reason"]) for d in some]
                    wanted[code] -= len(some)
    order = list(done.dead)
    return sorted(found, key=lambda e: order.index(e.code))


@contextmanager
def part_table(folder: RunFolder, below: str, part: int) -> Iterator[pq.ParquetFile]:
    """A part's file of a committed run, open; whatever is wrong with it becomes `NotReconciled`."""
    name = f"{below}/{part_name(part)}"
    try:
        with folder.files.open(name) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            yield file
    except (OSError, ValueError, KeyError) as error:
        told = f"{folder.where(name)} cannot be read: {error}"
        raise NotReconciled(f"{told}; `python -m batch verify` checks the whole run") from error


def _columns(schema: pa.Schema, plan: Plan) -> tuple[list[_Column], list[str]]:
    """The output columns that can be drawn, and a word on the others."""
    columns: list[_Column] = []
    skipped: list[str] = []
    for field in schema:
        if field.name in plan.layout.carried or field.name in STAMPS:
            continue
        if not _drawable(field.type):
            skipped.append(f"{field.name} ({field.type}): lists are not drawn")
        elif len(columns) == MAX_COLUMNS:
            skipped.append(f"{field.name} ({field.type}): the first {MAX_COLUMNS} columns are drawn")
        else:
            columns.append(_Column(field))
    return columns, skipped


def _drawable(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind))


def _rows(file: pq.ParquetFile, names: list[str], quota: int) -> Iterator[pa.RecordBatch]:
    """`quota` rows or a few less: the first ones of row groups at even distances."""
    everything = quota == file.metadata.num_rows
    groups = evenly(range(file.num_row_groups), file.num_row_groups if everything else SAMPLE_GROUPS)
    each = -(-quota // max(1, len(groups)))
    for group in groups if names else ():
        take = min(file.metadata.row_group(group).num_rows, quota if everything else min(each, quota))
        quota -= take
        for batch in file.iter_batches(max(take, 1), row_groups=[group], columns=names, use_threads=False):
            yield batch.slice(0, take)
            take -= min(take, batch.num_rows)
            if not take:
                break


class _Column:
    """Counts one output column, batch by batch."""

    def __init__(self, field: pa.Field) -> None:
        self.name, self.kind = field.name, field.type
        self.rows = self.null = self.nan = self.above = self.below = self.others = 0
        self.values: list[NDArray[np.float64]] = []
        self.words: Counter[str] = Counter()

    def add(self, array: pa.Array) -> None:
        self.rows += len(array)
        self.null += array.null_count
        array = array.drop_null()
        if pa.types.is_floating(self.kind) or pa.types.is_integer(self.kind):
            self._add_numbers(array.to_numpy(zero_copy_only=False).astype(np.float64))
        if not pa.types.is_floating(self.kind):
            self._add_words(array)

    def _add_numbers(self, values: NDArray[np.float64]) -> None:
        self.nan += int(np.isnan(values).sum())
        self.above += int(np.isposinf(values).sum())
        self.below += int(np.isneginf(values).sum())
        self.values.append(values[np.isfinite(values)])

    def _add_words(self, array: pa.Array) -> None:
        if pa.types.is_string(self.kind):
            array = pc.utf8_slice_codeunits(array, 0, MAX_WORD)
        for entry in pc.value_counts(array).to_pylist():
            word = str(entry["values"])
            if word in self.words or len(self.words) < MAX_WORDS:
                self.words[word] += entry["counts"]
            else:
                self.others += entry["counts"]

    def finish(self) -> Answer:
        quantities = bool(self.values) and (pa.types.is_floating(self.kind) or bool(self.others) or len(self.words) > FEW)
        return Answer(
            name=self.name,
            kind=str(self.kind),
            rows=self.rows,
            null=self.null,
            nan=self.nan,
            above=self.above,
            below=self.below,
            values=np.concatenate(self.values) if quantities else None,
            words={} if quantities else dict(self.words.most_common()),
            others=0 if quantities else self.others,
        )
