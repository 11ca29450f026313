"""Scores one part of a Parquet file with a predictor, from Parquet to Parquet, at bounded memory. No Ray in here.

    reader thread                  this thread                                     writer thread
    row groups -> record batches -> encode -> Predictor.run -> columns (answering.py) -> part file
                                    with a canary: each row by the version of its key (row_split.py)
                                    refused rows, rows that make a run fail ------> dead letters, with the raw row

The bounded queues between the threads read ahead and write behind; memory depends on the batch, never on the file. Rows that
make a run fail are found by halving. Nothing is visible under a final name: the caller is given two finished, synced files.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from triform import arrow, buffers
from triform.answering import Answered, Side, answer, answer_read
from triform.batch_rows import BATCH_ROWS, batch_rows
from triform.dead_letters import FOOTER_KEY, DeadLetter, decoded, sink
from triform.dead_letters import write as write_dead_letters
from triform.errors import InputUnreadable, ResourceExhausted, TooManyDeadLetters
from triform.features import Features
from triform.package import FileEntry, file_entry
from triform.pipeline import Behind, ahead
from triform.predictor import Predictor
from triform.row_split import RowSplit
from triform.signature import Array
from triform.sources import Identity, Source, Sources, Unread, plain_field, unreadable

KEPT_BYTES: Final = 16 << 20  # of rows that became dead letters; beyond, they are read again with all their columns
SMALLER: Final = 8  # a part for which memory does not suffice is scored again in batches smaller by this factor
STAGES: Final = ("read", "decode", "predict", "encode", "write")


class Part(msgspec.Struct, frozen=True):
    """Some row groups of one file. `first_row` is the file's row number (from 0) of the part's first row."""

    number: int
    path: str  # or s3://bucket/key
    size: int  # of the whole file, bytes
    fingerprint: str  # of the file that the plan was made from
    row_groups: tuple[int, ...]
    first_row: int
    rows: int

    @property
    def identity(self) -> Identity:
        return Identity(self.size, self.fingerprint)

    @property
    def label(self) -> str:
        """The part as a person looks for it."""
        first, last = (self.row_groups[0], self.row_groups[-1]) if self.row_groups else (0, 0)
        groups = f"row group {first}" if first == last else f"row groups {first} to {last}"
        return f"{self.path}, {groups} (rows {self.first_row:,} to {self.first_row + max(self.rows, 1) - 1:,})"


class Layout(msgspec.Struct, frozen=True):
    """What stands in the output beside the model's answer."""

    key: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    scored_at: str = "1970-01-01T00:00:00+00:00"  # ISO 8601 in whole seconds: the run's start, the same for all its parts

    @property
    def carried(self) -> list[str]:
        return list(dict.fromkeys((*self.key, *self.keep)))


class ScoredPart(msgspec.Struct, frozen=True):
    """What came of a part. `seconds` by stage; the threads overlap, so they sum to more than the wall time `elapsed`."""

    part: int
    rows_in: int
    rows_out: int
    dead: dict[str, int]  # rows by error code
    data: FileEntry
    dead_letters: FileEntry | None
    seconds: dict[str, float]
    elapsed: float
    began: float = 0.0  # Unix time of this attempt's start, by its machine's clock; 0 where nobody recorded it
    worker: str = ""  # host:process
    rows_canary: int = 0  # of those answered: by the canary, where rows are split
    instead: dict[str, int] = {}  # rows of its keys that stable answered, by the code for which it did not

    @property
    def rows_dead(self) -> int:
        return sum(self.dead.values())


