"""What every way is given (a JSON file), and the scoring that the peers share: it is written once, and written well.

    {"files": ..., "model": ..., "inputs": ..., ...} -> Task -> Scorer(batch of columns) -> batch of answers

Only numpy, pyarrow and ONNX Runtime in here: PySpark runs it in an environment of its own. A row with a null in a column that
must not have one is dropped; the other checks that Triform makes are not made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 65_536  # of 16, 32 and 64 thousand the raw loop's best on text; on floats 32 thousand took 7% less CPU


class Task(NamedTuple):
    """`inputs`: tensor -> its columns; `outputs`: answer column -> (tensor, position or None, dtype)."""

    files: list[str]
    output: str  # a folder that is not there yet
    result: str  # a file for the times
    model: str
    ref: str
    repository: str
    inputs: dict[str, list[str]]
    text: list[str]  # the tensors of text
    required: list[str]  # the columns whose null drops the row
    outputs: dict[str, tuple[str, int | None, str]]
    key: list[str]
    keep: list[str]
    workers: int

    @property
    def carried(self) -> list[str]:
        return list(dict.fromkeys([*self.key, *self.keep]))

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([*(c for columns in self.inputs.values() for c in columns), *self.carried]))


def read_task(path: str) -> Task:
    return Task(**json.loads(Path(path).read_text()))


def finish(task: Task, *, begin: float, end: float, seconds: float | None = None, steady: float | None = None) -> None:
    """Tells when scoring began and ended, as `time.time()`; `processes.py` takes CPU time and memory in between.

    `seconds`: how long it took, where that is less than all of that time, because workers began one after the other. `steady`:
    rows/s without each worker's first file.
    """
    told = {"begin": begin, "end": end, "seconds": seconds, "steady": steady}
    Path(task.result).write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


def steady_rate(ends: Sequence[tuple[float, int]]) -> float:
    """Rows/s of one worker after its first file. `ends`: when each file (or part) was done, and its rows; rising."""
    if len(ends) < 2:
        return 0.0
    return sum(rows for _, rows in ends[1:]) / (ends[-1][0] - ends[0][0])


class Scorer:
    """A model with one thread, warm; batches of columns in, batches of answers out."""

    def __init__(self, task: Task) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.task = task
        self.session = ort.InferenceSession(task.model, options, providers=["CPUExecutionProvider"])
        self.wanted = list(dict.fromkeys(tensor for tensor, _, _ in task.outputs.values()))
        self.scored_at = int(time.time()) * 1_000_000
        with pq.ParquetFile(task.files[0]) as source:  # the first call imports pandas and costs a second: that is start-up
            self(next(source.iter_batches(1_000, columns=task.columns)))

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        batch = self._complete(batch)
        rows = batch.num_rows
        arrays = {name: batch.column(name) for name in self.task.carried} | self.answers(self._feed(batch))
        arrays["_model_version"] = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [self.task.ref]).cast(pa.string())
        arrays["_scored_at"] = pa.array(np.full(rows, self.scored_at), pa.timestamp("us", tz="UTC"))
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))

    def answers(self, feed: dict[str, Any]) -> dict[str, pa.Array]:
        values = dict(zip(self.wanted, self.session.run(self.wanted, feed), strict=True))
        columns = {}
        for name, (tensor, position, _) in self.task.outputs.items():
            value = values[tensor]
            columns[name] = pa.array(value.reshape(-1) if position is None else np.ascontiguousarray(value[:, position]))
        return columns

    def _complete(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        keep = None
        for column in map(batch.column, self.task.required):
            if column.null_count:
                valid = column.is_valid().to_numpy(zero_copy_only=False)
                keep = valid if keep is None else keep & valid
        return batch if keep is None else batch.filter(pa.array(keep))

    def _feed(self, batch: pa.RecordBatch) -> dict[str, Any]:
        feed = {}
        for tensor, names in self.task.inputs.items():
            if tensor in self.task.text:
                feed[tensor] = words(batch.column(names[0])).reshape(-1, 1)
            else:
                feed[tensor] = stacked((numbers(batch.column(name)) for name in names), batch.num_rows, len(names))
        return feed


def words(column: pa.Array) -> Any:
    """Text as numpy `U`, which ONNX Runtime reads faster than objects, by way of its few distinct values."""
    coded = column.dictionary_encode()
    distinct = np.array(coded.dictionary.to_pylist() or [""], dtype=np.str_)
    return distinct[coded.indices.to_numpy(zero_copy_only=False)]


def numbers(column: pa.Array) -> Any:
    """A null is NaN."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    return column.to_numpy(zero_copy_only=False)


def stacked(columns: Iterable[Any], rows: int, width: int) -> Any:
    """float32 [rows, width]."""
    tensor = np.empty((rows, width), dtype=np.float32)
    for i, values in enumerate(columns):
        tensor[:, i] = values
    return tensor
