"""What holds for every protocol: request ids, packed bodies, methods, and that a bad request changes nothing for the next."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conformance.hosts import HOSTS, Send
from triform.http import Limits
from triform.protocols.bodies import MAX_VALUES

PREDICT = "/v1/models/linear:predict"
INFER = "/v2/models/linear/infer"
GOOD = b'{"instances": [[1, 2, 3]]}'
MANY = orjson.dumps({"instances": [[1, 2, 3]] * 1000})
JSON = {"content-type": "application/json"}
gzipped = partial(gzip.compress, mtime=0)  # the same bytes in each process that collects the tests


def test_a_clean_request_id_comes_back(send: Send) -> None:
    """Convention: X-Request-Id."""
    assert send("POST", PREDICT, {"x-request-id": "a-B_9.c:d/e=1"}, GOOD).headers["x-request-id"] == "a-B_9.c:d/e=1"
    assert send("GET", "/v2/nothing", {"X-REQUEST-ID": "abc"}).headers["x-request-id"] == "abc"


@pytest.mark.parametrize("given", ["\x1b[31mred", "a b", "é", "-", "x" * 129, ""])
def test_another_request_id_is_replaced(send: Send, given: str) -> None:
    """Convention: X-Request-Id; what may not stand in a log does not."""
    made = send("POST", PREDICT, {"x-request-id": given}, GOOD).headers["x-request-id"]
    assert made != given
    assert made.replace("-", "").isalnum()  # Lambda gives its own, with dashes
    assert made != send("POST", PREDICT, {"x-request-id": given}, GOOD).headers["x-request-id"]


PACKED = {"gzip": gzipped, "x-gzip": gzipped, "deflate": zlib.compress, "identity": bytes, "GZIP": gzipped}


@pytest.mark.parametrize("encoding", PACKED)
def test_packed_in(send: Send, encoding: str) -> None:
    """RFC 9110, 8.4: Content-Encoding."""
    answer = send("POST", PREDICT, {"content-encoding": encoding}, PACKED[encoding](GOOD))
    assert (answer.status, answer.body) == (200, b'{"predictions":[[14.0]]}')


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, deflate;q=0.5, gzip;q=0.9", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.000", None),
        ("br", None),
        ("identity", None),
        ("", None),
    ],
)
def test_packed_out(send: Send, accepted: str, encoding: str | None) -> None:
    """RFC 9110, 12.5.3: Accept-Encoding."""
    answer = send("POST", PREDICT, {"accept-encoding": accepted}, MANY)
    assert answer.headers.get("content-encoding") == encoding
    unpack: dict[str | None, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}
    assert orjson.loads(unpack[encoding](answer.body)) == {"predictions": [[14.0]] * 1000}
    assert answer.headers.get("vary") == ("accept-encoding" if accepted else None)


def test_a_short_answer_is_not_packed(send: Send) -> None:
    """RFC 9110, 12.5.3: it may be, but that would make it longer."""
    assert "content-encoding" not in send("POST", PREDICT, {"accept-encoding": "gzip"}, GOOD).headers


@pytest.mark.parametrize(
    ("encoding", "body", "status", "code"),
    [
        ("gzip", gzipped(GOOD)[:-5], 400, "invalid_request"),
        ("gzip", GOOD, 400, "invalid_request"),
        ("gzip", b"", 400, "invalid_request"),
        ("gzip", gzipped(GOOD) + b"more", 400, "invalid_request"),
        ("gzip", gzipped(GOOD) * 2, 400, "invalid_request"),
        ("deflate", gzipped(GOOD), 400, "invalid_request"),
        ("br", GOOD, 415, "unsupported_media_type"),
        ("gzip, gzip", gzipped(gzipped(GOOD)), 415, "unsupported_media_type"),
        ("gzip", gzipped(b"[" * 100_000_000), 413, "payload_too_large"),
    ],
)
def test_what_cannot_be_unpacked(
    send: Send, refused: Callable[..., str], encoding: str, body: bytes, status: int, code: str
) -> None:
    """RFC 9110, 8.4, 15.5.14 and 15.5.16."""
    refused(send("POST", PREDICT, {"content-encoding": encoding}, body), status, code)


@pytest.mark.parametrize(
    "kind", ["application/x-python-pickle", "text/csv", "application/x-npy", "application/json; charset=utf-16"]
)
@pytest.mark.parametrize("path", [PREDICT, INFER])
def test_what_nobody_here_reads(send: Send, refused: Callable[..., str], path: str, kind: str) -> None:
    """RFC 9110, 15.5.16."""
    refused(send("POST", path, {"content-type": kind}, GOOD), 415, "unsupported_media_type")


def test_a_body_without_a_type_and_what_curl_says_of_it(send: Send) -> None:
    """TensorFlow Serving, RESTful API, Example: `curl -d '{"instances": ...}'`."""
    for headers in (
        {},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json;charset=UTF-8"},
    ):
        assert send("POST", PREDICT, headers, GOOD).status == 200


def test_head_is_get_without_its_body(send: Send) -> None:
    """RFC 9110, 9.3.2."""
    answer = send("HEAD", "/v2/models/linear")
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"", "application/json")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", INFER), ("PUT", PREDICT), ("DELETE", "/v2/models/linear"), ("POST", "/ping")]
)
def test_another_method(send: Send, refused: Callable[..., str], method: str, path: str) -> None:
    """RFC 9110, 15.5.6: 405 comes with Allow."""
    answer = send(method, path)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == ("POST" if path in (INFER, PREDICT) else "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/v2/models//infer", "/v3", "/v2/models/linear/infer/", "/V2", "/%2e%2e/etc/passwd"])
def test_no_such_path(send: Send, refused: Callable[..., str], path: str) -> None:
    """RFC 9110, 15.5.5."""
    refused(send("GET", path), 404, "route_not_found")


def test_openapi(send: Send) -> None:
    """OpenAPI 3.1."""
    answer = send("GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert orjson.loads(answer.body)["openapi"] == "3.1.0"


def infer(data: str = "[1,2,3]", shape: str = "[1,3]", datatype: str = "FP32", name: str = "x") -> bytes:
    return f'{{"inputs":[{{"name":"{name}","shape":{shape},"datatype":"{datatype}","data":{data}}}]}}'.encode()


EVERY = {n: '["a"]' if n == "BYTES" else "[true]" if n == "BOOL" else "[1]" for n in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES")}  # fmt: skip  # noqa: E501


def every(**given: str) -> bytes:
    inputs = (f'{{"name":"in_{n}","shape":[1],"datatype":"{n}","data":{data}}}' for n, data in (EVERY | given).items())
    return f'{{"inputs":[{",".join(inputs)}]}}'.encode()


JSON_BODIES = {
    "empty": b"",
    "cut": infer()[:-2],
    "not UTF-8": infer().replace(b"x", b"\xff"),
    "a lone surrogate": infer(name="\\ud800"),
    "BOM": b"\xef\xbb\xbf" + infer(),
    "UTF-16": infer().decode().encode("utf-16"),
    "deep": b"[" * 250_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "deep objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "deep data": infer("[" * 100 + "1" + "]" * 100),
    "deep data of text": infer("[" * 100 + '"a"' + "]" * 100, datatype="BYTES"),
    "trailing": infer() + b"1",
    "a comment": infer() + b"// no",
    "NaN": infer("[1,2,NaN]"),
    "Infinity": infer("[1,2,-Infinity]"),
    "1e999": infer("[1,2,1e999]"),
    "5,000 digits": infer("[1,2," + "9" * 5000 + "]"),
    "beyond FP32": infer("[1,2,1e300]"),
    "wrapping shape": infer(shape="[16,1152921504606846978]"),
    "wrapping shape of few bits": infer(shape="[4294967296,4294967297]"),
    "empty and too large": infer("[]", shape="[0,9007199254740992,9007199254740992]"),
    "negative shape": infer(shape="[2,-5]"),
    "fractional shape": infer(shape="[1.5]"),
    "true shape": infer(shape="[true]"),
    "text shape": infer(shape='"1"'),
    "1,000 dimensions": infer("[1]", shape=str([1] * 1000)),
    "no dimensions": infer("[1]", shape="[]"),
    "too few elements": infer("[1,2]"),
    "too many elements": infer("[1,2,3,4]"),
    "nested otherwise": infer("[[1],[2],[3]]"),
    "ragged": infer("[[1,2],[3]]"),
    "mixed depth": infer("[[1,2,3],4]"),
    "null": infer("[1,2,null]"),
    "text for numbers": infer('["1","2","3"]'),
    "objects for numbers": infer("[{},{},{}]"),
    "data that is an object": infer('{"a":1}'),
    "data that is text": infer('"123"'),
    "data that is null": infer("null"),
    "no inputs": b'{"inputs":[]}',
    "inputs missing": b'{"outputs":[]}',
    "inputs that are an object": b'{"inputs":{}}',
    "an array": b"[]",
    "a number": b"1",
    "null body": b"null",
    "unknown input": infer(name="z"),
    "an input twice": b'{"inputs":[' + infer()[11:-2] + b"," + infer()[11:-2] + b"]}",
    "a key twice": b'{"inputs":[],' + infer()[1:],
    "a key twice, spaced": b'{"inputs" : [] , ' + infer()[1:],
    "a key twice, escaped": b'{"inp\\u0075ts":[],' + infer()[1:],
    "a key twice, below": infer().replace(b'"name"', b'"name":"y","name"'),
    "a key twice, beside colons": infer(name='x","id":"a:b","name":"x'),
    "wrong datatype": infer(datatype="INT64"),
    "booleans for numbers": infer("[1,2,true]"),
    "only booleans for numbers": infer("[true,false,true]"),
    "an integer beyond 64 bits": infer("[1,2,18446744073709551617]"),
    "-2^63-1": infer("[1,2,-9223372036854775809]"),
    "no such datatype": infer(datatype="FLOAT"),
    "unknown output": b'{"outputs":[{"name":"z"}],' + infer()[1:],
    "an output twice": b'{"outputs":[{"name":"y"},{"name":"y"}],' + infer()[1:],
    "id that is a number": b'{"id":1,' + infer()[1:],
    "parameters that are none": b'{"parameters":1,' + infer()[1:],
}
EVERY_BODIES = {
    "2^63 in INT64": {"INT64": "[9223372036854775808]"},
    "true in INT8": {"INT8": "[true]"},
    "true in FP64": {"FP64": "[true]"},
    "2^64 in UINT64": {"UINT64": "[18446744073709551616]"},
    "-1 in UINT64": {"UINT64": "[-1]"},
    "300 in UINT8": {"UINT8": "[300]"},
    "-1 in UINT32": {"UINT32": "[-1]"},
    "-129 in INT8": {"INT8": "[-129]"},
    "1.5 in INT32": {"INT32": "[1.5]"},
    "2 in BOOL": {"BOOL": "[2]"},
    "65520 in FP16": {"FP16": "[65520]"},
    "a number in BYTES": {"BYTES": "[1]"},
    "a list in BYTES": {"BYTES": "[[1]]"},
    "null in BYTES": {"BYTES": "[null]"},
    "text in INT64": {"INT64": '["1"]'},
}


@pytest.mark.parametrize("case", JSON_BODIES)
def test_bodies_that_are_wrong(send: Send, refused: Callable[..., str], case: str) -> None:
    """Open Inference Protocol, Inference Request JSON Object; RFC 8259."""
    answer = send("POST", INFER, JSON, JSON_BODIES[case])
    refused(answer, 400, orjson.loads(answer.body)["code"])
    assert len(answer.body) < 1500


@pytest.mark.parametrize("depth", [63, 64, 65, 300, 900])
@pytest.mark.parametrize("value", ["1", '"a"', "null", "{}", '{"b64":"YQ=="}'])
@pytest.mark.parametrize("model", ["linear", "text", "flights"])
def test_rows_that_are_nested_deeply(send: Send, model: str, value: str, depth: int) -> None:
    """RFC 8259, section 9: a parser may limit the depth of nesting."""
    deep = "[" * depth + value + "]" * depth
    for body in (deep, f'[{{"x": {deep}}}]', f'[{{"carrier": {deep}, "distance": {deep}, "hour": 1}}]'):
        for key in ("instances", "inputs", "dataframe_records"):
            path = "/invocations" if key == "dataframe_records" else f"/v1/models/{model}:predict"
            answer = send("POST", path, JSON, f'{{"{key}": {body}}}'.encode())
            assert answer.status == 400, answer


@pytest.mark.parametrize("case", EVERY_BODIES)
def test_values_that_would_change(send: Send, refused: Callable[..., str], case: str) -> None:
    """Open Inference Protocol, Tensor Data Types: a value that its datatype does not hold is refused."""
    (datatype,) = EVERY_BODIES[case]
    message = refused(send("POST", "/v2/models/every/infer", JSON, every(**EVERY_BODIES[case])), 400, "invalid_input")
    assert f"in_{datatype}" in message


@pytest.mark.parametrize("number", ["18446744073709551616", "100000000000000000000", "-36893488147419103232"])
def test_an_integer_beyond_64_bits_that_is_a_float_to_the_digit(send: Send, number: str) -> None:
    """RFC 8259, section 6; Open Inference Protocol, Tensor Data: a number's JSON is exact."""
    (output,) = (o for o in orjson.loads(send("POST", "/v2/models/every/infer", JSON, every(FP64=f"[{number}]")).body)["outputs"]
                 if o["name"] == "out_FP64")  # fmt: skip
    assert output["data"] == [float(number)]
    assert int(output["data"][0]) == int(number)


