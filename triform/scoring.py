"""Scores one part of a Parquet file with a predictor, from Parquet to Parquet, at bounded memory. No Ray in here.

    reader thread                  this thread                                     writer thread
    row groups -> record batches -> encode -> Predictor.run -> columns (answering.py) -> part file
                                    refused rows, rows that make a run fail ------> dead letters, with the raw row

The bounded queues between the threads read ahead and write behind; memory depends on the batch, never on the file. Rows that
make a run fail are found by halving. Nothing is visible under a final name: the caller is given two finished, synced files.
"""

from __future__ import annotations

import hashlib
import os
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

from triform import arrow, buffers
from triform.answering import answer
from triform.dead_letters import FOOTER_KEY, DeadLetter, plain_field, read, sink
from triform.dead_letters import write as write_dead_letters
from triform.errors import InputChanged, InputUnreadable, TooManyDeadLetters
from triform.features import Features
from triform.package import FileEntry, file_entry
from triform.pipeline import Behind, ahead
from triform.predictor import Predictor

BATCH_ROWS: Final = 16_384
BATCH_BYTES: Final = 32 << 20
STAGES: Final = ("read", "decode", "predict", "encode", "write")


class Part(msgspec.Struct, frozen=True):
    """Some row groups of one file. `first_row` is the file's row number (from 0) of the part's first row."""

    number: int
    path: str
    size: int  # of the whole file, bytes
    fingerprint: str  # of the file that the plan was made from
    row_groups: tuple[int, ...]
    first_row: int
    rows: int


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

    @property
    def rows_dead(self) -> int:
        return sum(self.dead.values())


def fingerprint(path: Path) -> str:
    """What tells a local file from the one that was there before: sha256 of its Parquet footer and modification time.

    The footer alone would not do: it holds each column chunk's place, size and extremes, and a value between them can change
    without a trace. Raises `InputUnreadable` for what is no Parquet file.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 12:
            raise InputUnreadable(f"{path}: {size} bytes are no Parquet file")
        file.seek(-8, os.SEEK_END)
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > size - 12:
            raise InputUnreadable(f"{path}: no Parquet file, or cut off: its last bytes are not a Parquet footer")
        file.seek(-8 - length, os.SEEK_END)
        modified = os.fstat(file.fileno()).st_mtime_ns
        return hashlib.sha256(file.read(length) + modified.to_bytes(16, "little", signed=True)).hexdigest()


def score_part(
    part: Part,
    predictor: Predictor,
    layout: Layout,
    *,
    data: Path,
    dead_letters: Path,
    footer: Mapping[str, Any] | None = None,
    max_dead: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> ScoredPart:
    """Writes the part's answers to `data` and, if there are any, its dead letters to `dead_letters`; both synced to disk.

    `footer` is stored, with the counts, in the files' metadata. More than `max_dead` dead letters end the work early. `on_rows`
    is told, after each batch, how many rows have been read so far. Raises `InputUnreadable`, `InputChanged` (the file is no
    longer the planned one), `TooManyDeadLetters`.
    """
    return _Scoring(part, predictor, layout, max_dead, on_rows).run(data, dead_letters, dict(footer or {}))


def output_schema(features: Features, source: pa.Schema, layout: Layout) -> pa.Schema:
    """The schema of a part's file: key and kept columns as the source has them, the outputs, `_model_version`, `_scored_at`."""
    carried = [plain_field(source.field(name)) for name in layout.carried]
    stamps = [pa.field("_model_version", pa.string()), pa.field("_scored_at", pa.timestamp("us", tz="UTC"))]
    return pa.schema([*carried, *arrow.output_schema(features), *stamps])


