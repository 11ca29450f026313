"""Work on large bodies and answers, done beside the event loop: one piece after another, in a thread.

    work -> queue -> the thread is free -> what ends a request first, then what begins one -> its result

One thread, because several would only contend for the interpreter. What would wait behind too much is refused; what is late or
given up is never begun. `OneByOne` is a `service.Aside`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, TypeVar

from triform.deadlines import check
from triform.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")
MAX_BYTES: Final = 128 << 20  # that may wait; as JSON they are read in some five seconds


class _Job:
    """A piece of work in its queue or under way."""

    def __init__(self, work: Callable[[], Any], size: int, deadline: float | None, future: asyncio.Future[Any]) -> None:
        self.work = work
        self.waits = True
        self.size = size
        self.deadline = deadline
        self.future = future

    def is_wanted(self) -> bool:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            _expire(self)
        return not self.future.done()


class _Queue:
    """Jobs in their order. `bytes`: of those that wait; one that is given up makes room at once, and lets its body go."""

    def __init__(self) -> None:
        self.bytes = 0
        self._jobs: deque[_Job] = deque()

    def put(self, job: _Job) -> None:
        self._jobs.append(job)
        self.bytes += job.size

    def take(self) -> _Job | None:
        """The first that is still wanted."""
        while self._jobs:
            job = self._jobs.popleft()
            if job.is_wanted():
                return job
        return None

    def leave(self, job: _Job) -> None:
        """It waits no longer, begun or given up."""
        if job.waits:
            job.waits = False
            self.bytes -= job.size
            job.work = _nothing


class OneByOne:
    """Belongs to one event loop. `executor` has one thread; `max_bytes` of bodies may wait, and as much of answers."""

    def __init__(self, executor: Executor, *, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._executor = executor
        self._busy = False
        self._urgent, self._others = _Queue(), _Queue()

    async def __call__(self, work: Callable[[], T], size: int, deadline: float | None, *, urgent: bool = False) -> T:
        """What `work` on so many bytes returns; `urgent`: it ends a request. What is under way at the deadline is not ended.

        Raises `Overloaded`, `DeadlineExceeded` when it comes, and what `work` raises.
        """
        check(deadline, "the request was queued")
        queue = self._urgent if urgent else self._others
        if queue.bytes and queue.bytes + size > self.max_bytes:
            raise Overloaded(f"{queue.bytes} bytes wait already, {self.max_bytes} may: send the request again later")
        loop = asyncio.get_running_loop()
        job = _Job(work, size, deadline, loop.create_future())
        expiry = None if deadline is None else loop.call_later(deadline - time.monotonic(), _expire, job)
        queue.put(job)
        self._begin()
        try:
            done: T = await job.future
            return done
        finally:
            if expiry is not None:
                expiry.cancel()
            queue.leave(job)

    def _begin(self) -> None:
        """Lets the thread do the next job, if it is free."""
        for queue in self._urgent, self._others:
            if not self._busy and (job := queue.take()) is not None:
                done = asyncio.get_running_loop().run_in_executor(self._executor, job.work)
                queue.leave(job)
                self._busy = True
                done.add_done_callback(partial(self._end, job))

    def _end(self, job: _Job, done: asyncio.Future[Any]) -> None:
        self._busy = False
        error = done.exception()
        if job.future.done():
            pass  # nobody wants it any more
        elif error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(done.result())
        self._begin()


def _nothing() -> None:
    """What is left of work that was given up."""


def _expire(job: _Job) -> None:
    if not job.future.done():
        job.future.set_exception(DeadlineExceeded("the deadline passed before the body or the answer was dealt with"))
