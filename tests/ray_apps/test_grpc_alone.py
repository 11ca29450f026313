"""The RPCs on a gRPC server of their own, where a test says when a model runs: deadlines, callers who give up, idle streams."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from ray_apps.grpc import OpenInference
from ray_apps.messages import MESSAGES, SERVICE, add_to_server
from tests.conformance.models import surface
from tests.gates import Gate
from triform import batching, testing
from triform.aside import OneByOne
from triform.batched import Batched
from triform.http import HttpSurface
from triform.models import Models
from triform.predictor import Predictor
from triform.service import LARGE, InferenceService
from triform.testing import RecordingTelemetry

INT64 = struct.Struct("<q")


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        yield gate
        gate.open.set()


@pytest.fixture
def telemetry() -> RecordingTelemetry:
    return RecordingTelemetry()


@pytest.fixture
def models(online_models: Path, telemetry: RecordingTelemetry) -> Models:
    return surface(online_models, telemetry=telemetry).service.models


@asynccontextmanager
async def serving(service: InferenceService, timeout: float = 60.0) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of these RPCs, on this event loop."""
    servicer = OpenInference()
    servicer.surface, servicer.timeout = HttpSurface(service), timeout
    server = grpc.aio.server()
    add_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def infer(channel: grpc.aio.Channel, request: Any, timeout: float | None = None) -> Any:
    call = channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
        response_deserializer=MESSAGES["ModelInferResponse"].FromString,
    )
    return call(request, timeout=timeout, wait_for_ready=True)


def stream(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
        response_deserializer=MESSAGES["ModelStreamInferResponse"].FromString,
    )()


def lookup(value: int) -> Any:
    request = MESSAGES["ModelInferRequest"](model_name="lookup", raw_input_contents=[INT64.pack(value)])
    request.inputs.add(name="x", datatype="INT64", shape=[1])
    return request


def y(answer: Any) -> float:
    (number,) = struct.unpack("<f", answer.raw_output_contents[0])
    return float(number)


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.002)


def within(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 60)

    asyncio.run(bounded())


def test_what_cannot_be_loaded_is_in_the_index_and_not_ready(models: Models) -> None:
    """As HTTP says it."""
    models.miss("bad", "digest_mismatch")

    def call(channel: grpc.aio.Channel, rpc: str, **fields: Any) -> Any:
        asked, answer = MESSAGES[f"{rpc}Request"], MESSAGES[f"{rpc}Response"]
        way = channel.unary_unary(
            f"/{SERVICE}/{rpc}", request_serializer=asked.SerializeToString, response_deserializer=answer.FromString
        )
        return way(asked(**fields), timeout=60, wait_for_ready=True)

    async def test() -> None:
        async with serving(InferenceService(models)) as channel:
            index = (await call(channel, "RepositoryIndex")).models
            assert [(m.version, m.state, m.reason) for m in index if m.name == "bad"] == [("", "UNAVAILABLE", "digest_mismatch")]
            assert "bad" not in {m.name for m in (await call(channel, "RepositoryIndex", ready=True)).models}
            assert not (await call(channel, "ModelReady", name="bad")).ready
            with pytest.raises(grpc.aio.AioRpcError, match="none of its versions can be served"):
                await call(channel, "ModelMetadata", name="bad")

    asyncio.run(test())


@pytest.mark.parametrize(("host", "caller"), [(0.0, None), (0.2, None), (60.0, 0.2)], ids=["at once", "host", "caller"])
def test_who_is_late_is_told_and_nothing_is_run(
    models: Models, gate: Gate, telemetry: RecordingTelemetry, host: float, caller: float | None
) -> None:
    """The caller's own deadline reaches the server as the end of the call."""

    async def test() -> None:
        batched = Batched(gate, short=0.0)
        async with (
            serving(InferenceService(models, batched)) as patient,
            serving(InferenceService(models, batched), timeout=host) as hasty,
        ):
            first = infer(patient, lookup(1))
            first_task = asyncio.ensure_future(first)
            await until(lambda: gate.began == 1)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await infer(hasty, lookup(2), timeout=caller)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: len(telemetry.records) == 1)
            gate.open.set()
            assert y(await first_task) == 10.0
            await batched.drain()

    within(test())
    assert gate.began == 1
    assert [r.code for r in telemetry.records] == ["cancelled" if caller else "deadline_exceeded", "ok"]


