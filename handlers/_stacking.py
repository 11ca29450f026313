"""Which messages' rows are one run of the model, in which order the runs are made, and how long each may take.

    questions -> Runs -> group, seconds -> one run for the group
                 split(group) <- it failed, or took too long: each of its messages is a run of its own

Of a standard queue the lightest run is made first, and none may take more than its share of the time that is left: one that needs
too long leaves the others theirs. Of a FIFO queue the messages keep their order, and nothing behind a message could be answered
without it, so it may take what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import groupby
from typing import Any, Final

from handlers._messages import Question
from triform.signature import rows_of

MOST_SHARES: Final = 10  # a run may take a tenth of the time at least, or a busy machine would fail small ones


class Runs:
    """The runs that are still to be made. `fifo`: in the order of the messages, and only neighbours are one run."""

    def __init__(self, questions: Sequence[Question], *, fifo: bool) -> None:
        self.fifo = fifo
        self._waiting: list[tuple[int, int, list[Question]]] = []
        for _, group in groupby(questions if fifo else sorted(questions, key=_kind), _kind):
            self._add(list(group))

    def _add(self, group: list[Question]) -> None:
        rows = 0 if self.fifo else sum(rows_of(question.inputs) for question in group)
        heappush(self._waiting, (rows, group[0].work.place, group))

    def __iter__(self) -> Iterator[list[Question]]:
        while self._waiting:
            yield heappop(self._waiting)[-1]

    def split(self, group: Sequence[Question]) -> None:
        for question in group:
            self._add([question])

    def share(self, group: Sequence[Question], left: float) -> float:
        """Of the seconds that are left, those that the group may take: where it is split, its messages need some too."""
        others = 0 if self.fifo else len(self._waiting)
        return left / min(1 + others + (len(group) > 1), MOST_SHARES)


def _kind(question: Question) -> tuple[Any, ...]:
    """Alike for messages whose rows can be one run: of one version, and of one shape."""
    shapes = [(name, array.shape[1:], array.dtype.kind) for name, array in question.inputs.items()]
    return question.served.manifest.ref, *shapes
