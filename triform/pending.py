"""Requests that wait for a model, and one run of some of them together.

Pending, Pending, ... -> together -> one run of the predictor -> each its own rows -> Run, as batching.py has it
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from triform.errors import DeadlineExceeded
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array, rows_of

_MANY_TEXTS: Final = 1 << 16
_TEXT_BYTES: Final = 64  # that each of more is taken for

Shapes = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]


class Pending:
    """A request in the queue or under way."""

    __slots__ = ("bytes", "deadline", "expiry", "future", "inputs", "rows", "shapes", "since", "taken", "waits", "weight")

    def __init__(self, inputs: Mapping[str, Array], deadline: float | None, since: float, future: asyncio.Future[Ran]) -> None:
        self.inputs = inputs
        self.rows = rows_of(inputs)
        self.weight = self.rows or 1  # in the queue: a request without rows takes its place there too
        self.bytes = 0
        self.deadline = deadline
        self.since = since
        self.future = future
        self.waits = True
        self.taken = False  # by a run, whose thread may read `inputs` at any time
        self.expiry: asyncio.TimerHandle | None = None
        shapes = []  # in the signature's order, as its `validate` gives them
        for name, array in inputs.items():
            self.bytes += array.nbytes if array.dtype.kind != "O" else _bytes_of_texts(array)
            shapes.append((name, array.dtype, array.shape[1:]))
        self.shapes: Shapes = tuple(shapes)


class Run(NamedTuple):
    """A run as it ended: `answers` of those who still waited for it, or an `error`; the CPU time of its thread, in seconds, and
    whether that was the event loop's.

    A run that failed says nothing of how long others take.
    """

    batch: list[Pending]
    answers: list[dict[str, Array]]
    error: BaseException | None
    began: float
    seconds: float
    here: bool = False


def together(predictor: Predictor, batch: Sequence[Pending], most: float, most_rows: int | None) -> list[dict[str, Array]]:
    """Each request's rows of one run of all; of several, one after another, where one alone has more than `most_rows` (None: than
    the package's most).

    `most`: seconds. It is the run's thread that stacks them, which takes long where they are large.
    """
    deadline = _latest(batch)
    if most < math.inf:
        deadline = min(deadline or math.inf, time.monotonic() + most)
    if len(batch) == 1:
        return [predictor.run(batch[0].inputs, deadline=deadline, most_rows=most_rows)]
    inputs = {name: np.concatenate([pending.inputs[name] for pending in batch]) for name in batch[0].inputs}
    outputs = predictor.run(inputs, deadline=deadline)
    ends = [*accumulate(pending.rows for pending in batch)]
    return [{name: array[start:end] for name, array in outputs.items()} for start, end in pairwise([0, *ends])]


def size_of(batch: Sequence[Pending]) -> tuple[int, int]:
    """Rows and bytes."""
    return sum(pending.rows for pending in batch), sum(pending.bytes for pending in batch)


def _bytes_of_texts(array: Array) -> int:
    """In memory; texts are not measured one by one where they are very many."""
    return array.nbytes + (sum(map(len, array.flat)) if array.size <= _MANY_TEXTS else _TEXT_BYTES * array.size)


def _latest(batch: Sequence[Pending]) -> float | None:
    """A run is ended when nobody can want it any more."""
    deadlines = [pending.deadline for pending in batch]
    return None if None in deadlines else max(d for d in deadlines if d is not None)


def expire(pending: Pending) -> None:
    fail(pending, DeadlineExceeded("the deadline passed before the model had answered"))


def fail(pending: Pending, error: Any) -> None:
    if not pending.future.done():
        pending.future.set_exception(error)
