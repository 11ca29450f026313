"""Large bodies and answers beside the event loop: in a thread that goes on when a test says so."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.conformance.models import surface
from tests.gates import Gate, settle, within
from triform.aside import OneByOne
from triform.errors import DeadlineExceeded, Overloaded
from triform.http import HttpRequest, HttpSurface
from triform.protocols.bodies import Call, Encoded
from triform.service import LARGE, InferenceService
from triform.testing import RecordingTelemetry

ROWS = 100_000


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(1) as gate:
        yield gate
        gate.open.set()


def test_what_ends_a_request_goes_first_and_each_gets_its_own(gate: Gate) -> None:
    async def test() -> None:
        done: list[str] = []

        def work(name: str) -> Callable[[], str]:
            def do() -> str:
                done.append(name)
                if name == "bad":
                    raise ZeroDivisionError
                return name

            return do

        aside = OneByOne(gate)
        names = ["body 1", "body 2", "bad", "body 3", "answer 1", "answer 2"]
        tasks = [asyncio.ensure_future(aside(work(n), 1, None, urgent=n.startswith("answer"))) for n in names]
        await settle()
        assert gate.began == 1
        gate.open.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [f if isinstance(f, str) else type(f) for f in found] == [*names[:2], ZeroDivisionError, *names[3:]]
        assert done == ["body 1", "answer 1", "answer 2", "body 2", "bad", "body 3"]

    within(test())


def test_what_would_wait_behind_too_much_is_refused_at_once(gate: Gate) -> None:
    async def test() -> None:
        aside = OneByOne(gate, max_bytes=10)
        tasks = [asyncio.ensure_future(aside(int, size, None)) for size in (50, 6, 4)]
        await settle()
        with pytest.raises(Overloaded):
            await aside(int, 1, None)
        answer = asyncio.ensure_future(aside(int, 20, None, urgent=True))
        tasks[1].cancel()
        await settle()
        later = asyncio.ensure_future(aside(int, 6, None))
        await settle()
        with pytest.raises(Overloaded):
            await aside(int, 1, None)
        gate.open.set()
        assert await asyncio.gather(tasks[0], tasks[2], later, answer) == [0] * 4
        assert gate.began == 4
        assert await aside(int, 50, None) == 0, "nothing waits any more"

    within(test())


def test_what_is_late_is_told_on_time_and_never_begun(gate: Gate) -> None:
    async def test() -> None:
        aside, soon = OneByOne(gate), time.monotonic() + 0.02
        under_way, late = (asyncio.ensure_future(aside(int, 1, soon)) for _ in range(2))
        patient = asyncio.ensure_future(aside(int, 1, None))
        for task in under_way, late:
            with pytest.raises(DeadlineExceeded):
                await task
        with pytest.raises(DeadlineExceeded):
            await aside(int, 1, soon)
        assert not gate.open.is_set()
        gate.open.set()
        assert await patient == 0
        assert gate.began == 2

    within(test())


def test_what_came_due_while_the_loop_stood_still_is_not_begun(gate: Gate) -> None:
    async def test() -> None:
        aside, soon = OneByOne(gate), time.monotonic() + 0.2
        first, late = asyncio.ensure_future(aside(int, 1, None)), asyncio.ensure_future(aside(int, 1, soon))
        await settle()
        gate.open.set()
        time.sleep(0.25)
        assert await first == 0
        with pytest.raises(DeadlineExceeded):
            await late
        assert gate.began == 1

    within(test())


def large(**options: Any) -> HttpRequest:
    body = orjson.dumps({"instances": [[i / 7, i / 3, i / 11] for i in range(ROWS)], **options})
    assert len(body) > LARGE
    return HttpRequest("POST", "/v1/models/linear:predict", (), body)


def test_a_storm_of_large_bodies_is_answered_refused_or_told_in_time(online_models: Path, gate: Gate) -> None:
    telemetry = RecordingTelemetry()
    models = surface(online_models, telemetry=telemetry).service.models
    request = large()
    small = HttpRequest("POST", "/v1/models/linear:predict", (), b'{"instances": [[1, 2, 3]]}')

    async def test() -> None:
        size = len(request.body)
        asked = HttpSurface(InferenceService(models, aside=OneByOne(gate, max_bytes=3 * size)))
        tasks = [asyncio.create_task(asked.handle_async(request, deadline=time.monotonic() + 1)) for _ in range(2)]
        tasks += [asyncio.create_task(asked.handle_async(request)) for _ in range(4)]
        await settle()
        assert (await asked.handle_async(small)).status == 200, "who is small goes past them"
        assert [(t.result().status, t.result().headers["retry-after"]) for t in tasks[4:]] == [(429, "1")] * 2
        assert [(await task).status for task in tasks[:2]] == [504, 504]
        gate.open.set()
        assert [(await task).status for task in tasks] == [504, 504, 200, 200, 429, 429]
        assert gate.began == 3, "the second was late before it was read"

    within(test())
    codes = [r.code for r in telemetry.records]
    assert sorted(codes) == ["deadline_exceeded"] * 2 + ["ok"] * 3 + ["overloaded"] * 2


class Watched:
    """An array that knows which thread made it."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return np.ones((1, 3), np.float32)


