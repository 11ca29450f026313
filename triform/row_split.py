"""One record batch answered by a stable version and its canary, each row by the version of its key, as callers online are.

    RecordBatch -> key column -> TrafficSplit -> the canary's rows -> answer --+-> in the rows' order, and who answered each
                                              -> all others --------> answer --+
                             what the canary refuses, fails or takes too long for: stable's, too

A row without a key is stable's. Nobody's row is lost to a bad canary: what it does not answer stable does, and a row that both
refuse has stable's reason.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from triform import buffers
from triform.answering import PATIENCE, SLOWEST, Answered, Side, answer
from triform.arrow import Refused
from triform.errors import DeadlineExceeded, TriformError
from triform.splitting import TrafficSplit, key_of

log = logging.getLogger(__name__)

TIMED_ROWS: Final = 64  # that stable answers once, for how long it takes


class RowSplit:
    """Whose a row is: the canary's, if `traffic` gives it the row's key, in `column`.

    A canary that takes more than `PATIENCE` seconds for its rows of a batch, and more than `SLOWEST` times what stable would, is
    not asked again.
    """

    def __init__(self, canary: Side, traffic: TrafficSplit, column: str) -> None:
        self.canary = canary
        self.column = column
        self._traffic = traffic
        self._row_seconds: float | None = None  # stable's
        self._slow = False

    def answer(
        self, stable: Side, batch: pa.RecordBatch, timed: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> Answered:
        """As `answering.answer`, with `canary` and `instead`. The versions' output columns have the same names and types."""
        with timed("decode"):
            chosen = self.chosen(batch.column(self.column))
        theirs = np.flatnonzero(chosen)
        made = self._of_canary(stable, batch, theirs, timed)
        answered = theirs[made.rows]
        others = np.setdiff1d(np.arange(batch.num_rows), answered, assume_unique=True)
        if len(answered) and not len(others):
            return made._replace(canary=np.ones(len(answered), np.bool_))
        rest = answer(stable, batch.take(buffers.from_numpy(others)) if len(answered) else batch, timed)
        rows = others[rest.rows]
        refused = [Refused(int(others[r.row]), r.code, r.reason) for r in rest.refused]
        reasons = {int(theirs[r.row]): r.code for r in made.refused}
        instead = Counter(reasons[row] for row in rows[chosen[rows]].tolist())
        if not len(answered):
            return Answered(rows, rest.columns, refused, np.zeros(len(rows), np.bool_), instead)
        with timed("encode"):
            canary = np.arange(len(answered) + len(rows)) < len(answered)
            rows = np.concatenate([answered, rows])
            order = np.argsort(rows)
            at = buffers.from_numpy(order)
            columns = {name: pa.concat_arrays([made.columns[name], values]).take(at) for name, values in rest.columns.items()}
        return Answered(rows[order], columns, refused, canary[order], instead)

    def _of_canary(self, stable: Side, batch: pa.RecordBatch, theirs: NDArray[np.intp], timed: Callable[[str], Any]) -> Answered:
        """What it answers to its rows; it has refused all where it could not be asked."""
        code = DeadlineExceeded.code
        if len(theirs) and not self._slow:
            deadline = time.monotonic() + self._allowed(stable, batch, len(theirs))
            try:
                return answer(self.canary, batch.take(buffers.from_numpy(theirs)), timed, deadline=deadline, lenient=True)
            except MemoryError as error:  # of what stands around the model
                if batch.num_rows > 1:
                    raise  # a smaller batch may do
                code = self._failed(error, len(theirs))
            except Exception as error:  # noqa: BLE001 - whatever a canary does, stable answers
                self._slow = isinstance(error, DeadlineExceeded)
                code = self._failed(error, len(theirs))
        return Answered(np.arange(0), {}, [Refused(row, code, "") for row in range(len(theirs))])

    def _allowed(self, stable: Side, batch: pa.RecordBatch, rows: int) -> float:
        """Seconds that the canary may take for so many rows."""
        if self._row_seconds is None:
            some, began = batch.slice(0, TIMED_ROWS), time.perf_counter()
            answer(stable, some)
            self._row_seconds = (time.perf_counter() - began) / some.num_rows
        return max(PATIENCE, SLOWEST * self._row_seconds * rows)

    def _failed(self, error: Exception, rows: int) -> str:
        log.warning("the canary %s answered none of %d rows: %s", self.canary.predictor.manifest.ref, rows, error)
        return error.code if isinstance(error, TriformError) else TriformError.code

    def chosen(self, keys: pa.Array) -> NDArray[np.bool_]:
        """Of each row, whether it is the canary's."""
        if pa.types.is_dictionary(keys.type) and len(keys.dictionary) > len(keys):  # the whole file's words, for a few rows
            keys = keys.dictionary_decode()
        coded = keys if pa.types.is_dictionary(keys.type) else keys.dictionary_encode()
        words = _bytes(coded.dictionary).to_pylist()
        theirs = [word is not None and self._traffic.choose(key_of(word)) == self._traffic.canary for word in words]
        at = coded.indices.cast(pa.int64()).fill_null(len(words))
        return np.array([*theirs, False], np.bool_)[buffers.to_numpy(at)]


def _bytes(words: pa.Array) -> pa.Array:
    """Text as its bytes, which need not be UTF-8 in a Parquet file; anything else as it is."""
    if pa.types.is_string(words.type):
        return words.cast(pa.binary())
    return words.cast(pa.large_binary()) if pa.types.is_large_string(words.type) else words
