"""The binary tensor data extension: Triton Inference Server, protocol/extension_binary_data."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson
import pytest

from tests.conformance.hosts import Answer, Send
from triform.protocols.bodies import MAX_VALUES
from triform.signature import DATATYPES

LENGTH = "inference-header-content-length"
INFER = "/v2/models/linear/infer"
X = np.array([[1, 2, 3], [4, 5, 6]], "<f4").tobytes()
BINARY: Mapping[str, Any] = {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}}


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def infer(send: Send, asked: Any, tail: bytes, path: str = INFER, **headers: str) -> Answer:
    header = orjson.dumps(asked)
    told = {"content-type": "application/octet-stream", LENGTH: str(len(header))} | headers
    return send("POST", path, told, header + tail)


def outputs(answer: Answer) -> dict[str, Any]:
    """Each output: its values in JSON, or its bytes."""
    assert answer.status == 200, answer
    size = int(answer.headers.get(LENGTH, len(answer.body)))
    header, at, found = orjson.loads(answer.body[:size]), size, {}
    for output in header["outputs"]:
        length = output.get("parameters", {}).get("binary_data_size")
        found[output["name"]] = output["data"] if length is None else answer.body[at : at + length]
        at += length or 0
    assert at == len(answer.body)
    return found


def test_binary_in_json_out(send: Send) -> None:
    """Binary Tensor Request: binary_data_size per input, the bytes after the JSON; without more the answer is JSON."""
    answer = infer(send, {"inputs": [BINARY]}, X)
    assert (answer.headers["content-type"], LENGTH in answer.headers) == ("application/json", False)
    assert outputs(answer) == {"y": [14.0, 32.0]}


@pytest.mark.parametrize(
    "asked", [{"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, {"parameters": {"binary_data_output": True}}]
)
def test_binary_out(send: Send, asked: dict[str, Any]) -> None:
    """Binary Tensor Response: by `binary_data` of an output, or by `binary_data_output` for all."""
    answer = infer(send, {"inputs": [BINARY], **asked}, X)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert outputs(answer) == {"y": np.array([14, 32], "<f4").tobytes()}


def test_an_outputs_own_word_counts_more(send: Send) -> None:
    """Binary Tensor Request: `binary_data` of an output overrides `binary_data_output` of the request."""
    asked = {
        "inputs": [BINARY],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
    }
    assert outputs(infer(send, asked, X)) == {"y": [14.0, 32.0]}


def test_json_in_binary_out(send: Send) -> None:
    """Binary Tensor Response: what comes in JSON may go out in binary."""
    asked = {"inputs": [{**BINARY, "parameters": {}, "data": [1, 2, 3, 4, 5, 6]}], "parameters": {"binary_data_output": True}}
    answer = send("POST", INFER, {"content-type": "application/json"}, orjson.dumps(asked))
    assert outputs(answer) == {"y": np.array([14, 32], "<f4").tobytes()}


SAMPLES = {
    "BOOL": b"\x01\x00",
    "BYTES": texts("naïve".encode(), b""),
    "FP16": np.array([1.5, np.nan], "<f2").tobytes(),
    "FP32": np.array([np.inf, -0.0], "<f4").tobytes(),
    "FP64": np.array([-np.inf, 5e-324], "<f8").tobytes(),
} | {
    d.oip: np.array([np.iinfo(d.numpy).min, np.iinfo(d.numpy).max], d.numpy).tobytes() for d in DATATYPES if d.numpy.kind in "iu"
}


@pytest.mark.parametrize("space", range(4))
def test_every_datatype_bit_by_bit(send: Send, space: int) -> None:
    """Binary Tensor Request: little-endian, row-major, a BYTES element after its length; at any offset; NaN, infinity."""
    names = [d.oip for d in DATATYPES]
    inputs = [
        {"name": f"in_{n}", "shape": [2], "datatype": n, "parameters": {"binary_data_size": len(SAMPLES[n])}} for n in names
    ]
    asked = {"id": " " * space, "inputs": inputs, "parameters": {"binary_data_output": True}}
    answer = infer(send, asked, b"".join(SAMPLES[n] for n in names), "/v2/models/every/infer")
    assert outputs(answer) == {f"out_{n}": SAMPLES[n] for n in names}


def test_some_in_json_some_in_binary(send: Send) -> None:
    """Binary Tensor Request: inputs of both kinds; the bytes stand in the order of the inputs that have them."""
    inputs = [
        {"name": f"in_{d.oip}", "shape": [2], "datatype": d.oip, "parameters": {"binary_data_size": len(SAMPLES[d.oip])}}
        for d in DATATYPES
    ]
    inputs[5] = {"name": "in_INT8", "shape": [2], "datatype": "INT8", "data": [-5, 6]}
    assert DATATYPES[5].oip == "INT8"
    asked = {"inputs": inputs, "outputs": [{"name": "out_INT8"}, {"name": "out_INT16", "parameters": {"binary_data": True}}]}
    tail = b"".join(SAMPLES[d.oip] for d in DATATYPES if d.oip != "INT8")
    answer = infer(send, asked, tail, "/v2/models/every/infer")
    assert outputs(answer) == {"out_INT8": [-5, 6], "out_INT16": SAMPLES["INT16"]}


def test_raw(send: Send) -> None:
    """Raw Binary Request: header length 0, the body is the only input's bytes; the answer is binary."""
    answer = send("POST", INFER, {"content-type": "application/octet-stream", LENGTH: "0"}, X)
    assert outputs(answer) == {"y": np.array([14, 32], "<f4").tobytes()}


