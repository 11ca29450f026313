"""The surface on an event loop: the same answers as without one, through dynamic batching, in one record each."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conformance import models
from triform.aside import OneByOne
from triform.batched import Batched, BatchOptions
from triform.http import HttpRequest, HttpResponse, HttpSurface
from triform.predictor import Predictor
from triform.service import InferenceService
from triform.testing import RecordingTelemetry, centred, repository


def predict(model: str, *instances: object) -> HttpRequest:
    return HttpRequest("POST", f"/v1/models/{model}:predict", (), orjson.dumps({"instances": instances}))


@pytest.fixture
def telemetry() -> RecordingTelemetry:
    return RecordingTelemetry()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def surface(online_models: Path, telemetry: RecordingTelemetry) -> HttpSurface:
    return models.surface(online_models, telemetry=telemetry)


def batched(surface: HttpSurface, threads: ThreadPoolExecutor, **options: BatchOptions) -> HttpSurface:
    return HttpSurface(InferenceService(surface.service.models, Batched(threads, options)))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loop_goes_on_while_large_bodies_are_read_and_written(surface: HttpSurface, large: bool, packed: bool) -> None:
    rows = [[i / 7, i / 3, i / 11] for i in range(200_000 if large else 2)]
    body = orjson.dumps({"instances": rows})
    headers = [("content-encoding", "gzip")] if packed else []
    request = HttpRequest("POST", "/v1/models/linear:predict", headers, gzip.compress(body, 1) if packed else body)
    expected = surface.handle(request)
    with Ticked(1) as threads:

        async def at_once() -> HttpResponse:
            threads.loop = asyncio.get_running_loop()
            service = InferenceService(surface.service.models, aside=OneByOne(threads))
            return await HttpSurface(service).handle_async(request)

        answer = asyncio.run(at_once())
        assert (answer.status, answer.body) == (expected.status, expected.body)
        assert threads.seen == (["ticked"] * 2 if large else [])


class Ticked(ThreadPoolExecutor):
    """Threads that wait for the event loop to go on before they do."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.seen: list[str] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        ticked = threading.Event()
        self.loop.call_later(0.01, ticked.set)

        def do() -> Any:
            self.seen.append("ticked" if ticked.wait(30) else "stood still")
            return work(*args, **options)

        return super().submit(do)


def test_what_fails_aside_fails_as_on_the_loop(surface: HttpSurface) -> None:
    request = predict("linear", *([[1.0, 2.0, 3.0]] * 100_000), [1.0, "two", 3.0])
    with ThreadPoolExecutor(1) as thread:
        service = InferenceService(surface.service.models, aside=OneByOne(thread))
        answer = asyncio.run(HttpSurface(service).handle_async(request))
    assert (answer.status, answer.body) == ((expected := surface.handle(request)).status, expected.body)
    assert answer.status == 400


def test_many_at_once_are_answered_as_one_by_one(
    surface: HttpSurface, threads: ThreadPoolExecutor, telemetry: RecordingTelemetry
) -> None:
    requests = [predict("lookup", *range(i % 4)) for i in range(40)]
    expected = [surface.handle(request) for request in requests]
    telemetry.records.clear()

    async def at_once() -> list[object]:
        asynchronous = batched(surface, threads)
        return [(r.status, r.body) for r in await asyncio.gather(*(asynchronous.handle_async(q) for q in requests))]

    assert asyncio.run(at_once()) == [(r.status, r.body) for r in expected]
    assert len(telemetry.records) == 40
    assert {r.code for r in telemetry.records} == {"ok"}
    assert all({"decode", "execute", "encode"} <= set(r.stages) for r in telemetry.records)
    assert any(r.stages.get("queue", 0.0) > 0.0 for r in telemetry.records)
    rows = sum(r.rows for r in telemetry.records)
    assert sum(r.batch_rows for r in telemetry.records) == rows == sum(i % 4 for i in range(40))  # each run is told once
    assert max(r.batch_rows for r in telemetry.records) > 3


def test_the_culprit_alone_gets_the_error(surface: HttpSurface, threads: ThreadPoolExecutor) -> None:
    async def at_once() -> list[int]:
        asynchronous = batched(surface, threads)
        requests = [predict("lookup", value) for value in (1, 99, 2, 3)]
        return [r.status for r in await asyncio.gather(*(asynchronous.handle_async(q) for q in requests))]

    assert asyncio.run(at_once()) == [200, 422, 200, 200]


def test_a_full_queue_answers_429_and_says_when_to_come_again(
    surface: HttpSurface, threads: ThreadPoolExecutor, telemetry: RecordingTelemetry
) -> None:
    async def at_once() -> list[tuple[int, str | None]]:
        asynchronous = batched(surface, threads, lookup=BatchOptions(max_queue_rows=2))
        answers = await asyncio.gather(*(asynchronous.handle_async(predict("lookup", i)) for i in range(5)))
        return [(r.status, r.headers.get("retry-after")) for r in answers]

    assert asyncio.run(at_once()) == [(200, None)] * 4 + [(429, "1")]
    assert [r.code for r in telemetry.records].count("overloaded") == 1


def test_a_request_that_is_given_up_is_recorded_and_harms_nobody(
    surface: HttpSurface, threads: ThreadPoolExecutor, telemetry: RecordingTelemetry
) -> None:
    async def at_once() -> int:
        asynchronous = batched(surface, threads)
        leaving, staying = (asyncio.create_task(asynchronous.handle_async(predict("lookup", i))) for i in (1, 2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return (await staying).status

    assert asyncio.run(at_once()) == 200
    assert sorted(r.code for r in telemetry.records) == ["cancelled", "ok"]


def test_rows_of_a_dependent_model_keep_no_company(surface: HttpSurface, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    package = repository(tmp_path / "models", {"centred": centred(tmp_path / "centred.onnx")}).package("centred", 1)
    surface.service.models.add("centred", 1, lambda: Predictor.load(package))
    requests = [predict("centred", [float(i), 1.0]) for i in range(8)]
    alone = [surface.handle(request).body for request in requests]

    async def at_once() -> list[bytes]:
        asynchronous = batched(surface, threads)
        return [r.body for r in await asyncio.gather(*(asynchronous.handle_async(q) for q in requests))]

    assert asyncio.run(at_once()) == alone


def test_handle_refuses_a_service_that_waits(surface: HttpSurface, threads: ThreadPoolExecutor) -> None:
    async def inside_a_loop() -> None:
        with pytest.raises(RuntimeError, match="use handle_async"):
            batched(surface, threads).handle(predict("lookup", 1))

    asyncio.run(inside_a_loop())
