"""One record batch -> the answers of the rows that can be answered, and the other rows with their reasons.

    RecordBatch -> encode (arrow.py) -> Predictor.run, in halves where it raises -> columns
                   rows that do not fit    rows that make a run fail -> refused

What a batch job's part (`scoring.py`), its comparison with another version (`comparing.py`) and a stage of somebody's own
pipeline have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from triform import arrow, buffers
from triform.arrow import Refused
from triform.errors import ResourceExhausted, RunFailed
from triform.features import Features
from triform.predictor import Predictor, joined
from triform.signature import Array, rows_of
from triform.sources import Unread

SLOWEST: Final = 20.0  # a candidate may take so many times as long as a run's own version, ...
PATIENCE: Final = 60.0  # ... or so many seconds


class Side(NamedTuple):
    """A version with its column mapping."""

    predictor: Predictor
    features: Features

    @classmethod
    def of(cls, predictor: Predictor) -> Side:
        return cls(predictor, Features(predictor.signature, predictor.manifest.config))


class Answered(NamedTuple):
    """`columns` hold the answers of `rows` (numbers within the batch, rising); `refused` are the others.

    Where rows are split (`row_split.py`), `canary` says of each of `rows` whether it is the canary's answer, and `instead` how
    many of its rows stable has answered, by the code for which it had not.
    """

    rows: NDArray[np.intp]
    columns: dict[str, pa.Array]
    refused: list[Refused]
    canary: NDArray[np.bool_] | None = None
    instead: Mapping[str, int] = {}


def answer(
    side: Side,
    batch: pa.RecordBatch,
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
    *,
    deadline: float | None = None,
    lenient: bool = False,
) -> Answered:
    """Answers a batch that has (at least) the model's columns; `timed` is entered with "decode", "predict" and "encode".

    `deadline`: a `time.monotonic()` after which the model is stopped. `lenient`: rows for which memory does not suffice are
    refused, too. Raises `InvalidInput` for a fault of the schema,
    `ResourceExhausted` where one row alone is too much for the memory, `DeadlineExceeded`.
    """
    predictor, features = side
    with timed("decode"):
        encoded = arrow.encode(features, batch)
    rows = np.arange(batch.num_rows) if encoded.keep is None else np.flatnonzero(encoded.keep)
    with timed("predict"):
        outputs, failed = predict_isolating(predictor, encoded.inputs, deadline, lenient=lenient)
    refused = encoded.refused
    if failed:
        refused = [*refused, *(Refused(int(rows[at]), code, reason) for at, code, reason in failed)]
        rows = np.delete(rows, [at for at, _, _ in failed])
    with timed("encode"):
        return Answered(rows, arrow.to_arrow(features, outputs), refused)


def answer_read(
    ask: Callable[[pa.RecordBatch], Answered], batch: pa.RecordBatch, start: int, unread: Mapping[int, Unread]
) -> Answered:
    """What `ask` answers to a batch of a file. `start`: its first row's number there; rows that are `unread` are not asked for
    any."""
    known = [row for row in range(batch.num_rows) if start + row in unread] if unread else []
    if not known:
        return ask(batch)
    others = np.delete(np.arange(batch.num_rows), known)
    made = ask(batch.take(buffers.from_numpy(others)))
    told = [Refused(row, unread[start + row].code, unread[start + row].reason) for row in known]
    return made._replace(rows=others[made.rows], refused=[*told, *(r._replace(row=int(others[r.row])) for r in made.refused)])


def predict_isolating(
    predictor: Predictor, inputs: Mapping[str, Array], deadline: float | None = None, *, lenient: bool = False
) -> tuple[dict[str, Array], list[tuple[int, str, str]]]:
    """The answers of the rows that can be answered, and (row, code, reason) of those that make a run fail.

    A run that raises is tried again in halves until the rows at fault stand alone.
    """
    answered: list[dict[str, Array]] = []
    failed: list[tuple[int, str, str]] = []
    _halve(predictor, inputs, 0, rows_of(inputs), answered, failed, deadline, lenient)
    return joined(answered or [predictor.run({n: a[:0] for n, a in inputs.items()})]), failed


def _halve(
    predictor: Predictor,
    inputs: Mapping[str, Array],
    start: int,
    stop: int,
    answered: list[dict[str, Array]],
    failed: list[tuple[int, str, str]],
    deadline: float | None,
    lenient: bool,
) -> None:
    try:
        answered.append(predictor.run({n: a[start:stop] for n, a in inputs.items()}, deadline=deadline))
    except (RunFailed, ResourceExhausted) as error:
        if stop - start > 1:
            middle = (start + stop) // 2
            _halve(predictor, inputs, start, middle, answered, failed, deadline, lenient)
            _halve(predictor, inputs, middle, stop, answered, failed, deadline, lenient)
        elif isinstance(error, ResourceExhausted) and not lenient:
            raise  # memory that one row does not get is the machine's trouble, not the row's
        else:
            failed.append((start, error.code, str(error)))
