"""The Open Inference Protocol's decoder, where a host cannot show it: no copy where none is needed, rows of raw bodies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triform.errors import InvalidInput, InvalidRequest, PayloadTooLarge, TriformError
from triform.models import Served
from triform.protocols import oip
from triform.protocols.bodies import MAX_VALUES, Call, convert, read_json
from triform.signature import Array

Serve = Callable[[str], Served]


def test_aligned_bytes_are_read_where_they_stand(served: Serve) -> None:
    values = np.arange(3000, dtype=np.float32)
    asked = {"name": "x", "shape": [1000, 3], "datatype": "FP32", "parameters": {"binary_data_size": values.nbytes}}
    for pad in range(4):
        header = orjson.dumps({"inputs": [asked], "id": " " * pad})
        body = header + values.tobytes()
        read = oip.decode(body, len(header), served("linear")).inputs["x"]
        assert np.array_equal(read.reshape(-1), values)
        assert read.flags.aligned
        here = np.frombuffer(body, np.uint8)
        assert np.shares_memory(read, here) == ((here.ctypes.data + len(header)) % 4 == 0)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_raw_body_has_as_many_rows_as_its_bytes_make(served: Serve, rows: int) -> None:
    read = oip.decode(np.ones((rows, 3), np.float32).tobytes(), 0, served("linear")).inputs["x"]
    assert read.shape == (rows, 3)


def test_a_raw_body_needs_one_input(served: Serve) -> None:
    with pytest.raises(InvalidRequest, match="needs a model with one input, every/1 has 13"):
        oip.decode(b"1", 0, served("every"))


def test_an_input_in_binary_costs_nothing_before_it_is_known_to_fit(served: Serve) -> None:
    asked = {"name": "x", "shape": [2**50, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
    header = orjson.dumps({"inputs": [asked]})
    with pytest.raises(InvalidInput, match="means 13510798882111488 bytes, binary_data_size is 12"):
        oip.decode(header + bytes(12), len(header), served("linear"))


@pytest.mark.parametrize(
    ("shape", "data", "told"),
    [
        ([2], ["a"], r"shape \[2\], but data has 1 elements"),
        ([2, 2], ["a", "b"], r"expected a column of shape \[rows\] or \[rows, 1\], got \[2, 2\]"),
        ([], [], "expected a column"),
    ],
)
def test_a_column_has_a_value_a_row(served: Serve, shape: list[int], data: list[str], told: str) -> None:
    asked = {"inputs": [{"name": "carrier", "shape": shape, "datatype": "BYTES", "data": data}]}
    with pytest.raises(InvalidInput, match=told):
        oip.decode(orjson.dumps(asked), None, served("flights"))


@pytest.mark.parametrize("name", ["distance", "hour"])
def test_columns_that_differ_in_their_rows(served: Serve, name: str) -> None:
    rows = {"carrier": 2, "distance": 2, "hour": 2} | {name: 1}
    inputs = [
        {"name": n, "shape": [r], "datatype": "BYTES" if n == "carrier" else "FP32", "data": ["a" if n == "carrier" else 1] * r}
        for n, r in rows.items()
    ]
    with pytest.raises(InvalidInput, match="differ in their number of rows"):
        oip.decode(orjson.dumps({"inputs": inputs}), None, served("flights"))


def test_the_texts_of_all_tensors_are_at_most_so_many(served: Serve) -> None:
    """Each is read by itself; what one tensor may not have, two may not have together."""
    half = MAX_VALUES // 2 + 1
    texts = {"shape": [half], "datatype": "BYTES", "parameters": {"binary_data_size": 4 * half}}
    header = orjson.dumps({"inputs": [{"name": name, **texts} for name in ("carrier", "distance")]})
    with pytest.raises(PayloadTooLarge, match="more than 2,097,152 values"):
        oip.decode(header + bytes(8 * half), len(header), served("flights"))


NUMBERS = st.sampled_from(
    [
        "[1,2,3]", "[ 1.5, -0.0,3e2 ]", "[[1,2,3]]", "[]", '["1",2,3]', "[1,2,1e400]", "[1,2,NaN]", "[1,2,]", "[1,[2],3]",
        "[1,2,36893488147419103232]", "[16777217,1,2]", "[1,2,123456789012345678901]", "[true,1,2]", "[null,1,2]", '["]",1,2]',
        "[1,2,3", "1,2,3]", "[1,2,3]]",
    ]
)  # fmt: skip


def joined(members: list[str]) -> str:
    return "{" + ",".join(members) + "}"


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Requests for one tensor, sound or not, whose `data` may stand anywhere, twice or in a text."""
    members = ['"name":"x"', draw(st.sampled_from(['"shape":[1,3]', '"shape":[3]', '"shape":[1, 0]'])), '"datatype":"FP32"']
    odd = st.one_of(
        NUMBERS.map('"data":{}'.format),
        NUMBERS.map('"parameters":{{"data":{}}}'.format),
        NUMBERS.map('"x\\"data":{}'.format),
        st.sampled_from(
            ['"x":"\\"data\\":[1,2,3]"', '"id":"7"', '"x":{"data":[4,5,6]}', '"x":"caf\\u00e9 \\ud800"', '"x":"\x01"']
        ),
    )
    members += [f'"data":{draw(NUMBERS)}', *draw(st.lists(odd, max_size=1))]
    inputs = [joined(draw(st.permutations(members))) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    top = [f'"inputs":[{",".join(inputs)}]', *draw(st.lists(odd, max_size=1))]
    top += draw(st.sampled_from([[], ['"outputs":[{"name":"y"}]'], ['"outputs":[{"name":"data"}]']]))
    return joined(draw(st.permutations(top))).encode()


@settings(max_examples=300, deadline=None)
@given(bodies())
@example(b'{"data":[1,2,3],"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[]}]}')
@example(b'{"x\\"data":[1,2,3],"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[]}]}')
def test_a_request_at_a_glance_means_what_it_means_when_read_whole(served: Serve, body: bytes) -> None:
    linear = served("linear")

    def outcome(read: Callable[[], Call]) -> object:
        try:
            call = read()
        except TriformError as error:
            return type(error), str(error)
        arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in call.inputs.items()}
        return arrays, call.keys, call.encode({"y": np.array([[0.5]], np.float32)}).body

    whole = outcome(lambda: oip.decode_request(convert(read_json(body), oip.InferRequest), b"", linear))
    assert outcome(lambda: oip.decode(body, None, linear)) == whole
    assert outcome(lambda: oip.decode(body, None, linear)) == whole, "what is around the numbers is known now"


