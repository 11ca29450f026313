"""Open Inference Protocol, version 2, HTTP/REST with JSON bodies. Each case names the section that it holds the host to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

import triform
from tests.conformance.hosts import Send

INFER = "/v2/models/linear/infer"
X = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}


def get(send: Send, path: str) -> Any:
    answer = send("GET", path)
    assert answer.status == 200, answer
    return orjson.loads(answer.body)


def test_live_and_ready(send: Send) -> None:
    """Server Live, Server Ready, Model Ready: 200 is true."""
    assert get(send, "/v2/health/live") == {"live": True}
    assert get(send, "/v2/health/ready") == {"ready": True}
    assert get(send, "/v2/models/linear/ready") == {"name": "linear", "ready": True}
    assert get(send, "/v2/models/linear/versions/1/ready") == {"name": "linear", "ready": True}


def test_server_metadata(send: Send) -> None:
    """Server Metadata Response JSON Object."""
    assert get(send, "/v2") == {"name": "triform", "version": triform.__version__, "extensions": ["binary_tensor_data"]}


@pytest.mark.parametrize("path", ["/v2/models/linear", "/v2/models/linear/versions/1"])
def test_model_metadata(send: Send, path: str) -> None:
    """Model Metadata Response JSON Object; a variable-size dimension is -1 (Tensor Metadata)."""
    assert get(send, path) == {
        "name": "linear",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
    }


@pytest.mark.parametrize("path", [INFER, "/v2/models/linear/versions/1/infer"])
def test_infer(send: Send, path: str) -> None:
    """Inference Request and Response JSON Object, with and without a version."""
    answer = send("POST", path, {}, orjson.dumps({"id": "42", "inputs": [X]}))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["x-triform-model"] == "linear/1"
    assert orjson.loads(answer.body) == {
        "id": "42",
        "model_name": "linear",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 1], "data": [14.0, 32.0]}],
    }


def test_an_answer_has_an_id_if_the_request_has_one(post: Callable[..., Any]) -> None:
    """Inference Response JSON Object: "id" is the request's, or absent."""
    assert "id" not in post(INFER, {"inputs": [X]})
    assert post(INFER, {"id": "", "inputs": [X]})["id"] == ""


def test_data_may_be_nested(post: Callable[..., Any]) -> None:
    """Tensor Data: nested in the tensor's shape, or flat in row-major order."""
    nested = {**X, "data": [[1, 2, 3], [4, 5, 6]]}
    assert post(INFER, {"inputs": [nested]}) == post(INFER, {"inputs": [X]})


def test_parameters_that_mean_nothing_here_change_nothing(post: Callable[..., Any]) -> None:
    """Parameters: an object that a server may know or not."""
    asked = {"inputs": [{**X, "parameters": {"a": 1}}], "parameters": {"b": "c"}, "outputs": [{"name": "y", "parameters": {}}]}
    assert post(INFER, asked)["outputs"][0]["data"] == [14.0, 32.0]


def test_null_is_as_good_as_nothing(post: Callable[..., Any]) -> None:
    """Inference Request JSON Object: what is optional; some clients write null for what they do not say."""
    asked = {"id": None, "parameters": None, "outputs": None, "inputs": [{**X, "parameters": None}]}
    assert post(INFER, asked) == post(INFER, {"inputs": [X]})


def every(**given: Any) -> list[dict[str, Any]]:
    """An input of each of the 13 datatypes; `INT64=[1]` gives data."""
    data = {name: ["a"] if name == "BYTES" else [True] if name == "BOOL" else [1] for name in triform.signature.BY_OIP} | given
    return [{"name": f"in_{name}", "shape": [len(v)], "datatype": name, "data": v} for name, v in data.items()]


def test_the_outputs_that_are_asked_for_in_their_order(post: Callable[..., Any]) -> None:
    """Inference Request JSON Object: "outputs", if given, are all that is returned."""
    wanted = [{"name": "out_BYTES"}, {"name": "out_BOOL"}]
    assert post("/v2/models/every/infer", {"inputs": every(), "outputs": wanted})["outputs"] == [
        {"name": "out_BYTES", "datatype": "BYTES", "shape": [1], "data": ["a"]},
        {"name": "out_BOOL", "datatype": "BOOL", "shape": [1], "data": [True]},
    ]


EXTREMES = {
    "INT64": [-(2**63), 2**63 - 1, 2**53 + 1],
    "UINT64": [0, 2**64 - 1, 2**53 + 1],
    "INT8": [-128, 127, 0],
    "UINT8": [0, 255, 1],
    "INT16": [-(2**15), 2**15 - 1, 0],
    "UINT16": [0, 2**16 - 1, 1],
    "INT32": [-(2**31), 2**31 - 1, 0],
    "UINT32": [0, 2**32 - 1, 1],
    "FP64": [5e-324, 1.7976931348623157e308, -0.1],
    "FP32": [1.401298464324817e-45, 3.4028234663852886e38, -0.0],
    "FP16": [5.960464477539063e-08, 65504.0, -1.5],
    "BOOL": [True, False, True],
    "BYTES": ["", "naïve ☃ \U0001f600", 'quote " and colon ":'],
}