def score_part(
    part: Part,
    predictor: Predictor,
    layout: Layout,
    *,
    data: Path,
    dead_letters: Path,
    footer: Mapping[str, Any] | None = None,
    sources: Sources | None = None,
    max_dead: int | None = None,
    on_rows: Callable[[int], None] | None = None,
    most_rows: int = BATCH_ROWS,
    split: RowSplit | None = None,
) -> ScoredPart:
    """Writes the part's answers to `data` and, if there are any, its dead letters to `dead_letters`; both synced to disk.

    `footer` is stored, with the counts, in the files' metadata. `sources`: open connections to use again. More than `max_dead`
    dead letters end the work early. `on_rows` is told, after each batch, how many rows have been read so far. A batch has at most
    `most_rows`; where memory runs out, the part is scored again in smaller ones. `split`: which rows are a canary's.

    Raises `InputUnreadable`, `InputChanged` (the file is no longer the planned one), `TooManyDeadLetters`, and
    `ResourceExhausted` where memory does not suffice for one row at a time.
    """
    while True:
        scoring = _Scoring(part, predictor, layout, sources or Sources(), max_dead, on_rows, most_rows, split)
        try:
            return scoring.run(data, dead_letters, dict(footer or {}))
        except (MemoryError, ResourceExhausted) as error:  # ArrowMemoryError is a MemoryError
            if scoring.most_rows == 1:
                raise ResourceExhausted(f"{part.label}: memory ran out, even for one row at a time: {error}") from error
            most_rows = max(1, scoring.most_rows // SMALLER)


def output_schema(features: Features, source: pa.Schema, layout: Layout) -> pa.Schema:
    """The schema of a part's file: key and kept columns as the source has them, the outputs, `_model_version`, `_scored_at`."""
    carried = [plain_field(source.field(name)) for name in layout.carried]
    stamps = [pa.field("_model_version", pa.string()), pa.field("_scored_at", pa.timestamp("us", tz="UTC"))]
    return pa.schema([*carried, *arrow.output_schema(features), *stamps])


class _Scoring:
    """The work on one part; used once."""

    def __init__(
        self,
        part: Part,
        predictor: Predictor,
        layout: Layout,
        sources: Sources,
        max_dead: int | None,
        on_rows: Callable[[int], None] | None,
        most_rows: int,
        split: RowSplit | None,
    ) -> None:
        self.part = part
        self.predictor = predictor
        self.layout = layout
        self.sources = sources
        self.max_dead = max_dead
        self.on_rows = on_rows
        self.most_rows = most_rows
        self.stable = Side.of(predictor)
        self.features = self.stable.features
        self.split = split
        sides = [self.stable, split.canary] if split else [self.stable]
        needed = [column for side in sides for column in side.features.columns]
        self.columns = list(dict.fromkeys([*needed, *([split.column] if split else []), *layout.carried]))
        self.coded = sorted({column for side in sides for column in side.features.text}.difference(layout.carried))
        self.refs = pa.array([side.predictor.manifest.ref for side in sides])
        self.rows_canary = 0
        self.instead = Counter[str]()
        self.scored_at = int(datetime.fromisoformat(layout.scored_at).timestamp()) * 1_000_000
        self.dead: list[DeadLetter] = []
        self.dead_rows: list[pa.RecordBatch] | None = []  # what was read of them; None: too much to keep
        self.dead_bytes = 0
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.rows_in = 0
        self.rows_out = 0

    def run(self, data: Path, dead_letters: Path, footer: dict[str, Any]) -> ScoredPart:
        began, started = time.time(), time.perf_counter()
        with self.sources.open(self.part.path, self.part.identity, self.coded) as source:
            schema = output_schema(self.features, source.schema, self.layout)
            with sink(data, schema) as writer:
                with (
                    closing(ahead(self._batches(source))) as batches,
                    Behind[pa.RecordBatch](lambda b: self._write(writer, b)) as behind,
                ):
                    for batch in batches:
                        behind.put(self._score(batch, schema, source.unread))
                        if self.on_rows is not None:
                            self.on_rows(self.rows_in)
                if self.rows_in != self.part.rows:
                    raise InputUnreadable(f"{self.part.path}: {self.rows_in} rows came, the plan says {self.part.rows}")
                counts = {
                    "part": self.part.number,
                    "rows_in": self.rows_in,
                    "rows_out": self.rows_out,
                    "dead": self._dead_by_code(),
                    "rows_canary": self.rows_canary,
                    "instead": self.instead,
                }
                writer.add_key_value_metadata({FOOTER_KEY: orjson.dumps(footer | counts)})
            if self.dead:
                self._write_dead_letters(source, dead_letters, footer | counts)
        return ScoredPart(
            part=self.part.number,
            rows_in=self.rows_in,
            rows_out=self.rows_out,
            dead=self._dead_by_code(),
            data=file_entry(data),
            dead_letters=file_entry(dead_letters) if self.dead else None,
            seconds={k: round(v, 6) for k, v in self.seconds.items()},
            elapsed=round(time.perf_counter() - started, 6),
            began=round(began, 6),
            worker=f"{socket.gethostname()[:64]}:{os.getpid()}",
            rows_canary=self.rows_canary,
            instead=dict(self.instead),
        )

    def _dead_by_code(self) -> dict[str, int]:
        return dict(Counter(d.code for d in self.dead))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def _batches(self, source: Source) -> Iterator[pa.RecordBatch]:
        """The needed columns, batch by batch."""
        with unreadable(self.part.path, self.part.row_groups):
            self.most_rows = batch_rows(source.parquet, self.part.row_groups, self.columns, most=self.most_rows)
        batches = source.batches(self.most_rows, self.part.row_groups, self.columns)
        while True:
            with self._timed("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _score(self, batch: pa.RecordBatch, schema: pa.Schema, unread: Mapping[int, Unread]) -> pa.RecordBatch:
        """One batch as it goes into the output: the rows that were answered."""
        first = self.rows_in
        self.rows_in += batch.num_rows
        start = self.part.first_row + first
        rows, answers, refused, canarys, instead = answer_read(self._ask, batch, start, unread)
        self._bury(DeadLetter(first + r.row, r.code, r.reason) for r in refused)
        self.rows_out += len(rows)
        self.rows_canary += 0 if canarys is None else int(canarys.sum())
        self.instead.update(instead)
        with self._timed("encode"):
            if len(rows) != batch.num_rows:
                self._keep_dead_rows(batch, rows)
            carried = batch.select(self.layout.carried)
            if len(rows) != batch.num_rows:
                carried = carried.take(buffers.from_numpy(rows))
            named = [answers[column.name] for column in self.features.outputs]
            version = self._versions(len(rows), canarys)
            stamp = buffers.repeated_instant(self.scored_at, len(rows))
            return pa.RecordBatch.from_arrays([*carried.columns, *named, version, stamp], schema=schema)

    def _ask(self, batch: pa.RecordBatch) -> Answered:
        if self.split is None:
            return answer(self.stable, batch, self._timed)
        return self.split.answer(self.stable, batch, self._timed)

    def _versions(self, rows: int, canarys: NDArray[np.bool_] | None) -> pa.Array:
        """Of each row the version that answered it."""
        if canarys is None:
            return buffers.repeated_text(self.predictor.manifest.ref, rows)
        return self.refs.take(buffers.from_numpy(canarys.astype(np.int8)))

    def _bury(self, letters: Iterator[DeadLetter]) -> None:
        self.dead.extend(letters)
        if self.max_dead is not None and len(self.dead) > self.max_dead:
            codes = ", ".join(f"{code} {n}" for code, n in Counter(d.code for d in self.dead).most_common(5))
            raise TooManyDeadLetters(
                f"{self.part.path}: {len(self.dead)} dead letters in its first {self.rows_in} rows are more than the whole run "
                f"may have ({self.max_dead}): {codes}; for instance row {self.part.first_row + self.dead[0].row}: "
                f"{self.dead[0].reason}"
            )

    def _keep_dead_rows(self, batch: pa.RecordBatch, scored: Array) -> None:
        """Keeps what was read of the other rows, so that only their other columns have to be read again."""
        if self.dead_rows is None:
            return
        dead = np.delete(np.arange(batch.num_rows), scored)
        rows = batch.take(buffers.from_numpy(dead))
        self.dead_rows.append(decoded(rows, but=self.layout.key))
        self.dead_bytes += self.dead_rows[-1].nbytes
        if self.dead_bytes > KEPT_BYTES:
            self.dead_rows = None

    def _write(self, writer: pq.ParquetWriter, batch: pa.RecordBatch) -> None:
        with self._timed("write"):
            writer.write_batch(batch)

    def _write_dead_letters(self, source: Source, path: Path, footer: Mapping[str, Any]) -> None:
        with self._timed("write"):
            write_dead_letters(
                path,
                source,
                row_groups=self.part.row_groups,
                first_row=self.part.first_row,
                letters=self.dead,
                known=pa.Table.from_batches(self.dead_rows) if self.dead_rows is not None else None,
                key=self.layout.key,
                footer=footer,
                most_rows=self.most_rows,
            )