def test_the_usual_request_is_read_at_a_glance(served: Serve) -> None:
    linear = served("linear")
    body = b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[%b]}]}'
    for asked in body, body.replace(b":", b": "):
        for numbers in b"1,2,3", b"-1.5,0.25,1e3", b"7,8,9":
            call = oip._at_a_glance(asked % numbers, linear)
            assert call is not None
            assert call.inputs["x"].tolist() == [orjson.loads(b"[" + numbers + b"]")]
    assert oip._around.cache_info().hits >= 4
    tried = oip._around.cache_info()
    assert oip._at_a_glance(body % b" [1,2,3]", linear) is None
    assert oip._around.cache_info() == tried, "what is nested is read whole, and not before that"


def test_a_header_of_binary_tensors_is_read_once(served: Serve) -> None:
    linear = served("linear")
    header = b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","parameters":{"binary_data_size":12}}]}'
    oip._header.cache_clear()  # another test's header may be this one
    for values in [1, 2, 3], [4, 5, 6]:
        call = oip.decode(header + np.array(values, np.float32).tobytes(), len(header), linear)
        assert call.inputs["x"].tolist() == [values]
    assert oip._header.cache_info().misses == 1
    with pytest.raises(InvalidRequest, match="do not add up"):
        oip.decode(header + b" " * 13, len(header), linear)


@pytest.mark.parametrize(
    ("shape", "size", "more", "told"),
    [
        ([1, 3], 12, b"", None),
        ([2, 3], 24, b"", None),
        ([1, 3], 12, b"x", "do not add up"),
        ([1, 3], 8, b"", "means 12 bytes"),
        ([1, 3], 16, b"", "12 bytes are left"),
        ([1, 3], True, b"", "expected a number of bytes"),
        ([0, 2**40, 2**40], 0, b"", "too large|expected x"),
    ],
)
def test_tensors_in_binary_say_what_is_wrong_with_them(
    served: Serve, shape: list[int], size: int, more: bytes, told: str | None
) -> None:
    asked = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}
    header = orjson.dumps({"inputs": [asked]})
    rows = np.arange(3 * shape[0], dtype=np.float32)

    def read() -> Array:
        call = oip.decode(header + rows.tobytes() + more, len(header), served("linear"))
        return served("linear").signature.validate(call.inputs)["x"]

    if told is None:
        assert read().tolist() == rows.reshape(shape).tolist()
    else:
        with pytest.raises(InvalidRequest, match=told):
            read()
