"""NVIDIA's own client, unmodified, over a socket: what its users send, this surface answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from tests.conformance.models import surface
from tests.conformance.server import serve
from triform.http import HttpRequest
from triform.signature import BY_OIP


@pytest.fixture(scope="module", params=["loopback", pytest.param("serve", marks=pytest.mark.xdist_group("ray"))])
def client(request: pytest.FixtureRequest, online_models: Path) -> Iterator[triton.InferenceServerClient]:
    """Of the surface behind Python's HTTP server, and of the application on Ray Serve behind HAProxy."""
    with ExitStack() as stack:
        if request.param == "serve":
            host, port = request.getfixturevalue("serve_address")
            address = f"{host}:{port}"
        else:
            address = stack.enter_context(serve(surface(online_models)))
        yield stack.enter_context(triton.InferenceServerClient(address))


def linear(rows: int, *, binary: bool) -> list[triton.InferInput]:
    given = triton.InferInput("x", [rows, 3], "FP32")
    given.set_data_from_numpy(np.arange(rows * 3, dtype=np.float32).reshape(rows, 3), binary_data=binary)
    return [given]


def expected(rows: int) -> Any:
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) @ np.array([[1], [2], [3]], np.float32)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("linear", "2")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("linear", "1")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


@pytest.mark.parametrize("sent", [True, False], ids=["binary", "JSON"])
@pytest.mark.parametrize("answered", [True, False], ids=["to binary", "to JSON"])
@pytest.mark.parametrize("version", ["", "1"])
def test_infer(client: triton.InferenceServerClient, sent: bool, answered: bool, version: str) -> None:
    wanted = [triton.InferRequestedOutput("y", binary_data=answered)]
    result = client.infer("linear", linear(5, binary=sent), version, outputs=wanted, request_id="7")
    assert np.array_equal(result.as_numpy("y"), expected(5))
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("7", "linear", "1")


def test_without_outputs_all_come_back(client: triton.InferenceServerClient) -> None:
    assert np.array_equal(client.infer("linear", linear(2, binary=True)).as_numpy("y"), expected(2))


@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("answered", ["gzip", "deflate", None])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_compression(client: triton.InferenceServerClient, sent: str | None, answered: str | None, binary: bool) -> None:
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    result = client.infer(
        "linear",
        linear(2000, binary=binary),
        outputs=wanted,
        request_compression_algorithm=sent,
        response_compression_algorithm=answered,
    )
    assert np.array_equal(result.as_numpy("y"), expected(2000))


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_every_datatype(client: triton.InferenceServerClient, binary: bool) -> None:
    """FP16 goes in binary only: the client itself refuses it in JSON."""
    arrays = {name: _sample(name) for name in BY_OIP}
    inputs = []
    for name, array in arrays.items():
        given = triton.InferInput(f"in_{name}", [2], name)
        given.set_data_from_numpy(array, binary_data=binary or name == "FP16")
        inputs.append(given)
    wanted = [triton.InferRequestedOutput(f"out_{name}", binary_data=binary or name == "FP16") for name in arrays]
    result = client.infer("every", inputs, outputs=wanted)
    for name, array in arrays.items():
        answer = result.as_numpy(f"out_{name}")
        if name == "BYTES":
            assert [t if isinstance(t, bytes) else t.encode() for t in answer.tolist()] == array.tolist()
        else:
            assert (answer.dtype, answer.tobytes()) == (array.dtype, array.tobytes())


def _sample(name: str) -> Any:
    dtype = BY_OIP[name].numpy
    if name == "BYTES":
        return np.array(["naïve ☃".encode(), b""], dtype=object)
    if dtype.kind in "iu":
        return np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    return np.array([1, 0] if name == "BOOL" else [0.1, -2.5], dtype)


def test_an_error_is_the_clients_own(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton.InferenceServerException, match="no model 'nobody'"):
        client.infer("nobody", linear(1, binary=True))
    with pytest.raises(triton.InferenceServerException, match="no output is called 'z'"):
        client.infer("linear", linear(1, binary=True), outputs=[triton.InferRequestedOutput("z")])
    assert np.array_equal(client.infer("linear", linear(1, binary=True)).as_numpy("y"), expected(1))


def test_a_body_that_the_client_made_for_another_transport(online_models: Path) -> None:
    """What `generate_request_body` makes is read as it is, and the answer by `parse_response_body`."""
    body, length = triton.InferenceServerClient.generate_request_body(linear(3, binary=True))
    headers = [("Inference-Header-Content-Length", str(length))]
    answer = surface(online_models).handle(HttpRequest("POST", "/v2/models/linear/infer", headers, body))
    size = int(answer.headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(answer.body, header_length=size)
    assert np.array_equal(result.as_numpy("y"), expected(3))
