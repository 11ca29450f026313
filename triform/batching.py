"""Dynamic batching: requests that wait for the model are run together, and nobody waits for company.

    infer(arrays) -> queue -> a free slot takes what is there, up to max_rows -> one run in a thread -> each its own rows
                                                                                 (or here, if it is shorter than that takes)

It conserves work: a request that finds a free slot runs in this turn of the event loop, beside those that came in it; while all
slots are busy the queue grows, and the slot that is free next takes as much of it as fits: the very thread whose run has ended,
before anybody is told. So batches grow with the load, and no window of time has to be chosen. A run that raises is tried again
request by request, so that only the request at fault gets the error. A request is never cut apart unless it is larger than a run
may be: it runs alone then, in several runs one after another. Rows of a `dependent` model are never run beside a stranger's.

Runs are in threads, so that the event loop goes on, but for those that take no longer than the way to a thread and back: they are
made on the loop itself, one a turn and model (pace.py). One that takes long after all is ended and made again in a thread.

batched.py is this for all the versions that a service has.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import Final, NamedTuple

from triform.errors import DeadlineExceeded, Overloaded, ResourceExhausted, TriformError
from triform.pace import SHORT, Pace
from triform.pending import Pending, Run, expire, fail, size_of, together
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array

MAX_ROWS: Final = 128  # of one run, where nothing else is said
MAX_QUEUE_ROWS: Final = 4096
MAX_QUEUE_BYTES: Final = 256 << 20
IN_A_ROW: Final = 16  # runs of one model by one thread, before others that wait for one have their turn
LONGEST: Final = 0.02  # seconds that a run may keep the event loop, should it take longer than it was known for


class Taken(NamedTuple):
    """Who is run together, and who was passed over: their callers have gone, or their time is up."""

    batch: list[Pending]
    passed: list[Pending]


class DynamicBatcher:
    """Batches the requests for one predictor. Belongs to one event loop.

    `slots`: runs at the same time, each in a thread of `executor`. `max_rows`: of one run; a request that has more is cut there
    if it `cuts`, else only where the package says. `max_queue_rows`, `max_queue_requests`, `max_queue_bytes` (of their inputs):
    that may wait; `max_requests`: that may wait or run; beyond them `Overloaded` is raised. `short`: seconds, as of `Pace`.
    `clock` is `time.monotonic`, as deadlines are.
    """

    def __init__(
        self,
        predictor: Predictor,
        executor: Executor,
        *,
        slots: int = 1,
        max_rows: int = MAX_ROWS,
        cuts: bool = True,
        max_queue_rows: int = MAX_QUEUE_ROWS,
        max_queue_requests: int = MAX_QUEUE_ROWS,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        max_requests: int = sys.maxsize,
        short: float = SHORT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.predictor = predictor
        self.max_rows = max_rows
        self.max_queue_rows = max_queue_rows
        self.max_queue_requests = max_queue_requests
        self.max_queue_bytes = max_queue_bytes
        self.max_requests = max_requests
        self.requests = 0  # that are neither answered nor given up
        self.queued_rows = self.queued_requests = self.queued_bytes = 0
        self._most_rows = max_rows if cuts else None
        self._alone = predictor.independence == "dependent"
        self._executor = executor
        self._slots = self._free = slots
        self._queue: deque[Pending] = deque()
        self._taking = threading.Lock()  # who takes from the queue has it
        self._fresh: list[Pending] = []  # who came in this turn of the event loop
        self._drained: asyncio.Future[None] | None = None
        self._clock = clock
        self._pace = Pace(predictor, short)
        self._fills_soon = False

    async def infer(self, inputs: Mapping[str, Array], *, deadline: float | None = None) -> Ran:
        """The answer for arrays that fit the signature (`Signature.validate`), all with the same number of rows.

        Raises `Overloaded`, `DeadlineExceeded` (also while the request waits or runs) and what `Predictor.run` raises. A request
        that is cancelled is not run, unless it runs already; then its answer is dropped.
        """
        return await self.submit(inputs, deadline)

    def submit(self, inputs: Mapping[str, Array], deadline: float | None) -> asyncio.Future[Ran]:
        """The same: what `infer` awaits, which may be cancelled. Raises `Overloaded`, and `DeadlineExceeded` if that is now."""
        now = self._clock()
        if deadline is not None and now >= deadline:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        pending = Pending(inputs, deadline, now, asyncio.get_running_loop().create_future())
        if self.requests >= self.max_requests:
            raise Overloaded(
                f"{self.requests} requests wait or run already, {self.max_requests} may: send the request again later"
            )
        if self.queued_rows:
            self._check_room(pending)
        self._queue.append(pending)
        self.requests += 1
        self.queued_rows += pending.weight
        self.queued_requests += 1
        self.queued_bytes += pending.bytes
        self._fresh.append(pending)
        if not self._free:
            self._watch()
        elif not self._fills_soon:
            self._fill_soon()
        return pending.future

    def _watch(self) -> None:
        """Those who wait beyond this turn of the event loop are told when their time is up; most need not wait so long."""
        now = self._clock()
        for pending in self._fresh:
            if pending.future.done():
                self._gone(pending)
                continue
            if pending.deadline is not None:
                pending.expiry = asyncio.get_running_loop().call_later(pending.deadline - now, expire, pending)
            pending.future.add_done_callback(partial(self._gone, pending))
        self._fresh.clear()

    def _gone(self, pending: Pending, _: asyncio.Future[Ran] | None = None) -> None:
        """Answered, failed or cancelled."""
        self.requests -= 1
        if pending.expiry is not None:
            pending.expiry.cancel()
        self._leave(pending)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self._free == self._slots and not self._queue

    @property
    def waiting_seconds(self) -> float:
        """How long the head of the queue has waited; 0 where nobody waits."""
        with self._taking:
            return self._clock() - self._queue[0].since if self._queue else 0.0

    async def drain(self) -> None:
        """Waits until nothing waits or runs."""
        while not self.idle:
            self._drained = self._drained or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def _check_room(self, pending: Pending) -> None:
        """Raises `Overloaded`. One request may wait, however large; those who wait for the end of this turn only need not."""
        if self._is_full(pending):
            self._fill_slots(here=False)
            if full := self._is_full(pending):
                raise Overloaded(f"{full}: send the request again later")

    def _is_full(self, pending: Pending) -> str | None:
        if self.queued_rows and self.queued_rows + pending.weight > self.max_queue_rows:
            return f"{self.queued_rows} rows wait already, {self.max_queue_rows} may"
        if self.queued_requests >= self.max_queue_requests:
            return f"{self.queued_requests} requests wait already, {self.max_queue_requests} may"
        if self.queued_rows and self.queued_bytes + pending.bytes > self.max_queue_bytes:
            return f"{self.queued_bytes} bytes wait already, {self.max_queue_bytes} may"
        return None

    def _fill_soon(self) -> None:
        """In this turn of the event loop, after those who come in it, too."""
        if not self._fills_soon:
            self._fills_soon = True
            asyncio.get_running_loop().call_soon(self._end_of_turn)

    def _end_of_turn(self) -> None:
        self._fills_soon = False
        self._fill_slots()

    def _fill_slots(self, *, here: bool = True) -> None:
        """One run of them at most on the event loop itself, if at all; other slots have their turn after it."""
        while self._free and (batch := self._took(self._take())):
            self._free -= 1
            if here and self._pace.is_short(*size_of(batch)):
                self._run_here(batch)
                break
            self._begin(batch, deque())
        self._watch()
        self._tell_if_drained()

    def _take(self) -> Taken:
        """The requests at the head of the queue that fit in one run. In any thread; `_took` follows on the event loop."""
        batch, passed = list[Pending](), list[Pending]()
        rows, now = 0, self._clock()
        with self._taking:
            while self._queue:
                head = self._queue[0]
                if not _is_wanted(head, now):
                    passed.append(self._queue.popleft())
                    continue
                if batch and not self._fits(head, batch[0], rows):
                    break
                batch.append(self._queue.popleft())
                head.taken = True
                rows += head.rows
        return Taken(batch, passed)

    def _took(self, taken: Taken) -> list[Pending]:
        """They wait no longer. The batch."""
        for pending in taken.passed:
            expire(pending)
            self._leave(pending)
        for pending in taken.batch:
            self._leave(pending)
        return taken.batch

    def _leave(self, pending: Pending) -> None:
        """It waits no longer, taken or given up: its rows make room at once; one given up is passed over when its turn comes."""
        if pending.waits:
            pending.waits = False
            self.queued_rows -= pending.weight
            self.queued_requests -= 1
            self.queued_bytes -= pending.bytes
            if pending.future.done() and not pending.taken:
                pending.inputs = {}

    def _fits(self, head: Pending, first: Pending, rows: int) -> bool:
        """Whether the request may run beside those that are taken, which have so many rows."""
        return not self._alone and rows + head.rows <= self.max_rows and head.shapes == first.shapes

    def _begin(self, batch: list[Pending], rest: deque[Pending]) -> None:
        """One run in a thread, in a slot that is taken already; `rest` have it afterwards, one by one. `batch`: in it are always
        those whom the thread has at the time.

        No task waits for the run and no future of the event loop stands for it: each would cost all of the batch another turn
        of the loop.
        """
        loop, goes_on = asyncio.get_running_loop(), threading.Event()
        try:
            run = self._executor.submit(self._runs, loop, batch, goes_on)
        except RuntimeError as error:  # the threads are no more
            loop.call_soon(self._end, batch, rest, _failed(error))
            return
        if not rest:
            goes_on.set()
        run.add_done_callback(partial(_call, loop, self._end, batch, rest))

    def _runs(self, loop: asyncio.AbstractEventLoop, batch: list[Pending], goes_on: threading.Event) -> Run:
        """In a thread: the run, then one of those who wait by now, and so on; returns the last, of the others the loop is told.

        So the next run waits neither until this one is answered nor until another thread begins it. It ends after a run that
        failed, as the slot is then for each of its requests alone, and goes on only if the slot is known to be its own: `submit`
        may raise and run all the same.
        """
        run = self._run(batch)
        for _ in range(IN_A_ROW - 1):
            if not goes_on.is_set() or run.error is not None or self._pace.is_short(*size_of(run.batch)):
                break
            taken = self._take()
            if not taken.batch and taken.passed:
                _call(loop, self._took, taken)
            if not taken.batch or not _call(loop, self._went_on, run, taken):
                break
            batch[:] = taken.batch
            del run, taken  # which would keep in memory what is answered
            run = self._run(batch)
        return run

    def _went_on(self, run: Run, taken: Taken) -> None:
        """The thread of this run goes on with those."""
        self._took(taken)
        self._answer(run)

    def _run(self, batch: Sequence[Pending], most: float = math.inf) -> Run:
        """In any thread, for so many seconds at most. Who has gone meanwhile is left out."""
        began, cpu, here = self._clock(), time.thread_time(), most < math.inf
        wanted, answers = [pending for pending in batch if not pending.future.done()], list[dict[str, Array]]()
        error: BaseException | None = None
        try:
            if wanted:
                answers = together(self.predictor, wanted, most, self._most_rows)
        except BaseException as raised:  # it is each request's
            if here and not isinstance(raised, Exception):
                raise
            error = raised
            if isinstance(raised, MemoryError | ResourceExhausted):
                _forget_frames(raised)
        return Run(wanted, answers, error, began, time.thread_time() - cpu, here=here)

    def _end(self, batch: Sequence[Pending], rest: deque[Pending], ran: Future[Run]) -> None:
        """Of a run in a thread: the slot is free again, if none of `rest` needs it."""
        error = CancelledError("the run was cancelled") if ran.cancelled() else ran.exception()
        if self._is_over(ran.result() if error is None else Run([*batch], [], error, self._clock(), 0.0), rest):
            self._free += 1
            self._fill_slots()

    def _run_here(self, batch: Sequence[Pending]) -> None:
        """The same on the event loop, for a run that takes no longer than the way to a thread; the next is in another turn.

        One that takes long all the same is ended, as far as ONNX Runtime can (between nodes), and made again in a thread.
        """
        run = self._run(batch, LONGEST)
        if isinstance(run.error, DeadlineExceeded):
            self._pace.ran(*size_of(run.batch), LONGEST, here=True)
            self._begin(run.batch, deque())
        elif self._is_over(run, deque()):
            self._free += 1
        self._fill_soon()

    def _is_over(self, run: Run, rest: deque[Pending]) -> bool:
        """Each request gets its rows; those of a run that raised are run again one by one, so that each gets its own error.

        Returns whether nobody is left who needs the slot.
        """
        if run.error is None:
            self._answer(run)
        elif isinstance(run.error, TriformError | MemoryError) and len(run.batch) > 1:
            rest.extend(run.batch)
        else:
            for pending in run.batch:
                fail(pending, run.error)
        while rest and not _is_wanted(rest[0], self._clock()):
            expire(rest.popleft())
        if rest:
            self._begin([rest.popleft()], rest)
            return False
        return True

    def _tell_if_drained(self) -> None:
        if self.idle and self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def _answer(self, run: Run) -> None:
        if run.batch:
            self._pace.ran(*size_of(run.batch), run.seconds, here=run.here)
        rows, first = sum(pending.rows for pending in run.batch), True
        for pending, outputs in zip(run.batch, run.answers, strict=True):
            if not pending.future.done():
                pending.future.set_result(Ran(outputs, rows, run.began - pending.since, first=first))
                first = False


def _forget_frames(error: BaseException | None) -> None:
    """They hold what there was too much of, and the requests are to be run again, one by one."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _is_wanted(pending: Pending, now: float) -> bool:
    return not pending.future.done() and (pending.deadline is None or now < pending.deadline)


def _call(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> bool:
    """From a run's thread; False where the loop is closed, and nobody is left to be told."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        return False
    return True


def _failed(error: Exception) -> Future[Run]:
    run: Future[Run] = Future()
    run.set_exception(error)
    return run
