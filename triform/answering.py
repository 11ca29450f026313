"""One record batch -> the answers of the rows that can be answered, and the other rows with their reasons.

    RecordBatch -> encode (arrow.py) -> Predictor.run, in halves where it raises -> columns
                   rows that do not fit    rows that make a run fail -> refused

What a batch job's part (`scoring.py`) and a stage of somebody's own pipeline have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from triform import arrow
from triform.arrow import Refused
from triform.errors import ResourceExhausted, RunFailed
from triform.features import Features
from triform.predictor import Predictor, joined
from triform.signature import Array, rows_of


class Answered(NamedTuple):
    """`columns` hold the answers of `rows` (numbers within the batch, rising); `refused` are the others."""

    rows: NDArray[np.intp]
    columns: dict[str, pa.Array]
    refused: list[Refused]


def answer(
    predictor: Predictor,
    features: Features,
    batch: pa.RecordBatch,
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Answered:
    """Answers a batch that has (at least) the model's columns; `timed` is entered with "decode", "predict" and "encode".

    Raises `InvalidInput` for a fault of the schema, `ResourceExhausted` where one row alone is too much for the memory.
    """
    with timed("decode"):
        encoded = arrow.encode(features, batch)
    rows = np.arange(batch.num_rows) if encoded.keep is None else np.flatnonzero(encoded.keep)
    with timed("predict"):
        outputs, failed = predict_isolating(predictor, encoded.inputs)
    refused = encoded.refused
    if failed:
        refused = [*refused, *(Refused(int(rows[at]), code, reason) for at, code, reason in failed)]
        rows = np.delete(rows, [at for at, _, _ in failed])
    with timed("encode"):
        return Answered(rows, arrow.to_arrow(features, outputs), refused)


def predict_isolating(predictor: Predictor, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], list[tuple[int, str, str]]]:
    """The answers of the rows that can be answered, and (row, code, reason) of those that make a run fail.

    A run that raises is tried again in halves until the rows at fault stand alone.
    """
    answered: list[dict[str, Array]] = []
    failed: list[tuple[int, str, str]] = []
    _halve(predictor, inputs, 0, rows_of(inputs), answered, failed)
    return joined(answered or [predictor.run({n: a[:0] for n, a in inputs.items()})]), failed


def _halve(
    predictor: Predictor,
    inputs: Mapping[str, Array],
    start: int,
    stop: int,
    answered: list[dict[str, Array]],
    failed: list[tuple[int, str, str]],
) -> None:
    try:
        answered.append(predictor.run({n: a[start:stop] for n, a in inputs.items()}))
    except (RunFailed, ResourceExhausted) as error:
        if stop - start > 1:
            middle = (start + stop) // 2
            _halve(predictor, inputs, start, middle, answered, failed)
            _halve(predictor, inputs, middle, stop, answered, failed)
        elif isinstance(error, ResourceExhausted):
            raise  # memory that one row does not get is the machine's trouble, not the row's
        else:
            failed.append((start, error.code, str(error)))
