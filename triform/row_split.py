"""One record batch answered by a stable version and its canary, each row by the version of its key, as callers online are.

    RecordBatch -> key column -> TrafficSplit -> the canary's rows -> answer --+-> in the rows' order, and who answered each
                                              -> all others --------> answer --+
                                    what the canary refuses or fails: stable's, too

A row without a key is stable's. Nobody pays for a bad canary here either: what it does not answer stable does, and a row that
both refuse has stable's reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from triform import buffers
from triform.answering import Answered, Side, answer
from triform.arrow import Refused
from triform.splitting import TrafficSplit, key_of

STABLE: Final = 0  # who answered a row
CANARY: Final = 1
INSTEAD: Final = 2  # stable, a row that is the canary's by its key


class RowSplit(NamedTuple):
    """Which rows are the canary's: those whose key, in `column`, `traffic` gives it."""

    canary: Side
    traffic: TrafficSplit
    column: str

    def answer(
        self, stable: Side, batch: pa.RecordBatch, timed: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> Answered:
        """As `answering.answer`, and `by`. The versions' output columns have the same names and types."""
        with timed("decode"):
            chosen = self.chosen(batch.column(self.column))
        theirs = np.flatnonzero(chosen)
        if not len(theirs):
            first = answer(stable, batch, timed)
            return first._replace(by=np.full(len(first.rows), STABLE, np.int8))
        made = answer(self.canary, batch.take(buffers.from_numpy(theirs)), timed)
        answered, refused = theirs[made.rows], [int(theirs[r.row]) for r in made.refused]
        others = np.setdiff1d(np.arange(batch.num_rows), answered, assume_unique=True)
        if not len(others):
            return made._replace(by=np.full(len(made.rows), CANARY, np.int8))
        rest = answer(stable, batch.take(buffers.from_numpy(others)), timed)
        with timed("encode"):
            return _together(answered, made, others, rest, instead=np.array(refused, np.intp))

    def chosen(self, keys: pa.Array) -> NDArray[np.bool_]:
        """Of each row, whether it is the canary's."""
        coded = keys if pa.types.is_dictionary(keys.type) else keys.dictionary_encode()
        words = coded.dictionary.to_pylist()
        theirs = [word is not None and self.traffic.choose(key_of(word)) == self.traffic.canary for word in words]
        at = coded.indices.fill_null(len(words))
        return np.array([*theirs, False], np.bool_)[buffers.to_numpy(at.cast(pa.int64()))]


def _together(
    answered: NDArray[np.intp], made: Answered, others: NDArray[np.intp], rest: Answered, *, instead: NDArray[np.intp]
) -> Answered:
    rows = np.concatenate([answered, others[rest.rows]])
    by = np.concatenate(
        [np.full(len(answered), CANARY, np.int8), np.where(np.isin(others[rest.rows], instead), INSTEAD, STABLE).astype(np.int8)]
    )
    order = np.argsort(rows)
    columns = {
        name: pa.concat_arrays([values, rest.columns[name]]).take(buffers.from_numpy(order))
        for name, values in made.columns.items()
    }
    refused = [Refused(int(others[r.row]), r.code, r.reason) for r in rest.refused]
    return Answered(rows[order], columns, refused, by[order])
