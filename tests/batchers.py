"""What tests of dynamic batching ask, and one batcher whose runs are all in threads, that a test can hold (tests/gates.py)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tests.gates import settle
from triform import batching
from triform.service import Ran
from triform.signature import Array

BAD = 99  # the model has ten entries
DynamicBatcher = partial(batching.DynamicBatcher, short=0.0)


def x(*values: int) -> dict[str, Array]:
    return {"x": np.array(values, dtype=np.int64)}


def y(answer: Ran) -> list[float]:
    return answer.outputs["y"].tolist()  # type: ignore[no-any-return]


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """Knows which threads stacked it."""

    stacked: ClassVar[list[str]] = []

    def __array_function__(self, *args: Any) -> Any:
        self.stacked.append(threading.current_thread().name)
        return super().__array_function__(*args)  # type: ignore[no-untyped-call]


def watched(*values: int) -> dict[str, Array]:
    return {"x": np.array(values).view(Watched)}


async def one_by_one(calls: Iterable[Coroutine[Any, Any, Ran]]) -> list[asyncio.Task[Ran]]:
    """Each in a turn of the event loop of its own."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.create_task(call))
        await settle()
    return tasks
