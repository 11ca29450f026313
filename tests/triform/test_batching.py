"""Dynamic batching on a real event loop with a real model; the threads that run it wait until a test lets them go."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.gates import Gate, settle, within
from triform import batching, testing
from triform.batched import Batched, BatchOptions
from triform.errors import DeadlineExceeded, Overloaded, RunFailed
from triform.features import Features
from triform.models import Served
from triform.pace import Pace
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array

BAD = 99  # the model has ten entries
DynamicBatcher = partial(batching.DynamicBatcher, short=0.0)  # all runs in threads, that a test can hold


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Predictor]:
    folder = tmp_path_factory.mktemp("batching")
    models: dict[str, Path] = {
        "lookup": testing.lookup(folder / "lookup.onnx"),
        "centred": testing.centred(folder / "centred.onnx"),
        "wide": testing.identity(folder / "wide.onnx", "FP32", shape=("N", "width")),
        "slow": testing.slow(folder / "slow.onnx"),
        "text": testing.identity(folder / "text.onnx", "BYTES"),
    }
    repository = testing.repository(folder / "models", models)
    loaded: dict[str, Predictor] = {}

    def load(name: str) -> Predictor:
        if name not in loaded:
            loaded[name] = Predictor.load(repository.package(name, 1))
        return loaded[name]

    return load


@pytest.fixture
def lookup(predictors: Callable[[str], Predictor]) -> Predictor:
    return predictors("lookup")


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        yield gate
        gate.open.set()


def x(*values: int) -> dict[str, Array]:
    return {"x": np.array(values, dtype=np.int64)}


def y(answer: Ran) -> list[float]:
    return answer.outputs["y"].tolist()  # type: ignore[no-any-return]


def test_a_free_slot_runs_a_request_at_once_and_a_busy_one_drains_the_queue(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_rows=4)
        first = asyncio.create_task(batcher.infer(x(1)))
        await settle()
        assert gate.began == 1
        others = [asyncio.create_task(batcher.infer(x(*values))) for values in ([2, 3], [4], [5], [6, 7, 8, 9, 0], [1])]
        await settle()
        assert (gate.began, batcher.queued_rows) == (1, 10)
        gate.open.set()
        answers = await asyncio.gather(first, *others)
        assert [y(a) for a in answers] == [[10.0], [20.0, 30.0], [40.0], [50.0], [60.0, 70.0, 80.0, 90.0, 0.0], [10.0]]
        assert [a.batch_rows for a in answers] == [1, 4, 4, 4, 5, 1]  # five rows are more than a run takes, and not cut apart
        assert batcher.queued_rows == 0
        await batcher.drain()

    within(test())


def test_two_slots_run_at_the_same_time(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, slots=2)
        waiting = await one_by_one(batcher.infer(x(i)) for i in range(5))
        assert gate.began == 2
        gate.open.set()
        assert sorted([a.batch_rows for a in await asyncio.gather(*waiting)]) == [1, 1, 3, 3, 3]

    within(test())


def test_only_the_request_at_fault_gets_the_error(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        waiting = [asyncio.create_task(batcher.infer(x(*v))) for v in ([0], [1, 2], [BAD], [3], [4, BAD])]
        await settle()
        gate.open.set()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [y(a) if isinstance(a, Ran) else type(a) for a in answers] == [
            [0.0], [10.0, 20.0], RunFailed, [30.0], RunFailed,
        ]  # fmt: skip
        assert y(await batcher.infer(x(5))) == [50.0]

    within(test())


def test_a_run_that_no_memory_is_left_for_is_tried_again_request_by_request(
    lookup: Predictor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(_: object) -> Array:
        raise MemoryError

    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        waiting = [asyncio.create_task(batcher.infer(x(i))) for i in range(3)]
        await settle()
        monkeypatch.setattr(np, "concatenate", too_much)
        gate.open.set()
        assert [y(answer) for answer in await asyncio.gather(*waiting)] == [[0.0], [10.0], [20.0]]

    within(test())


def test_so_many_requests_may_wait_whatever_their_rows(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batched = Batched(gate, {"lookup": BatchOptions(max_rows=1)}, max_queue_requests=2, short=0.0)
        batcher = batched.batcher(lookup)
        first = await one_by_one([batcher.infer(x(0))])
        waiting = await one_by_one(batcher.infer(x(i)) for i in (1, 2))
        with pytest.raises(Overloaded, match="2 requests wait already, 2 may"):
            await batcher.infer(x(3))
        waiting.pop().cancel()
        await settle()
        waiting += await one_by_one([batcher.infer(x(4))])
        assert batcher.queued_requests == 2, "who has gone makes room"
        gate.open.set()
        assert [y(answer) for answer in await asyncio.gather(*first, *waiting)] == [[0.0], [10.0], [40.0]]
        assert batcher.queued_requests == 0
        own = Batched(gate, {"lookup": BatchOptions(max_queue_requests=7)}, max_queue_requests=2)
        assert own.batcher(lookup).max_queue_requests == 7

    within(test())


def test_who_is_cancelled_or_late_is_never_run_and_harms_nobody(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        now = 100.0
        batcher = DynamicBatcher(lookup, gate, clock=lambda: now)
        first = asyncio.create_task(batcher.infer(x(0)))
        await settle()
        gone, late, kept, patient = (
            asyncio.create_task(batcher.infer(x(i), deadline=deadline))
            for i, deadline in enumerate([None, 130.0, None, 160.0], 1)
        )
        await settle()
        gone.cancel()
        now = 150.0
        gate.open.set()
        assert (y(await first), y(await kept), y(await patient)) == ([0.0], [30.0], [40.0])
        assert (await kept).batch_rows == 2
        for task, error in (gone, asyncio.CancelledError), (late, DeadlineExceeded):
            with pytest.raises(error):
                await task
        with pytest.raises(DeadlineExceeded):
            await batcher.infer(x(1), deadline=149.0)
        assert batcher.queued_rows == 0

    within(test())


def test_a_deadline_is_told_when_it_comes_not_when_the_slot_is_free(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        first = asyncio.create_task(batcher.infer(x(0)))
        await settle()
        with pytest.raises(DeadlineExceeded):
            await batcher.infer(x(1), deadline=time.monotonic() + 0.02)
        assert not first.done()
        gate.open.set()
        assert y(await first) == [0.0]
        await batcher.drain()
        assert gate.began == 1

    within(test())


def test_who_starts_at_once_is_told_as_well(lookup: Predictor, gate: Gate) -> None:
    """And who waits behind him since the same turn of the event loop."""

    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_rows=1)
        tasks = [asyncio.create_task(batcher.infer(x(i), deadline=time.monotonic() + 0.05)) for i in range(2)]
        for task in tasks:
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(task, 10)
        assert gate.began == 1, "and runs still"
        gate.open.set()
        await batcher.drain()

    within(test())


def test_a_run_ends_when_nobody_can_want_it_any_more(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    async def test() -> None:
        slow = predictors("slow")
        rows = np.ones((4096, *(int(d) for d in slow.signature.inputs[0].row_shape)), np.float32)
        batcher = DynamicBatcher(slow, gate)
        gate.open.set()
        with pytest.raises(DeadlineExceeded):
            await batcher.infer({slow.signature.inputs[0].name: rows}, deadline=time.monotonic() + 0.05)
        await batcher.drain()

    within(test())


def test_a_full_queue_refuses_and_every_request_is_answered_or_refused(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_rows=4, max_queue_rows=10)
        waiting = await one_by_one(batcher.infer(x(i % 10, (i + 1) % 10)) for i in range(20))
        assert batcher.queued_rows == 10
        gate.open.set()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, Overloaded)]
        assert (len(refused), sum(isinstance(a, Ran) for a in answers)) == (14, 6)
        assert y(await batcher.infer(x(1))) == [10.0]

    within(test())


def test_rows_that_depend_on_their_company_run_without_it(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    async def test() -> None:
        centred = predictors("centred")
        (tensor,) = centred.signature.inputs
        assert centred.independence == "dependent"
        rows = np.arange(4, dtype=np.float32).reshape(2, 2)
        batcher = DynamicBatcher(centred, gate)
        waiting = [asyncio.create_task(batcher.infer({tensor.name: row[None]})) for row in rows]
        await settle()
        gate.open.set()
        assert [a.batch_rows for a in await asyncio.gather(*waiting)] == [1, 1]

    within(test())


def test_rows_of_different_shapes_are_not_stacked(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    async def test() -> None:
        wide = predictors("wide")
        (tensor,) = wide.signature.inputs
        batcher = DynamicBatcher(wide, gate)
        waiting = [asyncio.create_task(batcher.infer({tensor.name: np.ones((1, w), np.float32)})) for w in (1, 2, 2, 3)]
        await settle()
        gate.open.set()
        answers = await asyncio.gather(*waiting)
        assert [a.batch_rows for a in answers] == [1, 2, 2, 1]
        assert [next(iter(a.outputs.values())).shape for a in answers] == [(1, 1), (1, 2), (1, 2), (1, 3)]

    within(test())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_each_gets_its_own_rows(lookup: Predictor, seed: int) -> None:
    chance = random.Random(seed)

    async def one(batcher: DynamicBatcher) -> bool:
        await asyncio.sleep(chance.random() * 0.02)
        values = [BAD if chance.random() < 0.02 else chance.randrange(10) for _ in range(chance.randrange(1, 8))]
        task = asyncio.create_task(batcher.infer(x(*values)))
        if chance.random() < 0.1:
            await asyncio.sleep(0)
            task.cancel()
        try:
            answer = await task
        except RunFailed:
            return BAD in values
        except asyncio.CancelledError:
            return True
        return y(answer) == [10.0 * v for v in values] and answer.batch_rows <= max(16, len(values))

    async def test() -> None:
        with ThreadPoolExecutor(2) as threads:
            batcher = DynamicBatcher(lookup, threads, slots=2, max_rows=16)
            assert all(await asyncio.gather(*(one(batcher) for _ in range(500))))
            await batcher.drain()
            assert batcher.queued_rows == 0

    within(test())


def test_who_gives_up_makes_room_at_once(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_queue_rows=3)
        running = asyncio.create_task(batcher.infer(x(1)))
        await settle()
        waiting = asyncio.create_task(batcher.infer(x(2, 3, 4)))
        await settle()
        with pytest.raises(Overloaded):
            await batcher.infer(x(5))
        waiting.cancel()
        await settle()
        assert batcher.queued_rows == 0
        later = asyncio.create_task(batcher.infer(x(5)))
        gate.open.set()
        assert [(y(a), a.batch_rows) for a in await asyncio.gather(running, later)] == [([10.0], 1), ([50.0], 1)]

    within(test())


def test_requests_without_rows_are_bounded_too(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_queue_rows=2)
        running = asyncio.create_task(batcher.infer(x(1)))
        await settle()
        empty = [asyncio.create_task(batcher.infer(x())) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded):
            await batcher.infer(x())
        gate.open.set()
        assert [y(a) for a in await asyncio.gather(running, *empty)] == [[10.0], [], []]

    within(test())


@pytest.mark.parametrize(("model", "size"), [("wide", 4 * 1000), ("text", 8 + 992)])
def test_a_queue_is_bounded_by_bytes_too(predictors: Callable[[str], Predictor], gate: Gate, model: str, size: int) -> None:
    async def test() -> None:
        array = np.ones((1, 1000), np.float32) if model == "wide" else np.array(["x" * 992], object)
        batcher = DynamicBatcher(predictors(model), gate, max_queue_bytes=3 * size)
        tasks = await one_by_one(batcher.infer({"x": array}) for _ in range(6))
        assert batcher.queued_bytes == 3 * size
        tasks[1].cancel()
        await settle()
        assert batcher.queued_bytes == 2 * size, "who gives up makes room"
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(a) for a in answers] == [Ran, asyncio.CancelledError, Ran, Ran, Overloaded, Overloaded]
        assert batcher.queued_bytes == 0

    within(test())


def test_a_request_larger_than_the_queue_waits_alone(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate, max_queue_bytes=1)
        tasks = [asyncio.create_task(batcher.infer(x(i))) for i in range(3)]
        await settle()
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(a) for a in answers] == [Ran, Ran, Overloaded]

    within(test())


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """Knows which threads stacked it."""

    stacked: ClassVar[list[str]] = []

    def __array_function__(self, *args: Any) -> Any:
        self.stacked.append(threading.current_thread().name)
        return super().__array_function__(*args)  # type: ignore[no-untyped-call]


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


def watched(*values: int) -> dict[str, Array]:
    return {"x": np.array(values).view(Watched)}


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
            await settle()
            await other.infer({tensor.name: np.ones((1, 1), np.float32)})
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


async def one_by_one(calls: Iterable[Coroutine[Any, Any, Ran]]) -> list[asyncio.Task[Ran]]:
    """Each in a turn of the event loop of its own."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.create_task(call))
        await settle()
    return tasks


