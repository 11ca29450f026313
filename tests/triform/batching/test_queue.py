"""Dynamic batching on a real event loop with a real model: who runs together, who waits, and who is refused."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.batchers import BAD, DynamicBatcher, one_by_one, x, y
from tests.gates import Gate, settle, within
from triform.batched import Batched, BatchOptions, half_of
from triform.errors import DeadlineExceeded, Overloaded, RunFailed
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array


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
        assert [a.batch_rows for a in answers] == [1, 4, 4, 4, 5, 1]  # five rows are more than a run takes: alone
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
        options = BatchOptions(max_rows=1, max_queue_requests=2)
        batched = Batched(gate, {"lookup": options}, places=1, short=0.0)
        batched.share(2)
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

    within(test())


def test_so_many_requests_may_wait_or_run(lookup: Predictor, gate: Gate) -> None:
    """A host that has places for so many in all gives one model no more: those that run have theirs still."""

    async def test() -> None:
        batched = Batched(gate, {"lookup": BatchOptions(max_rows=2)}, places=7, short=0.0)
        batcher = batched.batcher(lookup)
        assert batcher.max_requests == 7
        batched.share(2)
        running = asyncio.gather(*(batcher.infer(x(i)) for i in (0, 1)))
        await settle()
        assert (gate.began, batcher.queued_requests) == (1, 0)
        waiting = await one_by_one([batcher.infer(x(2))])
        with pytest.raises(Overloaded, match="3 requests wait or run already, 3 may"):
            await batcher.infer(x(3))
        waiting.pop().cancel()
        await settle()
        waiting += await one_by_one([batcher.infer(x(4))])
        assert batcher.requests == 3, "who has gone makes room"
        gate.open.set()
        assert [y(answer) for answer in await running] == [[0.0], [10.0]]
        assert [y(answer) for answer in await asyncio.gather(*waiting)] == [[40.0]]
        assert [y(answer) for answer in await asyncio.gather(*(batcher.infer(x(i)) for i in (5, 6, 7)))] == [
            [50.0],
            [60.0],
            [70.0],
        ]
        with pytest.raises(RunFailed):
            await batcher.infer(x(BAD))
        await settle()
        assert batcher.requests == 0, "whatever became of them"

    within(test())


def test_half_of_few_places_leaves_room_for_who_comes_beside_another() -> None:
    assert [half_of(places) for places in (1, 2, 3, 4, 5, 1024)] == [2, 2, 2, 2, 2, 512]


def test_so_many_of_one_turn_may_run_on_the_loop(lookup: Predictor, gate: Gate) -> None:
    async def test() -> None:
        batcher = Batched(gate, places=2, short=60.0).batcher(lookup)
        gate.open.set()
        await asyncio.gather(*(batcher.infer(x(i)) for i in range(2)))  # it is known for short now
        await settle()
        began = gate.began
        for _ in range(5):
            answers = await asyncio.gather(*(batcher.infer(x(i)) for i in range(3)), return_exceptions=True)
            assert [y(a) if isinstance(a, Ran) else type(a) for a in answers] == [[0.0], [10.0], Overloaded]
            await settle()
        assert gate.began < began + 5
        assert batcher.requests == 0

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
