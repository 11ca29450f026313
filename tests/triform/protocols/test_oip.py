"""The Open Inference Protocol's decoder, where a host cannot show it: no copy where none is needed, rows of raw bodies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import orjson
import pytest

from triform.errors import InvalidInput, InvalidRequest, PayloadTooLarge
from triform.models import Served
from triform.protocols import oip
from triform.protocols.bodies import MAX_VALUES

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