def test_requests_of_one_turn_run_together(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        gate.open.set()
        assert [a.batch_rows for a in await asyncio.gather(*(batcher.infer(x(i)) for i in range(5)))] == [5] * 5
        narrow = DynamicBatcher(lookup, gate, max_rows=2, max_queue_rows=2)
        answers = await asyncio.gather(*(narrow.infer(x(i)) for i in range(5)), return_exceptions=True)
        assert [a.batch_rows if isinstance(a, Ran) else type(a) for a in answers] == [2, 2, 2, 2, Overloaded]

    within(test())


def test_what_is_short_runs_on_the_event_loop(lookup: Predictor, gate: Gate) -> None:
    """Once a run of its size has been seen; whatever is no run of such a size, or raised, is in threads."""

    async def test() -> None:
        batcher = batching.DynamicBatcher(lookup, gate, short=60.0)
        gate.open.set()
        pairs = [{"x": np.array([i, i]).view(Watched)} for i in range(2)]
        for _ in range(3):
            assert [y(a) for a in await asyncio.gather(*map(batcher.infer, pairs))] == [[0.0, 0.0], [10.0, 10.0]]
        assert gate.began == 1
        assert [name.rpartition("_")[0] for name in Watched.stacked] == ["gate", "", ""]
        answers = await asyncio.gather(batcher.infer(x(1, 2)), batcher.infer(x(BAD, 3)), return_exceptions=True)
        assert [y(a) if isinstance(a, Ran) else type(a) for a in answers] == [[10.0, 20.0], RunFailed]
        assert gate.began == 3, "each of the two again, in a thread"
        await batcher.drain()
        assert batcher.idle

    Watched.stacked.clear()
    within(test())


def test_a_thread_does_not_go_on_with_what_is_short(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = batching.DynamicBatcher(lookup, gate, max_rows=2, max_queue_rows=4, short=60.0)
        gate.open.set()
        await asyncio.gather(*(batcher.infer(x(i)) for i in range(2)))
        gate.open.clear()
        Watched.stacked.clear()
        tasks = [asyncio.create_task(batcher.infer(watched(i))) for i in range(5)]  # the fifth makes the first two begin at once
        await settle()
        gate.open.set()
        assert [y(a) for a in await asyncio.gather(*tasks)] == [[10.0 * i] for i in range(5)]
        assert [name.rpartition("_")[0] for name in Watched.stacked] == ["gate", ""]

    within(test())


def test_a_failed_run_does_not_tell_how_long_others_take(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    async def test() -> None:
        lookup = predictors("lookup")
        batcher = batching.DynamicBatcher(lookup, gate, short=60.0)
        gate.open.set()
        with pytest.raises(RunFailed):
            await batcher.infer(x(BAD))
        await batcher.infer(x(1))
        assert gate.began == 2, "the first that is answered is in a thread, too"
        await batcher.infer(x(1))
        assert gate.began == 2

    within(test())


def test_a_run_that_keeps_the_loop_too_long_is_made_again_in_a_thread(
    predictors: Callable[[str], Predictor], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped at once stands for it: how long a run takes depends on the machine."""

    async def test() -> None:
        batcher = batching.DynamicBatcher(predictors("lookup"), gate, short=60.0)
        gate.open.set()
        await batcher.infer(x(1))
        monkeypatch.setattr(batching, "LONGEST", -1.0)
        assert [y(await batcher.infer(x(2), deadline=time.monotonic() + 30)), y(await batcher.infer(x(3)))] == [[20.0], [30.0]]
        assert gate.began == 3
        await batcher.drain()

    within(test())


def test_another_slot_is_filled_while_those_of_a_failed_run_are_asked_one_by_one(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = batching.DynamicBatcher(lookup, gate, slots=2, max_rows=2, short=60.0)
        gate.open.set()
        await batcher.infer(x(1, 1))
        gate.open.clear()
        failing = [asyncio.create_task(batcher.infer(x(BAD))) for _ in range(2)]
        good = [asyncio.create_task(batcher.infer(x(i))) for i in range(2)]
        assert [y(a) for a in await asyncio.wait_for(asyncio.gather(*good), 10)] == [[0.0], [10.0]]
        assert not any(task.done() for task in failing)
        gate.open.set()
        assert {type(a) for a in await asyncio.gather(*failing, return_exceptions=True)} == {RunFailed}
        await batcher.drain()

    within(test())


class NoMoreThreads(ThreadPoolExecutor):
    """As where the system starts no more: the work is taken, and its taker told that it is not."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        super().submit(work, *args, **options)
        raise RuntimeError("can't start new thread")


def test_what_no_thread_could_be_started_for_is_ended_once(lookup: Predictor) -> None:
    async def test() -> None:
        with NoMoreThreads(1) as threads:
            batcher = DynamicBatcher(lookup, threads, max_rows=1)
            answers = await asyncio.gather(*(batcher.infer(x(1)) for _ in range(2000)), return_exceptions=True)
            assert {str(a) for a in answers} == {"can't start new thread"}
            await batcher.drain()
        await settle()
        assert batcher.idle

    within(test())


def test_runs_that_are_cancelled_with_their_threads_are_told_of(lookup: Predictor) -> None:
    async def test() -> None:
        gate = Gate(1)
        batcher = DynamicBatcher(lookup, gate, slots=2)
        tasks = await one_by_one(batcher.infer(x(i)) for i in range(2))
        gate.shutdown(wait=False, cancel_futures=True)
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(a) for a in answers] == [Ran, CancelledError]
        await batcher.drain()

    within(test())


def test_short_runs_let_the_event_loop_turn(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    async def test() -> None:
        centred, turns = predictors("centred"), 0
        assert centred.independence == "dependent", "each row runs alone"
        (tensor,) = centred.signature.inputs
        batcher = batching.DynamicBatcher(centred, gate, short=60.0)
        gate.open.set()
        row = {tensor.name: np.zeros((1, 2), np.float32)}
        await batcher.infer(row)
        waiting = asyncio.gather(*(batcher.infer(row) for _ in range(20)))
        while not waiting.done():
            await asyncio.sleep(0)
            turns += 1
        assert gate.began == 1
        assert turns >= 20

    within(test())


def test_a_size_that_may_be_short_is_tried_on_the_loop(lookup: Predictor) -> None:
    pace = Pace(lookup, short=1.0)
    assert not pace.is_short(1, 8), "never seen"
    pace.ran(1, 8, 3.9, here=False)
    assert pace.is_short(1, 8), "in a thread it may well take four times as long"
    assert not pace.is_short(2, 8), "another size"
    pace.ran(1, 8, 3.0, here=True)
    assert not pace.is_short(1, 8)


def test_one_late_run_on_the_loop_says_little(lookup: Predictor) -> None:
    pace = Pace(lookup, short=1.0)
    for _ in range(20):
        pace.ran(1, 8, 0.1, here=True)
    pace.ran(1, 8, 5.0, here=True)
    assert pace.is_short(1, 8)
    pace.ran(1, 8, 20.0, here=True)
    assert not pace.is_short(1, 8)


def test_a_long_run_is_not_forgotten_at_once(lookup: Predictor) -> None:
    pace = Pace(lookup, short=1.0)
    for _ in range(1000):
        pace.ran(1, 8, 40.0, here=False)
        assert not pace.is_short(1, 8), "what is long is never tried"
    seen = []
    for _ in range(80):
        pace.ran(1, 8, 0.1, here=False)
        seen.append(pace.is_short(1, 8))
    assert seen == sorted(seen)
    assert (seen[50], seen[-1]) == (False, True)


def test_one_answer_of_a_run_is_its_first(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = DynamicBatcher(lookup, gate)
        tasks = await one_by_one(batcher.infer(x(i)) for i in range(4))
        gate.open.set()
        assert [(a.batch_rows, a.first) for a in await asyncio.gather(*tasks)] == [(1, True), (3, True), (3, False), (3, False)]

    within(test())


def test_a_version_that_is_served_no_more_is_let_go_after_its_last_request(
    predictors: Callable[[str], Predictor], gate: Gate
) -> None:
    async def test() -> None:
        batched, old, new = Batched(gate), predictors("lookup"), predictors("centred")
        batcher = weakref.ref(batched.batcher(old))
        running = asyncio.ensure_future(batched(Served(old, Features(old.signature, old.manifest.config)), x(1), None))
        await settle()
        batched.retain([new])
        assert batched.batcher(old) is batcher(), "it has work"
        gate.open.set()
        assert (await running).outputs["y"].tolist() == [10.0]
        await settle()
        batched.retain([old])
        assert batcher() is not None
        batched.retain([new])
        while batcher() is not None:  # until the thread of its last run has done with it, within the test's minute
            await asyncio.sleep(0.01)

    within(test())
