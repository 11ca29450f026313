"""Threads that wait until a test lets them go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Gate(ThreadPoolExecutor):
    """`began` counts what they were given; `open` lets it go on."""

    def __init__(self, threads: int = 4) -> None:
        super().__init__(threads, thread_name_prefix="gate")
        self.open = threading.Event()
        self.began = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.began += 1

        def wait() -> Any:
            assert self.open.wait(30), "the test never opened the gate"
            return work(*args, **options)

        return super().submit(wait)