@pytest.mark.parametrize("size", [LARGE - 1, LARGE])
def test_a_large_request_is_validated_where_it_is_read(online_models: Path, gate: Gate, size: int) -> None:
    service = InferenceService(surface(online_models).service.models, aside=OneByOne(gate))
    watched = Watched()

    async def test() -> None:
        gate.open.set()
        with service.exchange("r") as exchange:
            exchange.choose("linear")
            call = Call({"x": watched}, lambda outputs: Encoded(outputs["y"].tobytes()))
            assert (await HttpSurface(service).answer(exchange, lambda: call, size)).body == np.float32(6).tobytes()

    within(test())
    assert [name.rpartition("_")[0] for name in watched.threads] == ["gate" if size >= LARGE else ""]


READ_ASIDE = {
    "packed": (
        "/v1/models/linear:predict",
        {"content-encoding": "gzip"},
        gzip.compress(b'{"instances": [[1, 2, 3]]}' + b" " * LARGE),
    ),
    "small lists": ("/v1/models/linear:predict", {}, b'{"instances": [%b]}' % b",".join([b"[1,2,3]"] * 5000)),
    "objects": ("/v1/models/linear:predict", {}, b'{"instances": [%b]}' % b",".join([b'{"x":[1,2,3]}'] * 3000)),
}
READ_HERE = {
    "long numbers": ("/v1/models/linear:predict", {}, b'{"instances": [%b]}' % b",".join([b"[0.12345678,0.2,0.333333]"] * 2000)),
    "packed": ("/v1/models/linear:predict", {"content-encoding": "gzip"}, gzip.compress(b'{"instances": [[1, 2, 3]]}')),
    "packed and cut": ("/v1/models/linear:predict", {"content-encoding": "gzip"}, gzip.compress(bytes(LARGE))[:9]),
    "tensors": (
        "/v2/models/linear/infer", {"inference-header-content-length": "0"}, np.ones((LARGE // 13, 3), np.float32).tobytes(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "aside"),
    [*((one, True) for one in READ_ASIDE.items()), *((one, False) for one in READ_HERE.items())],
    ids=[*(f"aside: {name}" for name in READ_ASIDE), *(f"here: {name}" for name in READ_HERE)],  # gzip's bytes hold the time
)
def test_what_takes_long_to_read_is_read_in_a_thread(
    online_models: Path, gate: Gate, asked: tuple[str, tuple[str, dict[str, str], bytes]], *, aside: bool
) -> None:
    """However few bytes it has: those of a caller who means ill are packed a thousand to one."""
    name, (path, headers, body) = asked
    assert len(body) < LARGE

    async def test() -> None:
        gate.open.set()
        surfaced = HttpSurface(InferenceService(surface(online_models).service.models, aside=OneByOne(gate)))
        answer = await surfaced.handle_async(HttpRequest("POST", path, tuple(headers.items()), body))
        assert answer.status == (400 if "cut" in name else 200), answer.body[:200]
        assert (gate.began > 0) == aside

    within(test())


def test_an_answer_that_there_is_no_room_to_pack_is_sent_as_it_is(online_models: Path, gate: Gate) -> None:
    models = surface(online_models).service.models
    request = large()._replace(headers=[("accept-encoding", "gzip")])
    plain = HttpSurface(InferenceService(models)).handle(request._replace(headers=()))

    async def test() -> None:
        gate.open.set()
        aside = OneByOne(gate, max_bytes=1)
        asked = HttpSurface(InferenceService(models, aside=aside))
        packed = await asked.handle_async(request)
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < len(plain.body)
        gate.open.clear()
        blocked = [asyncio.ensure_future(aside(int, 1, None, urgent=True)) for _ in range(2)]
        await settle()
        assert await asked._packed(plain.body, "gzip", None) == (plain.body, {})
        gate.open.set()
        await asyncio.gather(*blocked)

    within(test())
