"""Who may call over gRPC: keys and signatures in the metadata of a call. A real server and client, without Serve around them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import msgspec
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ray_apps.grpc import OpenInference
from ray_apps.messages import MESSAGES, RPCS, SERVICE, STREAMS
from tests.conformance.models import surface
from tests.conformance.test_access import Guard, guard
from triform.audit import Entry
from triform.signing import Parts, sign
from triform.testing import RecordingTelemetry

X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": {"fp32_contents": [1, 2, 3]}}
UNARY = [rpc for rpc in RPCS if rpc not in STREAMS and rpc not in ("ServerLive", "ServerReady")]


class Guarded(NamedTuple):
    stub: Any
    guard: Guard
    telemetry: RecordingTelemetry

    def call(self, rpc: str, request: Any, *metadata: tuple[str, str]) -> Any:
        return getattr(self.stub, rpc)(request, metadata=metadata, timeout=30)

    def refused(self, rpc: str, request: Any, *metadata: tuple[str, str]) -> tuple[str, str]:
        """Status and details; and the next call is answered."""
        with pytest.raises(grpc.RpcError) as refusal:
            self.call(rpc, request, *metadata)
        told = refusal.value.details()
        assert not any(secret in told for key in self.guard.keys.values() for secret in key.split("_", 2)[2:])
        assert answer_of(self.call("ModelInfer", asked(), self.bearer("infer"))) == [14.0]
        return refusal.value.code().name, told

    def bearer(self, which: str) -> tuple[str, str]:
        return "authorization", f"Bearer {self.guard.keys[which]}"

    def signed(
        self, rpc: str, request: Any, which: str = "infer", now: float | None = None, **headers: str
    ) -> list[tuple[str, str]]:
        more = [(name.replace("_", "-"), value) for name, value in headers.items()]
        parts = Parts("POST", f"/{SERVICE}/{rpc}", headers=more, body=request.SerializeToString(deterministic=True))
        return [("authorization", sign(self.guard.keys[which], parts, now=now)), *more]


class Servicer(OpenInference):
    def __init__(self, repository: Path, guard: Guard, telemetry: RecordingTelemetry) -> None:
        self.surface = surface(repository, access=guard.access(), telemetry=telemetry)
        self.timeout = 30.0


def handlers(servicer: Servicer) -> Any:
    """As `add_to_server` makes them, but answers serialize themselves, as Serve has them do."""
    made = {}
    for rpc, (request, _) in RPCS.items():
        make = grpc.stream_stream_rpc_method_handler if rpc in STREAMS else grpc.unary_unary_rpc_method_handler
        read = MESSAGES[request].FromString
        made[rpc] = make(getattr(servicer, rpc), request_deserializer=read, response_serializer=lambda m: m.SerializeToString())
    return grpc.method_handlers_generic_handler(SERVICE, made)


@pytest.fixture(scope="module")
def guarded(online_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made, telemetry = guard(tmp_path_factory.mktemp("guard")), RecordingTelemetry()
    loop, ready = asyncio.new_event_loop(), threading.Event()
    port = 0

    async def serve() -> None:
        nonlocal port
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handlers(Servicer(online_models, made, telemetry)),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.set()
        await ended.wait()
        await server.stop(0)

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Guarded(service_pb2_grpc.GRPCInferenceServiceStub(channel), made, telemetry)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()


def asked(**fields: Any) -> Any:
    return service_pb2.ModelInferRequest(**{"model_name": "linear", "inputs": [X], **fields})


def answer_of(answer: Any) -> list[float]:
    return list(answer.outputs[0].contents.fp32_contents)


def request_of(rpc: str) -> Any:
    if rpc == "ModelInfer":
        return asked()
    made = getattr(service_pb2, RPCS[rpc][0])()
    for field in "name", "model_name":
        if field in made.DESCRIPTOR.fields_by_name:
            setattr(made, field, "linear")
    return made


@pytest.mark.parametrize("rpc", UNARY)
def test_every_call_wants_credentials_but_those_of_probes(guarded: Guarded, rpc: str) -> None:
    assert guarded.call("ServerLive", service_pb2.ServerLiveRequest()).live
    assert guarded.call("ServerReady", service_pb2.ServerReadyRequest()).ready
    request = request_of(rpc)
    assert guarded.refused(rpc, request)[0] == "UNAUTHENTICATED"
    assert guarded.refused(rpc, request, ("authorization", "Bearer nonsense"))[0] == "UNAUTHENTICATED"
    assert guarded.refused(rpc, request, guarded.bearer("expired"))[0] == "UNAUTHENTICATED"
    operates = rpc in ("RepositoryModelLoad", "RepositoryModelUnload")
    wrong = "infer" if operates else "drain"
    assert guarded.refused(rpc, request, guarded.bearer(wrong))[0] == "PERMISSION_DENIED"
    if operates:
        status, told = guarded.refused(rpc, request, guarded.bearer("operate"))
        assert (status, "triform release" in told) == ("UNIMPLEMENTED", True)  # it names what does it here
    else:
        guarded.call(rpc, request, guarded.bearer("infer"))


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", ""), ("x-forwarded-user", "root")],
        [("x-authorization", "Bearer KEY")],
        [("authorization", "Bearer KEY"), ("authorization", "Bearer KEY")],
        [("authorization", "Bearer KEYx")],
        [("authorization", "bearer  KEY x")],
        [("authorization", "Bearer " + "x" * 4000)],
        [("authorization-bin", b"Bearer KEY")],
    ],
)
def test_hostile_metadata(guarded: Guarded, metadata: list[tuple[str, Any]]) -> None:
    key = guarded.guard.keys["infer"]
    told = [(n, v.replace("KEY", key) if isinstance(v, str) else v.replace(b"KEY", key.encode())) for n, v in metadata]
    assert guarded.refused("ModelInfer", asked(), *told)[0] == "UNAUTHENTICATED"


def test_a_version_of_ones_own_choice_and_loading_need_operate_and_are_on_record(guarded: Guarded) -> None:
    before = len(guarded.guard.audit.read_bytes().splitlines()) if guarded.guard.audit.exists() else 0
    override = ("x-triform-version", "1")
    assert guarded.refused("ModelInfer", asked(), guarded.bearer("infer"), override)[0] == "PERMISSION_DENIED"
    assert answer_of(guarded.call("ModelInfer", asked(), guarded.bearer("operate"), override)) == [14.0]
    assert guarded.refused("ModelInfer", asked(), guarded.bearer("operate"), ("x-triform-version", "9"))[0] == "NOT_FOUND"
    both = asked(model_version="1")
    assert guarded.refused("ModelInfer", both, guarded.bearer("operate"), override)[0] == "INVALID_ARGUMENT"
    assert answer_of(guarded.call("ModelInfer", both, guarded.bearer("infer"))) == [14.0]
    guarded.refused("RepositoryModelLoad", request_of("RepositoryModelLoad"), guarded.bearer("operate"))
    lines = [msgspec.json.decode(line, type=Entry) for line in guarded.guard.audit.read_bytes().splitlines()][before:]
    assert [(line.what, line.target, line.result) for line in lines] == [
        ("version.override", "linear/1", "forbidden"),
        ("version.override", "linear/1", "ok"),
        ("version.override", "linear/9", "version_not_found"),
        ("version.override", "linear/1", "invalid_request"),
        ("RepositoryModelLoad", "linear", "unsupported_method"),
    ]
    assert all("127.0.0.1" in line.where for line in lines)


def test_a_key_is_bound_to_its_models(guarded: Guarded) -> None:
    for rpc in "ModelInfer", "ModelReady", "ModelMetadata":
        assert guarded.refused(rpc, request_of(rpc), guarded.bearer("bound"))[0] == "PERMISSION_DENIED"
    assert guarded.refused("ModelInfer", asked(model_name=""), guarded.bearer("bound"))[0] == "PERMISSION_DENIED"  # the default
    index = guarded.call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), guarded.bearer("bound"))
    assert {model.name for model in index.models} == {"flights"}


def test_signed_calls(guarded: Guarded) -> None:
    raw = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"b": {"int64_param": 1}, "a": {"bool_param": True}}}
    for request in asked(), asked(inputs=[raw], raw_input_contents=[bytes(12)], id="s-1"):
        metadata = guarded.signed("ModelInfer", request)
        guarded.call("ModelInfer", request, *metadata)
        assert guarded.refused("ModelInfer", request, *metadata) == ("UNAUTHENTICATED", "the signature's nonce was used before")
    altered = asked(id="other")
    for rpc, request, metadata in (
        ("ModelInfer", altered, guarded.signed("ModelInfer", asked())),
        ("ModelInfer", asked(), guarded.signed("ModelReady", asked())),
        ("ModelInfer", asked(), [*guarded.signed("ModelInfer", asked(), "operate"), ("x-triform-version", "1")]),
        ("ModelInfer", asked(), guarded.signed("ModelInfer", asked(), now=time.time() - 310)),
        ("ModelInfer", asked(), guarded.signed("ModelInfer", asked(), now=time.time() + 310)),
    ):
        assert guarded.refused(rpc, request, *metadata)[0] == "UNAUTHENTICATED"
    override = guarded.signed("ModelInfer", asked(), "operate", x_triform_version="1")
    assert answer_of(guarded.call("ModelInfer", asked(), *override)) == [14.0]


def stream(guarded: Guarded, requests: list[Any], *metadata: tuple[str, str]) -> list[Any]:
    return list(guarded.stub.ModelStreamInfer(iter(requests), metadata=metadata, timeout=30))


def test_a_stream_wants_a_key_before_it_takes_anything(guarded: Guarded) -> None:
    answers = stream(guarded, [asked(), asked(model_name="nobody"), asked()], guarded.bearer("infer"))
    assert [answer.error_message[:8] for answer in answers] == ["", "no model", ""]
    for requests in [], [asked()]:
        for metadata in [], [("authorization", "Bearer nonsense")], guarded.signed("ModelStreamInfer", asked()):
            with pytest.raises(grpc.RpcError) as refusal:
                stream(guarded, requests, *metadata)
            assert refusal.value.code().name == "UNAUTHENTICATED"
    with pytest.raises(grpc.RpcError) as refusal:
        stream(guarded, [asked()], guarded.bearer("bound"))
    assert refusal.value.code().name == "PERMISSION_DENIED"


def test_who_asked_is_recorded_and_refusals_are_counted(guarded: Guarded) -> None:
    guarded.telemetry.records.clear()
    guarded.call("ModelInfer", asked(), guarded.bearer("infer"))
    guarded.refused("ModelInfer", asked())
    key_id = guarded.guard.keys["infer"].split("_")[1]
    told = [(record.code, record.caller) for record in guarded.telemetry.records]
    assert told == [("ok", f"key:{key_id}"), ("unauthenticated", ""), ("ok", f"key:{key_id}")]
