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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from triform import buffers
from triform.answering import Answered, Side, answer
from triform.arrow import Refused
from triform.errors import DeadlineExceeded
from triform.splitting import TrafficSplit, key_of

log = logging.getLogger(__name__)

STABLE: Final = 0  # who answered a row
CANARY: Final = 1
INSTEAD: Final = 2  # stable, a row that is the canary's by its key
PATIENCE: Final = 60.0  # seconds for a batch's rows; a canary that takes longer is not asked again


class RowSplit:
    """Whose a row is: the canary's, if `traffic` gives it the row's key, in `column`."""

    def __init__(self, canary: Side, traffic: TrafficSplit, column: str) -> None:
        self.canary = canary
        self.column = column
        self._traffic = traffic
        self._slow = False

    def answer(
        self, stable: Side, batch: pa.RecordBatch, timed: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> Answered:
        """As `answering.answer`, and `by`. The versions' output columns have the same names and types."""
        with timed("decode"):
            chosen = self.chosen(batch.column(self.column))
        theirs = np.flatnonzero(chosen)
        made = self._of_canary(batch, theirs, timed) if len(theirs) else None
        answered = theirs[made.rows] if made is not None else theirs[:0]
        others = np.setdiff1d(np.arange(batch.num_rows), answered, assume_unique=True)
        if made is not None and not len(others):
            return made._replace(by=np.full(len(answered), CANARY, np.int8))
        rest = answer(stable, batch.take(buffers.from_numpy(others)) if len(answered) else batch, timed)
        rows = others[rest.rows]
        by = np.where(chosen[rows], INSTEAD, STABLE).astype(np.int8)
        refused = [Refused(int(others[r.row]), r.code, r.reason) for r in rest.refused]
        if made is None or not len(answered):
            return Answered(rows, rest.columns, refused, by)
        with timed("encode"):
            rows, by = np.concatenate([answered, rows]), np.concatenate([np.full(len(answered), CANARY, np.int8), by])
            order = np.argsort(rows)
            at = buffers.from_numpy(order)
            columns = {name: pa.concat_arrays([made.columns[name], values]).take(at) for name, values in rest.columns.items()}
        return Answered(rows[order], columns, refused, by[order])

    def _of_canary(self, batch: pa.RecordBatch, theirs: NDArray[np.intp], timed: Callable[[str], Any]) -> Answered | None:
        """What it answers to its rows; None: nothing, whatever it did."""
        if self._slow:
            return None
        rows = batch.take(buffers.from_numpy(theirs))
        try:
            return answer(self.canary, rows, timed, deadline=time.monotonic() + PATIENCE)
        except MemoryError:  # not the model's own, which it has tried to do with down to one row
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self._slow = isinstance(error, DeadlineExceeded)
            log.warning("the canary %s answered none of %d rows: %s", self.canary.predictor.manifest.ref, len(theirs), error)
            return None

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
