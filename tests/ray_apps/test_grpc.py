"""The Open Inference Protocol over gRPC: unmodified tritonclient through HAProxy, and what it cannot be made to send."""

from __future__ import annotations

import pickle
import queue
import re
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from ray import cloudpickle
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ray_apps import messages
from ray_apps.messages import MESSAGES
from tests.ray_apps.hosts import grpc_client, metrics_port, served
from tests.ray_apps.load import until
from tests.ray_apps.ports import SERVE_PORTS
from triform.signature import BY_OIP, DATATYPES

ADDRESS = f"127.0.0.1:{SERVE_PORTS.grpc}"


@pytest.fixture(scope="module")
def client(serve_address: tuple[str, int]) -> Iterator[Any]:
    with grpc_client() as client:
        yield client


@pytest.fixture(scope="module")
def stub(client: Any) -> Iterator[Any]:
    with grpc.insecure_channel(ADDRESS) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, array: Any, datatype: str) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def asked(**fields: Any) -> Any:
    """A good request for `linear` in typed contents, but for these fields."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": {"fp32_contents": [1, 2, 3]}}
    return service_pb2.ModelInferRequest(**{"model_name": "linear", "inputs": [x], **fields})


X = {"name": "x", "datatype": "FP32", "shape": [1, 3]}
RAW = np.array([1, 2, 3], np.float32).tobytes()


def test_our_messages_are_those_that_clients_have() -> None:
    for name, made in MESSAGES.items():
        theirs = getattr(service_pb2, name, None)
        if theirs is None:  # theirs is nested in another message
            continue
        known = {f.name: f for f in theirs.DESCRIPTOR.fields}
        for field in made.DESCRIPTOR.fields:
            assert (field.number, field.type) == (known[field.name].number, known[field.name].type), f"{name}.{field.name}"


@pytest.mark.parametrize("pickled", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_messages_go_through_rays_proxy_in_python(pickled: Any) -> None:
    """Which pickles them, and answers while no replica is up."""
    for made in MESSAGES.values():
        assert pickled.loads(pickled.dumps(made())) == made()
    asked = MESSAGES["ModelInferRequest"](model_name="m", raw_input_contents=[RAW])
    asked.inputs.add(**X)
    asked.parameters["k"].int64_param = 3
    assert pickled.loads(pickled.dumps(asked)) == asked
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        messages.Nothing  # noqa: B018


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.get_server_metadata().name == "triform"
    metadata = client.get_model_metadata("linear", "1")
    assert (metadata.name, list(metadata.versions), list(metadata.inputs[0].shape)) == ("linear", ["1"], [-1, 3])
    index = {(m.name, m.version, m.state) for m in client.get_model_repository_index().models}
    assert ("linear", "1", "READY") in index


def test_raw_contents(client: Any) -> None:
    answer = client.infer("linear", [tensor("x", np.array([[1, 2, 3], [4, 5, 6]], np.float32), "FP32")], request_id="g-1")
    assert answer.as_numpy("y").tolist() == [[14.0], [32.0]]
    told = answer.get_response()
    assert (told.id, told.model_name, told.model_version) == ("g-1", "linear", "1")


def test_typed_contents_are_answered_alike(stub: Any) -> None:
    answer = stub.ModelInfer(asked(), timeout=60)
    assert list(answer.outputs[0].contents.fp32_contents) == [14.0]
    assert list(answer.raw_output_contents) == []


def test_every_datatype(client: Any) -> None:
    arrays = {}
    for d in DATATYPES:
        if d.oip == "BYTES":
            arrays[d.oip] = np.array([b"\x00", "ä".encode()], dtype=object)
        elif d.oip == "BOOL":
            arrays[d.oip] = np.array([True, False])
        elif BY_OIP[d.oip].numpy.kind == "f":
            arrays[d.oip] = np.array([np.nan, -np.inf], BY_OIP[d.oip].numpy)
        else:
            info = np.iinfo(BY_OIP[d.oip].numpy)
            arrays[d.oip] = np.array([info.min, info.max], BY_OIP[d.oip].numpy)
    answer = client.infer("every", [tensor(f"in_{name}", array, name) for name, array in arrays.items()])
    for name, array in arrays.items():
        assert answer.as_numpy(f"out_{name}").tobytes() == array.tobytes() or name == "BYTES", name
    assert answer.as_numpy("out_BYTES").tolist() == arrays["BYTES"].tolist()


def test_a_stream_answers_in_order_and_outlives_an_error(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    try:
        for value in (1, 99, 2):
            client.async_stream_infer("lookup", [tensor("x", np.array([value], np.int64), "INT64")])
        found = [answers.get(timeout=60) for _ in range(3)]
    finally:
        client.stop_stream()
    assert [result.as_numpy("y").tolist() if error is None else "refused" for result, error in found] == [
        [10.0],
        "refused",
        [20.0],
    ]


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        (asked(model_name="nobody"), "NOT_FOUND", "no model 'nobody'"),
        (asked(model_version="9"), "NOT_FOUND", "has no version 9"),
        (asked(model_version="one"), "NOT_FOUND", "positive integers"),
        (asked(inputs=[]), "INVALID_ARGUMENT", "inputs"),
        (asked(inputs=[X, X], raw_input_contents=[RAW, RAW]), "INVALID_ARGUMENT", "given twice"),
        (asked(inputs=[X], raw_input_contents=[RAW, RAW]), "INVALID_ARGUMENT", "has 2 tensors, inputs has 1"),
        (asked(raw_input_contents=[RAW]), "INVALID_ARGUMENT", "both in raw_input_contents and in contents"),
        (asked(inputs=[X], raw_input_contents=[RAW[:-1]]), "INVALID_ARGUMENT", "bytes"),
        (asked(inputs=[X | {"shape": [1, -3]}], raw_input_contents=[RAW]), "INVALID_ARGUMENT", "shape"),
        (asked(inputs=[X | {"shape": [2**62, 4]}], raw_input_contents=[RAW]), "INVALID_ARGUMENT", "shape"),
        (asked(inputs=[X]), "INVALID_ARGUMENT", "elements"),
        (asked(inputs=[X | {"contents": {"int_contents": [1, 2, 3]}}]), "INVALID_ARGUMENT", "stands in fp32_contents"),
        (asked(inputs=[X | {"datatype": "FP16"}]), "INVALID_ARGUMENT", "raw_input_contents"),
        (asked(inputs=[X | {"datatype": "FP31"}], raw_input_contents=[RAW]), "INVALID_ARGUMENT", "FP31"),
        (
            asked(inputs=[X | {"parameters": {"shared_memory_region": {"string_param": "r"}}}], raw_input_contents=[RAW]),
            "INVALID_ARGUMENT",
            "shared memory",
        ),
        (asked(outputs=[{"name": "z"}]), "INVALID_ARGUMENT", "no output is called 'z'"),
        (
            asked(inputs=[X | {"shape": [1_500_000, 3]}], raw_input_contents=[RAW * 1_500_000]),
            "RESOURCE_EXHAUSTED",
            "are allowed",
        ),
    ],
)
def test_refused(stub: Any, request_: Any, status: str, told: str) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        stub.ModelInfer(request_, timeout=60)
    assert (refusal.value.code().name, told in refusal.value.details()) == (status, True), refusal.value.details()
    assert not any(trace in refusal.value.details() for trace in ("Traceback", ".py"))
    assert list(stub.ModelInfer(asked(), timeout=60).outputs[0].contents.fp32_contents) == [14.0]


def test_load_and_unload_are_not_for_anonymous_callers(client: Any) -> None:
    for call in client.load_model, client.unload_model:
        with pytest.raises(triton.InferenceServerException, match="operate") as refusal:
            call("linear")
        assert refusal.value.status() == "StatusCode.UNAUTHENTICATED"


COUNTED = re.compile(r"^ray_serve_grpc_request_latency_ms_count\{([^}]*ModelInfer\"[^}]*)\} (\S+)$", re.M)


def test_serve_counts_calls(stub: Any, ray_cluster: Any, online_models: Path) -> None:
    """Each once, in gauges, which are told every five seconds; of an application that nobody else has asked."""
    name = f"counted-{uuid.uuid4().hex[:8]}"
    page = f"http://127.0.0.1:{metrics_port(ray_cluster)}/metrics"

    def told() -> tuple[float, str]:
        with urllib.request.urlopen(page, timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(count) for labels, count in COUNTED.findall(text) if f'application="{name}"' in labels), text

    with served(online_models, f"/{name}", name):
        for _ in range(3):
            stub.ModelInfer(asked(), metadata=[("application", name)], timeout=30)
        until(lambda: told()[0] >= 3)
        count, text = told()
    assert count == 3
    assert "# TYPE ray_serve_grpc_request_latency_ms_bucket gauge" in text