@pytest.mark.parametrize("datatype", EXTREMES)
def test_every_digit_of_every_datatype_comes_back(post: Callable[..., Any], datatype: str) -> None:
    """Tensor Data Types; Tensor Data: a number's JSON is exact, INT64 beyond 2^53 included."""
    asked = every(**{name: values * 1 for name, values in EXTREMES.items()})
    (output,) = post("/v2/models/every/infer", {"inputs": asked, "outputs": [{"name": f"out_{datatype}"}]})["outputs"]
    assert output["datatype"] == datatype
    if datatype in ("FP32", "FP16"):  # written with the digits that their precision needs
        import numpy as np

        kind = np.float32 if datatype == "FP32" else np.float16
        assert np.array(output["data"], kind).tobytes() == np.array(EXTREMES[datatype], kind).tobytes()
    else:
        assert output["data"] == EXTREMES[datatype]
        assert [type(v) for v in output["data"]] == [type(v) for v in EXTREMES[datatype]]


def test_no_rows(post: Callable[..., Any]) -> None:
    """Tensor Data: a shape may hold 0."""
    (output,) = post(INFER, {"inputs": [{"name": "x", "shape": [0, 3], "datatype": "FP32", "data": []}]})["outputs"]
    assert (output["shape"], output["data"]) == ([0, 1], [])


def test_columns_that_the_package_maps(post: Callable[..., Any]) -> None:
    """Inference Request JSON Object, with the columns of model.toml as inputs: null means what the column says."""
    columns = [
        {"name": "carrier", "shape": [2], "datatype": "BYTES", "data": ["UA", "AA"]},
        {"name": "hour", "shape": [2, 1], "datatype": "FP32", "data": [[7], [None]]},
        {"name": "distance", "shape": [2], "datatype": "INT32", "data": [100, 5]},
    ]
    outputs = post("/v2/models/flights/infer", {"inputs": columns})["outputs"]
    assert {o["name"]: (o["datatype"], o["shape"], o["data"]) for o in outputs} == {
        "p_on_time": ("FP32", [2], [100.0, 5.0]),
        "p_late": ("FP32", [2], [7.0, None]),
        "outcome": ("BYTES", [2], ["on time", outputs[2]["data"][1]]),
        "airline": ("BYTES", [2], ["UA", "AA"]),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "hours"}, "input 'hours': no column is called so: expected distance, hour, carrier"),
        ({"data": [True]}, "input 'hour': expected FP32, got booleans"),
        ({"data": ["7"]}, "input 'hour': expected FP32, got text"),
        ({"shape": [2]}, "input 'hour': shape [2], but data has 1 elements"),
    ],
)
def test_columns_that_do_not_fit(send: Send, refused: Callable[..., str], change: dict[str, Any], told: str) -> None:
    """Inference Request JSON Object, with the columns of model.toml as inputs: each is asked for by its name."""
    columns = [
        {"name": "carrier", "shape": [1], "datatype": "BYTES", "data": ["UA"]},
        {"name": "distance", "shape": [1], "datatype": "FP32", "data": [1]},
        {"name": "hour", "shape": [1], "datatype": "FP32", "data": [7]} | change,
    ]
    answer = send("POST", "/v2/models/flights/infer", {}, orjson.dumps({"inputs": columns}))
    assert told in refused(answer, 400, "invalid_input")


def test_a_column_of_booleans_is_0_and_1(post: Callable[..., Any]) -> None:
    """Tensor Data Types: BOOL, for a column that feeds numbers, as that of a Parquet file may."""
    columns = [
        {"name": "carrier", "shape": [2], "datatype": "BYTES", "data": ["UA", "AA"]},
        {"name": "distance", "shape": [2], "datatype": "BOOL", "data": [True, False]},
    ]
    outputs = post("/v2/models/flights/infer", {"inputs": columns, "outputs": [{"name": "p_on_time"}]})["outputs"]
    assert outputs[0]["data"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/models/nobody/infer", "model_not_found"),
        ("/v2/models/linear/versions/2/infer", "version_not_found"),
        ("/v2/models/linear/versions/01/infer", "version_not_found"),
        ("/v2/models/linear/versions/-1/infer", "version_not_found"),
        ("/v2/models/linear/versions/latest/infer", "version_not_found"),
        ("/v2/models/..%2fetc/infer", "route_not_found"),
        ("/v2/models/a%2f../infer", "route_not_found"),
        ("/v2/models/%00/infer", "model_not_found"),
        ("/v2/models/%ff/infer", "model_not_found"),
        ("/v2/models/linear/versions/1/explain", "route_not_found"),
        ("/v2/repository/index", "route_not_found"),
    ],
)
def test_what_is_not_there(send: Send, refused: Callable[..., str], path: str, code: str) -> None:
    """Inference Response JSON Error Object: a 4xx for what does not exist."""
    refused(send("POST", path, {}, orjson.dumps({"inputs": [X]})), 404, code)
