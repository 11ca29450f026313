"""The threads of dynamic batching: they go on with who waits, and nothing is lost where they or the event loop end."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.batchers import BAD, DynamicBatcher, Watched, one_by_one, watched, x, y
from tests.gates import Gate, settle, within
from triform import batching
from triform.errors import DeadlineExceeded, RunFailed
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array


def test_a_run_that_nobody_waits_for_any_more_is_not_begun(
    lookup: Predictor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "IN_A_ROW", 1)

    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        tasks = await one_by_one(batcher.infer({"x": np.array([i]).view(Watched)}) for i in range(3))
        gate.let_one()
        assert y(await tasks[0]) == [0.0]
        await settle()
        assert (gate.began, batcher.queued_rows) == (2, 0), "the others wait for a thread, together"
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        Watched.stacked.clear()
        gate.open.set()
        await batcher.drain()
        assert Watched.stacked == []
        assert y(await batcher.infer(x(2))) == [20.0], "its slot is free again"

    within(test())


def hold_the_loop_until(condition: Callable[[], bool]) -> None:
    """For ten seconds at most, in which nothing else happens there."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_thread_goes_on_with_who_waits_while_the_event_loop_is_busy(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_rows=2)
        tasks = await one_by_one(batcher.infer(watched(i)) for i in range(6))
        assert (gate.began, batcher.queued_rows) == (1, 5)
        gate.open.set()
        hold_the_loop_until(lambda: len(Watched.stacked) == 2)  # one alone, two together, and two; the last alone again
        assert not any(task.done() for task in tasks)
        answers = await asyncio.gather(*tasks)
        assert [(y(a), a.batch_rows, a.first) for a in answers] == [
            ([0.0], 1, True), ([10.0], 2, True), ([20.0], 2, False), ([30.0], 2, True), ([40.0], 2, False), ([50.0], 1, True),
        ]  # fmt: skip
        await batcher.drain()
        assert (gate.began, batcher.queued_rows, batcher.queued_bytes) == (1, 0, 0)

    Watched.stacked.clear()
    within(test())


@pytest.mark.parametrize("others", [0, 2])
def test_a_thread_passes_over_who_has_gone(lookup: Predictor, gate: Gate, others: int) -> None:
    async def test() -> None:
        now = 100.0
        batcher = DynamicBatcher(lookup, gate, clock=lambda: now)
        first = asyncio.create_task(batcher.infer(x(0)))
        await settle()
        gone, late = [asyncio.create_task(batcher.infer(watched(9), deadline=deadline)) for deadline in (None, 10_000.0)]
        kept = [asyncio.create_task(batcher.infer(watched(1))) for _ in range(others)]
        await settle()
        gone.cancel()
        now = 20_000.0
        gate.open.set()
        if others:
            hold_the_loop_until(lambda: len(Watched.stacked) == 1)
        assert [(y(a), a.batch_rows) for a in await asyncio.gather(*kept)] == [([10.0], 2)] * others
        with pytest.raises(DeadlineExceeded):
            await late
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert y(await first) == [0.0]
        await batcher.drain()
        assert (gate.began, batcher.queued_rows, batcher.queued_bytes) == (1, 0, 0)

    Watched.stacked.clear()
    within(test())


class Held(dict[str, Array]):
    """The inputs of a request, which who reads them waits for."""

    def __init__(self, *values: int) -> None:
        super().__init__(x(*values))
        self.read, self.open = threading.Event(), threading.Event()

    def __getitem__(self, name: str) -> Array:
        self.read.set()
        assert self.open.wait(10)
        return super().__getitem__(name)