def test_raw_text(send: Send) -> None:
    """Raw Binary Request: of a BYTES input the body is one element, without a length."""
    answer = send("POST", "/v2/models/text/infer", {"content-type": "application/octet-stream", LENGTH: "0"}, b"hello")
    assert outputs(answer) == {"y": texts(b"hello")}


def test_columns_that_the_package_maps_in_binary(send: Send) -> None:
    """Binary Tensor Request, with the columns of model.toml as inputs."""
    columns = [
        {"name": "distance", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
        {"name": "hour", "shape": [1, 1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
        {"name": "carrier", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
    ]
    tail = struct.pack("<fq", 3.5, 2) + texts(b"UA")
    wanted = [{"name": "p_on_time"}, {"name": "airline", "parameters": {"binary_data": True}}, {"name": "outcome"}]
    answer = infer(send, {"inputs": columns, "outputs": wanted}, tail, "/v2/models/flights/infer")
    assert outputs(answer) == {"p_on_time": [3.5], "airline": texts(b"UA"), "outcome": ["on time"]}


@pytest.mark.parametrize("length", ["99999999999", "-1", "abc", "", "1e1", "0x10", "\u0663", "9" * 5000])
def test_a_header_length_that_cannot_be(send: Send, refused: Callable[..., str], length: str) -> None:
    """Binary Tensor Request: Inference-Header-Content-Length is the size of the JSON."""
    refused(infer(send, {"inputs": [BINARY]}, X, **{LENGTH: length.encode().decode("latin-1")}), 400, "invalid_request")


def test_a_header_length_that_is_sent_twice(send: Send, refused: Callable[..., str]) -> None:
    """RFC 9110, 5.3: a field that is no list stands once."""
    body = orjson.dumps({"inputs": [BINARY]})
    answer = send("POST", INFER, {LENGTH: str(len(body)), LENGTH.title(): str(len(body))}, body + X)
    refused(answer, 400, "invalid_request")


def test_more_texts_than_can_be_read_soon(send: Send, refused: Callable[..., str]) -> None:
    """Binary Tensor Request: packed, so many empty texts are few bytes."""
    count = MAX_VALUES + 1
    asked = orjson.dumps({"inputs": [{**TEXT, "shape": [count], "parameters": {"binary_data_size": 4 * count}}]})
    headers = {LENGTH: str(len(asked)), "content-encoding": "gzip"}
    answer = send("POST", "/v2/models/text/infer", headers, gzip.compress(asked + bytes(4 * count), 1))
    assert "more than 2,097,152 values" in refused(answer, 413, "payload_too_large")


def test_a_header_length_beyond_the_body(send: Send, refused: Callable[..., str]) -> None:
    """Binary Tensor Request: Inference-Header-Content-Length is at most the body's."""
    body = orjson.dumps({"inputs": [BINARY]}) + X
    assert "but the body has" in refused(send("POST", INFER, {LENGTH: str(len(body) + 1)}, body), 400, "invalid_request")


def changed(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**BINARY, **changes}]}


def sized(size: Any, **changes: Any) -> dict[str, Any]:
    return changed(parameters={"binary_data_size": size}, **changes)


BAD: Mapping[str, tuple[Any, bytes]] = {
    "negative": (sized(-24), X),
    "not a number": (sized("24"), X),
    "true": (sized(True), X),
    "a fraction": (sized(24.0), X),
    "beyond the body": (sized(28), X),
    "less than the body": (sized(20, shape=[5], datatype="FP32"), X),
    "trailing bytes": (changed(), X + b"\0"),
    "cut": (changed(), X[:-1]),
    "nothing": (changed(), b""),
    "both": (changed(data=[1, 2, 3, 4, 5, 6]), X),
    "neither": (changed(parameters={}), b""),
    "another shape": (changed(shape=[2, 4]), X),
    "a shape that wraps": (changed(shape=[2**4, 2**60 + 2]), X),
    "a shape that wraps within limits": (changed(shape=[2**32, 2**32]), X),
    "no elements, too large": (sized(0, shape=[0, 2**53, 2**53]), b""),
    "another datatype": (changed(datatype="INT32"), X),
    "no datatype": (changed(datatype="FP8"), X),
    "lower case": (changed(datatype="fp32"), X),
    "shared memory": (changed(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 24}), b""),
    "shared memory for an output": (
        {"inputs": [BINARY], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
        X,
    ),
    "classification": ({"inputs": [BINARY], "outputs": [{"name": "y", "parameters": {"classification": 2}}]}, X),
    "binary_data that is no flag": ({"inputs": [BINARY], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, X),
    "binary_data_output that is no flag": ({"inputs": [BINARY], "parameters": {"binary_data_output": "yes"}}, X),
    "parameters that are none": (changed(parameters=[1]), X),
}


@pytest.mark.parametrize("case", BAD)
def test_sizes_that_do_not_add_up(send: Send, refused: Callable[..., str], case: str) -> None:
    """Binary Tensor Request: what is not the specification's is a 400."""
    asked, tail = BAD[case]
    answer = infer(send, asked, tail)
    refused(answer, 400, orjson.loads(answer.body)["code"])
    assert orjson.loads(answer.body)["code"] in ("invalid_request", "invalid_input")


TEXT = {"name": "x", "shape": [2], "datatype": "BYTES"}


@pytest.mark.parametrize(
    "tail",
    [
        b"\xff\xff\xff\xff\x01\x00\x00\x00",
        texts(b"a", b"b")[:-1],
        texts(b"a") + b"\x01\x00",
        texts(b"a", b"b", b"c"),
        texts(b"a"),
        b"",
        texts(b"\xff\xfe", b"b"),
    ],
)
def test_text_that_is_cut_or_lies(send: Send, refused: Callable[..., str], tail: bytes) -> None:
    """Binary Tensor Request: each element of BYTES follows its length, four bytes, little-endian."""
    asked = {"inputs": [{**TEXT, "parameters": {"binary_data_size": len(tail)}}]}
    refused(infer(send, asked, tail, "/v2/models/text/infer"), 400, "invalid_input")


def test_more_elements_than_bytes_are_refused_before_anything_is_allocated(send: Send, refused: Callable[..., str]) -> None:
    """Binary Tensor Request: a shape of 2^53 empty texts in eight bytes."""
    asked = {"inputs": [{**TEXT, "shape": [2**53], "parameters": {"binary_data_size": 8}}]}
    assert "do not fit" in refused(infer(send, asked, bytes(8), "/v2/models/text/infer"), 400, "invalid_input")


@pytest.mark.parametrize(("datatype", "data"), [("BOOL", b"\x02\x00"), ("FP16", b"\x00\x00\x00")])
def test_bytes_that_are_no_values(send: Send, refused: Callable[..., str], datatype: str, data: bytes) -> None:
    """Binary Tensor Request: a BOOL is a byte of 0 or 1, an FP16 two bytes."""
    names = [d.oip for d in DATATYPES]
    samples = SAMPLES | {datatype: data}
    inputs = [
        {"name": f"in_{n}", "shape": [2], "datatype": n, "parameters": {"binary_data_size": len(samples[n])}} for n in names
    ]
    answer = infer(send, {"inputs": inputs}, b"".join(samples[n] for n in names), "/v2/models/every/infer")
    assert datatype in refused(answer, 400, "invalid_input")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v2/models/every/infer", b"\0"), (INFER, X[:-4]), (INFER, X[:-1]), (INFER, b""), ("/v2/models/text/infer", b"\xff")],
)
def test_raw_bodies_that_make_no_rows(send: Send, refused: Callable[..., str], path: str, body: bytes) -> None:
    """Raw Binary Request: a model with one input, and bytes that are whole rows of it."""
    answer = send("POST", path, {"content-type": "application/octet-stream", LENGTH: "0"}, body)
    refused(answer, 400, orjson.loads(answer.body)["code"])


def test_infinity_and_nan_in_an_answer(send: Send, refused: Callable[..., str]) -> None:
    """JSON has neither: NaN is null there, infinity an error that says how to get the answer; both are themselves in binary."""
    asked = {"inputs": [BINARY]}
    nan = np.array([[np.nan, 0, 0], [1, 0, 0]], "<f4").tobytes()
    assert outputs(infer(send, asked, nan)) == {"y": [None, 1.0]}
    infinite = np.array([[0, 0, 0], [np.inf, 0, 0]], "<f4").tobytes()
    assert "row 1" in refused(infer(send, asked, infinite), 422, "infinite_output")
    binary = outputs(infer(send, {**asked, "parameters": {"binary_data_output": True}}, infinite))["y"]
    assert np.frombuffer(binary, "<f4").tolist() == [0.0, np.inf]
