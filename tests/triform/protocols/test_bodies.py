"""JSON in and out: what is read exactly, what is refused, and where an answer cannot be said."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from triform.errors import AnswerTooLarge, InfiniteOutput, InvalidRequest, PayloadTooLarge
from triform.protocols import tensors
from triform.protocols.bodies import IN_JSON, MAX_VALUES, plain, read_json, write_json


@pytest.mark.parametrize("text", ["9223372036854775807", "-9223372036854775808", "18446744073709551615", "9007199254740993"])
def test_integers_of_64_bits_keep_every_digit(text: str) -> None:
    assert read_json(text.encode()) == int(text)


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"[1e999]", b"\xef\xbb\xbf1", b"\xff", b'"\\ud800"', b"[" * 2000, b"1 2"])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the body is not JSON"):
        read_json(body)


@pytest.mark.parametrize("depth", [10, 500, 900])
def test_deep_values_do_not_overflow_the_stack(depth: int) -> None:
    assert read_json(b'{"a":' * depth + b"1" + b"}" * depth)
    assert read_json(b"[" * depth + b'{"a":1}' + b"]" * depth)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2}',
        b'{"a" : 1, "a":2}',
        b'{"a":1,"\\u0061":2}',
        b'[1,{"a":1,"a":2}]',
        b'[[1],{"b":":","a":1,"a":2}]',
        b'{"b":{"c":[{"a":1},{"a":1,"a":1}]}}',
        b'{"a":"x\\":","a":1}',
    ],
)
def test_a_key_twice(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the key 'a' stands twice in one object"):
        read_json(body)


@pytest.mark.parametrize(
    "number", ["18446744073709551616", "-9223372036854775808", "100000000000000000000", "-36893488147419103232"]
)
def test_an_integer_beyond_64_bits_may_be_a_float_to_the_digit(number: str) -> None:
    assert read_json(f'{{"a": [{number}]}}'.encode()) == {"a": [int(number)]}


@pytest.mark.parametrize("number", ["18446744073709551617", "-9223372036854775809", "123456789012345678901", "1" + "0" * 300])
@pytest.mark.parametrize("around", ["%s", "[1, %s]", '{"a": %s}', '["12345678901234567890123", %s]'])
def test_another_one_is_refused(number: str, around: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the integer {number[:80]} has more than 64 bits"):
        read_json((around % number).encode())


@pytest.mark.parametrize(
    "body",
    [
        b'"123456789012345678901234567890"',
        b'{"123456789012345678901234567890": 0.12345678901234567890123}',
        b"[12345678901234567890.5, 123456789012345678901e0, -9223372036854775808, 18446744073709551615, -1234567890123456789]",
    ],
)
def test_digits_that_are_no_such_integer_are_fine(body: bytes) -> None:
    assert read_json(body) == orjson.loads(body)


BODIES = {"numbers": b"1,", "lists": b"[],", "objects": b"{},", "keys": b'{"a":1},', "text": b'",",'}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_has_at_most_so_many_values(kind: str) -> None:
    """Counted before it is read: what it takes to read is bounded, in time and memory."""
    item = BODIES[kind]
    most = (MAX_VALUES - 1) // sum(item.count(one) for one in IN_JSON)
    body = b"[" + item * most
    assert len(read_json(body[:-1] + b"]")) == most
    with pytest.raises(PayloadTooLarge, match="more than 2,097,152 values"):
        read_json(body + item * 2 + b"1]")


def test_an_answer_has_at_most_so_many_texts() -> None:
    texts = np.full(MAX_VALUES + 1, "a", dtype=object)
    for say in (tensors.to_bytes, lambda array: plain(array, "y")):
        assert say(texts[:1])
        with pytest.raises(AnswerTooLarge, match="more than 2,097,152 texts"):
            say(texts)


def test_nan_is_null_and_numbers_have_the_digits_of_their_precision() -> None:
    assert write_json(plain(np.array([0.1, np.nan, -0.0], np.float32), "y")) == b"[0.1,null,-0.0]"
    assert write_json(plain(np.array([0.1, 65504], np.float16), "y")) == b"[0.099975586,65504.0]"
    assert write_json(plain(np.array([2**64 - 1], np.uint64), "y")) == b"[18446744073709551615]"


def test_an_array_of_any_layout_is_said_row_by_row() -> None:
    assert orjson.loads(write_json(plain(np.arange(6).reshape(2, 3).T, "y"))) == [[0, 3], [1, 4], [2, 5]]
    assert orjson.loads(write_json(plain(np.array([["é"], ["b"]], dtype=object), "y"))) == [["é"], ["b"]]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_infinity_is_an_error_that_names_the_row(kind: type) -> None:
    with pytest.raises(InfiniteOutput, match=r"output 'y' is infinite in row 1, .* binary"):
        plain(np.array([[np.nan, 0], [0, -np.inf]], kind), "y")