def test_who_gives_up_while_rows_are_stacked_harms_nobody(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        held = Held(1)
        first, kept, gone = await one_by_one(batcher.infer(inputs) for inputs in (x(0), held, x(2)))
        gate.open.set()
        hold_the_loop_until(held.read.is_set)
        gone.cancel()
        await settle()
        assert batcher.queued_rows == 0
        held.open.set()
        assert [y(a) for a in await asyncio.gather(first, kept)] == [[0.0], [10.0]]

    within(test())


def test_a_thread_that_goes_on_keeps_nothing_of_those_it_has_answered(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        held, array = Held(1), np.array([0])
        kept = weakref.ref(array)
        tasks = await one_by_one(batcher.infer(inputs) for inputs in ({"x": array}, held, x(2)))
        del array
        gate.open.set()
        hold_the_loop_until(held.read.is_set)
        answer = await tasks[0]
        answered = weakref.ref(answer.outputs["y"])
        assert y(answer) == [0.0]
        del answer
        tasks.pop(0)
        await settle()
        assert (kept(), answered()) == (None, None)
        held.open.set()
        assert [y(a) for a in await asyncio.gather(*tasks)] == [[10.0], [20.0]]

    within(test())


def test_a_later_run_of_a_thread_may_fail(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_rows=2)
        tasks = await one_by_one(batcher.infer(x(i)) for i in (0, 1, 2, 3, BAD, 5, BAD, 7))
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [y(a) if isinstance(a, Ran) else type(a) for a in answers] == [
            [0.0], [10.0], [20.0], [30.0], RunFailed, [50.0], RunFailed, [70.0],
        ]  # fmt: skip
        await batcher.drain()
        assert (batcher.queued_rows, batcher.queued_bytes) == (0, 0)

    within(test())


def test_those_who_wait_come_after_each_of_a_failed_run(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        ended: list[int] = []
        batcher = DynamicBatcher(lookup, gate, max_rows=2)
        failing = [asyncio.create_task(batcher.infer(x(i))) for i in (5, BAD)]
        await settle()
        waiting = [asyncio.create_task(batcher.infer(x(i))) for i in range(4)]
        for i, task in enumerate([*failing, *waiting]):
            task.add_done_callback(lambda _, i=i: ended.append(i))  # type: ignore[misc]
        await settle()
        gate.open.set()
        answers = await asyncio.gather(*failing, *waiting, return_exceptions=True)
        assert [type(a) for a in answers] == [Ran, RunFailed] + [Ran] * 4
        assert ended == [*range(6)]
        await batcher.drain()

    within(test())


def test_a_busy_model_leaves_threads_to_others(lookup: Predictor, predictors: Callable[[str], Predictor]) -> None:
    async def test() -> None:
        with ThreadPoolExecutor(1) as threads:
            busy, other = (DynamicBatcher(predictor, threads, max_rows=1) for predictor in (lookup, predictors("wide")))
            (tensor,) = other.predictor.signature.inputs
            many = [asyncio.create_task(busy.infer(x(i % 10))) for i in range(20 * batching.IN_A_ROW)]
            await asyncio.create_task(other.infer({tensor.name: np.ones((1, 1), np.float32)}))  # who comes in the same turn
            assert sum(task.done() for task in many) < 3 * batching.IN_A_ROW
            await asyncio.gather(*many)
            await busy.drain()

    within(test())


def test_a_thread_ends_where_the_event_loop_is_no_more(lookup: Predictor) -> None:
    threads = Gate(1)

    async def test() -> None:
        batcher = DynamicBatcher(lookup, threads)
        for i in range(3):
            batcher.submit(watched(i), None)
            await settle()

    Watched.stacked.clear()
    within(test())
    threads.open.set()
    assert threads.submit(lambda: "another's").result(10) == "another's"
    assert Watched.stacked == [], "nobody waits for the other two"
    threads.shutdown()


def test_threads_that_are_no_more_are_told_of(lookup: Predictor) -> None:
    async def test() -> None:
        threads = ThreadPoolExecutor(1)
        threads.shutdown()
        batcher = DynamicBatcher(lookup, threads)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shutdown"):
                await batcher.infer(x(1))
        await batcher.drain()

    within(test())


def test_rows_are_stacked_in_the_thread_of_the_run(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        tasks = await one_by_one(batcher.infer({"x": np.array([i]).view(Watched)}) for i in range(3))
        gate.open.set()
        assert [(y(a), a.batch_rows) for a in await asyncio.gather(*tasks)] == [([0.0], 1), ([10.0], 2), ([20.0], 2)]
        assert Watched.stacked
        assert {name.rpartition("_")[0] for name in Watched.stacked} == {"gate"}

    within(test())