def test_who_gives_up_in_mid_batch_does_his_peers_no_harm(
    models: Models, gate: Gate, telemetry: RecordingTelemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "IN_A_ROW", 1)  # the second run is to wait for a thread

    async def test() -> None:
        batched = Batched(gate, short=0.0)
        async with serving(InferenceService(models, batched)) as channel:
            batcher = batched.batcher(models.get("lookup").predictor)
            first = infer(channel, lookup(1))
            await until(lambda: gate.began == 1)
            calls = [infer(channel, lookup(value)) for value in (2, 3, 4)]
            await until(lambda: batcher.queued_rows == 3)
            gate.let_one()
            await until(lambda: gate.began == 2)  # the three are in one run now
            calls[1].cancel()
            await until(lambda: [r.code for r in telemetry.records] == ["ok", "cancelled"])
            gate.open.set()
            assert [y(await call) for call in (first, calls[0], calls[2])] == [10.0, 20.0, 40.0]
            assert calls[1].cancelled()
            assert y(await infer(channel, lookup(5))) == 50.0

    within(test())
    assert gate.began == 3, "nobody was run twice"
    assert max(r.batch_rows for r in telemetry.records) == 2, "the run began when he had gone"


def test_an_idle_stream_is_closed(models: Models, telemetry: RecordingTelemetry) -> None:
    async def test() -> None:
        async with serving(InferenceService(models), timeout=0.3) as channel:
            asking = stream(channel)
            await asking.write(lookup(1))
            assert y((await asking.read()).infer_response) == 10.0
            with pytest.raises(grpc.aio.AioRpcError, match=r"no request came for 0\.3 s") as closed:
                await asking.read()
            assert closed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    within(test())
    assert [r.code for r in telemetry.records] == ["ok"]


def test_a_stream_outlives_a_fault_of_ours(models: Models, telemetry: RecordingTelemetry) -> None:
    async def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a secret")

    async def test() -> None:
        async with serving(InferenceService(models, fail)) as channel:
            asking = stream(channel)
            for _ in range(2):
                await asking.write(lookup(1))
                assert (await asking.read()).error_message == "the server failed; its log knows why"
            await asking.done_writing()
            assert await asking.read() is grpc.aio.EOF
            assert await asking.code() is grpc.StatusCode.OK

    within(test())
    assert [r.code for r in telemetry.records] == ["internal"] * 2


@pytest.mark.parametrize(("datatype", "aside"), [("BYTES", 1), ("FP32", 0)])
def test_raw_texts_are_read_aside_and_raw_numbers_are_not(tmp_path: Path, gate: Gate, datatype: str, aside: int) -> None:
    """Numbers are taken as they stand, texts are read one by one. Of a single text nothing large is left to be written."""
    repository = testing.repository(tmp_path / "models", {"m": testing.identity(tmp_path / "m.onnx", datatype)})
    models = Models(form="serve")
    models.add("m", 1, lambda: Predictor.load(repository.package("m", 1)))
    raw = struct.pack("<I", LARGE) + b"a" * LARGE if datatype == "BYTES" else bytes(LARGE - 4)
    request = MESSAGES["ModelInferRequest"](model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[1 if datatype == "BYTES" else len(raw) // 4])

    async def test() -> None:
        gate.open.set()
        async with serving(InferenceService(models, aside=OneByOne(gate))) as channel:
            assert (await infer(channel, request)).raw_output_contents[0] == raw

    within(test())
    assert gate.began == aside
