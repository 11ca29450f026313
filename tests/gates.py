"""Threads that wait until a test lets them go, and event loops beside them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Gate(ThreadPoolExecutor):
    """`began` counts what they were given; `open` lets all of it go on, `let_one` the next."""

    def __init__(self, threads: int = 4) -> None:
        super().__init__(threads, thread_name_prefix="gate")
        self.open = threading.Event()
        self.began = 0
        self._tickets = threading.Semaphore(0)

    def let_one(self) -> None:
        self._tickets.release()

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.began += 1

        def wait() -> Any:
            for _ in range(3000):
                if self.open.is_set() or self._tickets.acquire(timeout=0.01):
                    return work(*args, **options)
            raise AssertionError("the test never opened the gate")

        return super().submit(wait)


async def settle() -> None:
    """Lets all that can go on without a thread go on."""
    for _ in range(5):
        await asyncio.sleep(0)


def within(test: Awaitable[None]) -> None:
    """Runs the test, for a minute at most."""

    async def bounded() -> None:
        await asyncio.wait_for(test, 60)

    asyncio.run(bounded())