def open_parquet(part: Part) -> pq.ParquetFile:
    """The part's file, checked to be the one that was planned."""
    path = Path(part.path)
    try:
        if path.stat().st_size != part.size or fingerprint(path) != part.fingerprint:
            raise InputChanged(f"{part.path} is not the file that was planned; start the job anew for its present content")
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except OSError as error:  # ArrowInvalid is a ValueError
        raise InputUnreadable(f"{part.path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputUnreadable(f"{part.path}: {error}") from error


class _Scoring:
    """The work on one part; used once."""

    def __init__(
        self, part: Part, predictor: Predictor, layout: Layout, max_dead: int | None, on_rows: Callable[[int], None] | None
    ) -> None:
        self.part = part
        self.predictor = predictor
        self.layout = layout
        self.max_dead = max_dead
        self.on_rows = on_rows
        self.features = Features(predictor.signature, predictor.manifest.config)
        self.scored_at = int(datetime.fromisoformat(layout.scored_at).timestamp()) * 1_000_000
        self.dead: list[DeadLetter] = []
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.rows_in = 0
        self.rows_out = 0

    def run(self, data: Path, dead_letters: Path, footer: dict[str, Any]) -> ScoredPart:
        started = time.perf_counter()
        with open_parquet(self.part) as source:
            schema = output_schema(self.features, source.schema_arrow, self.layout)
            with sink(data, schema) as writer:
                with (
                    closing(ahead(self._batches(source))) as batches,
                    Behind[pa.RecordBatch](lambda b: self._write(writer, b)) as behind,
                ):
                    for batch in batches:
                        behind.put(self._score(batch, schema))
                        if self.on_rows is not None:
                            self.on_rows(self.rows_in)
                if self.rows_in != self.part.rows:
                    raise InputUnreadable(f"{self.part.path}: {self.rows_in} rows came, the plan says {self.part.rows}")
                counts = {
                    "part": self.part.number,
                    "rows_in": self.rows_in,
                    "rows_out": self.rows_out,
                    "dead": self._dead_by_code(),
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

    def _batches(self, source: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        """The needed columns, batch by batch."""
        columns = list(dict.fromkeys((*self.features.columns, *self.layout.carried)))
        groups = [source.metadata.row_group(i) for i in self.part.row_groups]
        row_bytes = sum(g.total_byte_size for g in groups) / max(1, sum(g.num_rows for g in groups))
        size = int(np.clip(BATCH_BYTES / max(row_bytes, 1), 1, BATCH_ROWS))
        batches = read(source, self.part.path, size, self.part.row_groups, columns)
        while True:
            with self._timed("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _score(self, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        """One batch as it goes into the output: the rows that were answered."""
        first = self.rows_in
        self.rows_in += batch.num_rows
        rows, answers, refused = answer(self.predictor, self.features, batch, self._timed)
        self._bury(DeadLetter(first + r.row, r.code, r.reason) for r in refused)
        self.rows_out += len(rows)
        with self._timed("encode"):
            carried = batch.select(self.layout.carried)
            if len(rows) != batch.num_rows:
                carried = carried.take(buffers.from_numpy(rows))
            version = buffers.repeated_text(self.predictor.manifest.ref, len(rows))
            stamp = buffers.repeated_instant(self.scored_at, len(rows))
            return pa.RecordBatch.from_arrays([*carried.columns, *answers.values(), version, stamp], schema=schema)

    def _bury(self, letters: Iterator[DeadLetter]) -> None:
        self.dead.extend(letters)
        if self.max_dead is not None and len(self.dead) > self.max_dead:
            codes = ", ".join(f"{code} {n}" for code, n in Counter(d.code for d in self.dead).most_common(5))
            raise TooManyDeadLetters(
                f"{self.part.path}: {len(self.dead)} dead letters in its first {self.rows_in} rows are more than the whole run "
                f"may have ({self.max_dead}): {codes}; for instance row {self.part.first_row + self.dead[0].row}: "
                f"{self.dead[0].reason}"
            )

    def _write(self, writer: pq.ParquetWriter, batch: pa.RecordBatch) -> None:
        with self._timed("write"):
            writer.write_batch(batch)

    def _write_dead_letters(self, source: pq.ParquetFile, path: Path, footer: Mapping[str, Any]) -> None:
        with self._timed("write"):
            write_dead_letters(
                path,
                source,
                source_file=self.part.path,
                row_groups=self.part.row_groups,
                first_row=self.part.first_row,
                letters=self.dead,
                key=self.layout.key,
                footer=footer,
            )