@pytest.mark.parametrize("without", ["in_INT64", "in_BYTES"])
def test_a_missing_input(send: Send, refused: Callable[..., str], without: str) -> None:
    """Open Inference Protocol, Inference Request JSON Object: each input of the model."""
    asked = orjson.loads(every())
    asked["inputs"] = [given for given in asked["inputs"] if given["name"] != without]
    message = refused(send("POST", "/v2/models/every/infer", JSON, orjson.dumps(asked)), 400, "missing_value")
    assert f"'{without}' is missing" in message


MANY_VALUES = {
    "JSON": (PREDICT, "application/json", b'{"instances":[' + b"1," * MAX_VALUES + b"1]}"),
    "lists": (PREDICT, "application/json", b'{"instances":[' + b"[]," * (MAX_VALUES // 2) + b"1]}"),
    "CSV": ("/invocations", "text/csv", b"1,2,3\n" * (MAX_VALUES // 3 + 1)),
    "JSON Lines": ("/invocations", "application/jsonlines", b"1\n" * (MAX_VALUES + 1)),
}


@pytest.mark.parametrize("case", MANY_VALUES)
def test_more_values_than_can_be_read_soon(send: Send, refused: Callable[..., str], case: str) -> None:
    """RFC 9110, 15.5.14: packed they are few bytes."""
    path, kind, body = MANY_VALUES[case]
    answer = send("POST", path, {"content-type": kind, "content-encoding": "gzip"}, gzip.compress(body, 1))
    assert "more than 2,097,152 values" in refused(answer, 413, "payload_too_large")


@pytest.mark.parametrize("host", ["http.py", "asgi"])
def test_a_body_at_the_limit_is_answered_one_byte_more_is_not(host: str, online_models: Path) -> None:
    """RFC 9110, 15.5.14. Lambda's own limits: tests/infra/local."""
    with HOSTS[host](online_models) as send:
        assert send("POST", PREDICT, JSON, GOOD.ljust(Limits().request)).status == 200
        answer = send("POST", PREDICT, JSON, GOOD.ljust(Limits().request + 1))
        assert (answer.status, orjson.loads(answer.body)["code"]) == (413, "payload_too_large")
        assert send("POST", PREDICT, JSON, GOOD).status == 200


@pytest.mark.parametrize("host", ["http.py", "asgi"])
@pytest.mark.parametrize("given", ["a\r\nset-cookie: b", "a\nlevel=ERROR", "\r", "a\0"])
def test_a_request_id_of_several_lines_is_replaced(host: str, given: str, online_models: Path) -> None:
    """Convention: X-Request-Id. Over a socket no such value arrives: these hosts are asked without one."""
    with HOSTS[host](online_models) as send:
        made = send("POST", PREDICT, {"x-request-id": given}, GOOD).headers["x-request-id"]
    assert made.isalnum()
    assert not set(made) & set("\r\n\0")


def test_keys_that_only_look_doubled_are_fine(send: Send, post: Callable[..., Any]) -> None:
    """RFC 8259, section 4: names within an object should be unique; in two objects they are two names."""
    rows = [{"x": text} for text in ('"x":', 'a":1,"a":1', "12:30:59", ":", '\\":', '"x"  :')]
    assert post("/v1/models/text:predict", {"instances": rows}) == {"predictions": [row["x"] for row in rows]}
    spaced = b'{ "instances"\n:\t[ { "x" : "a:b" } , {"x"\r\n:"c"} ] }'
    assert send("POST", "/v1/models/text:predict", JSON, spaced).body == b'{"predictions":["a:b","c"]}'
