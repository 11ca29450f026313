"""Short runs, which dynamic batching makes on the event loop itself, and how it knows them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.batchers import BAD, DynamicBatcher, Watched, one_by_one, watched, x, y
from tests.gates import Gate, settle, within
from triform import batching
from triform.batched import Batched
from triform.errors import Overloaded, RunFailed
from triform.features import Features
from triform.models import Served
from triform.pace import Pace
from triform.predictor import Predictor
from triform.service import Ran


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


def test_the_loop_is_not_kept_by_a_run_that_takes_long_after_all(predictors: Callable[[str], Predictor], gate: Gate) -> None:
    """It is ended while hardly any of it is done, so the bound holds however fast the machine is."""

    async def test() -> None:
        slow = predictors("slow")
        inputs = {"x": np.ones((20_000, 256), np.float32)}
        batcher = batching.DynamicBatcher(slow, gate, short=60.0)
        batcher._pace.ran(20_000, inputs["x"].nbytes, 0.001, here=False)
        task = asyncio.create_task(batcher.infer(inputs))
        await settle()
        assert gate.began == 1, "a thread has it now: on the loop it has not come to its end"
        gate.open.set()
        answer = await task
        assert np.array_equal(answer.outputs["y"], inputs["x"])

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
