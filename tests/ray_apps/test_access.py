"""The application on Ray Serve, behind HAProxy, that lets in whom it knows: HTTP and gRPC. The cases are in tests/conformance."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.conformance.test_access import PROBED, Guard, guard
from tests.ray_apps.hosts import served
from tests.ray_apps.ports import SERVE_PORTS

BELOW, NAME = "/guarded", "guarded"
PREDICT, GOOD, ANSWER = "/v1/models/text:predict", b'{"instances": ["a"]}', b'{"predictions":["a"]}'


class Guarded(NamedTuple):
    guard: Guard
    stub: Any

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", SERVE_PORTS.http, timeout=60)
        try:
            connection.request(method, BELOW + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()


@pytest.fixture(scope="module")
def guarded(ray_cluster: Any, online_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = guard(tmp_path_factory.mktemp("guard"))
    access = {"allow_anonymous": False, "api_keys_file": str(made.file), "nonces": "memory", "audit": str(made.audit)}
    with (
        served(online_models, BELOW, NAME, models=["text"], default_model="text", **access),
        grpc.insecure_channel(f"127.0.0.1:{SERVE_PORTS.grpc}") as channel,
    ):
        yield Guarded(made, service_pb2_grpc.GRPCInferenceServiceStub(channel))


def test_http(guarded: Guarded) -> None:
    """A signature is over the path below the application's own."""
    keys = guarded.guard
    assert [guarded.send("GET", path, {})[0] for path in PROBED] == [200, 200, 200]
    status, body, headers = guarded.send("POST", PREDICT, {}, GOOD)
    assert (status, b'"code":"unauthenticated"' in body, headers["content-type"]) == (401, True, "application/json")
    assert "Bearer" in headers["www-authenticate"]
    assert guarded.send("POST", PREDICT, keys.bearer("infer"), GOOD)[:2] == (200, ANSWER)
    assert guarded.send("POST", PREDICT, keys.bearer("bound"), GOOD)[0] == 403
    assert guarded.send("POST", PREDICT, keys.bearer("infer", x_triform_version="1"), GOOD)[0] == 403
    assert guarded.send("POST", PREDICT, keys.bearer("operate", x_triform_version="1"), GOOD)[:2] == (200, ANSWER)
    path = f"{PREDICT}?b=%2F%20x&a=1"
    signed = keys.signed("POST", path, GOOD, content_type="application/json")
    assert guarded.send("POST", path, signed, GOOD)[:2] == (200, ANSWER)
    assert guarded.send("POST", path, signed, GOOD)[0] == 401
    assert guarded.send("POST", path, keys.signed("POST", path, GOOD), GOOD + b" ")[0] == 401
    assert keys.audit.read_text().count('"version.override"') == 2


def stream_refused(guarded: Guarded, request: Any, metadata: list[tuple[str, str]]) -> str:
    """The status of a stream that gets no answers. While HAProxy takes the replica for dead (on a busy machine) Serve's proxy in
    Python hands it on, and that passes a status on with a message only: "OK"."""
    try:
        assert list(guarded.stub.ModelStreamInfer(iter([request]), metadata=metadata, timeout=60)) == []
    except grpc.RpcError as refusal:
        return str(refusal.code().name)
    return "OK"


def test_grpc(guarded: Guarded) -> None:
    x = {"name": "x", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"a"]}}
    request = service_pb2.ModelInferRequest(model_name="text", inputs=[x])
    to, key = ("application", NAME), ("authorization", guarded.guard.bearer("infer")["Authorization"])
    assert guarded.stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=[to], timeout=60).live
    assert guarded.stub.ServerReady(service_pb2.ServerReadyRequest(), metadata=[to], timeout=60).ready
    answer = guarded.stub.ModelInfer(request, metadata=[to, key], timeout=60)
    assert list(answer.outputs[0].contents.bytes_contents) == [b"a"]
    streamed = list(guarded.stub.ModelStreamInfer(iter([request, request]), metadata=[to, key], timeout=60))
    assert [answer.error_message for answer in streamed] == ["", ""]
    for metadata in [to], [to, ("authorization", "Bearer nonsense")]:
        with pytest.raises(grpc.RpcError) as refusal:
            guarded.stub.ModelInfer(request, metadata=metadata, timeout=60)
        assert refusal.value.code().name == "UNAUTHENTICATED"
        assert "UNAUTHENTICATED" in {stream_refused(guarded, request, metadata) for _ in range(5)}
    with pytest.raises(grpc.RpcError) as refusal:
        guarded.stub.ModelInfer(request, metadata=[to, key, ("x-triform-version", "1")], timeout=60)
    assert refusal.value.code().name == "PERMISSION_DENIED"
