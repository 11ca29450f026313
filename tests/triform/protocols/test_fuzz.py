"""Whatever bytes come, a decoder gives a call or raises an `InvalidRequest`; what it reads is what was written, to the bit."""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from triform.content import by_weight, media_type, unpack
from triform.errors import InvalidRequest, TriformError
from triform.models import Served
from triform.protocols import invocations, oip, tensors, tfs
from triform.protocols.bodies import Call, plain, read_json, write_json
from triform.signature import BY_OIP, DATATYPES

Serve = Callable[[str], Served]
MODELS = st.sampled_from(["linear", "every", "text", "lookup", "flights"])
FEW = settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=5000)

scalars = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4), max_leaves=12
)
sizes = st.integers(-1, 4) | st.sampled_from([2**31, 2**53, 2**63, 2**64]) | scalars
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "in_INT64", "in_BYTES", "distance", "hour", "carrier", "z"]) | st.text(max_size=3),
        "shape": st.lists(sizes, max_size=3) | values,
        "datatype": st.sampled_from([*BY_OIP, "FP8"]),
    },
    optional={
        "data": values,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "shared_memory_region"]), sizes, max_size=2),
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(inputs, max_size=4)},
    optional={"outputs": values, "parameters": values, "id": scalars},
)
records = st.dictionaries(st.sampled_from(["x", "carrier", "distance", "hour", "b64", "features", "in_INT8"]), values, max_size=4)
tables = st.fixed_dictionaries(
    {
        "columns": st.lists(st.sampled_from(["x", "carrier", "distance", "hour"]), max_size=4),
        "data": st.lists(st.lists(values, max_size=4), max_size=3),
    }
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "instances": st.lists(records, max_size=3) | values,
        "inputs": records | values,
        "dataframe_split": tables | values,
        "dataframe_records": st.lists(records, max_size=3) | values,
        "signature_name": scalars,
    },
)


def settle(served: Served, decode: Callable[[], Call]) -> None:
    """The whole way: an error is the tree's, and nothing that the caller did is a fault of ours."""
    status = 200
    try:
        call = decode()
        call.encode(served.predictor.predict(call.inputs))
    except TriformError as error:
        status = error.http_status
    assert status < 500


def as_json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # beyond 64 bits, or a lone surrogate
        import json

        return json.dumps(value).encode()


def check_oip(serve: Serve, model: str, body: bytes, length: int | None) -> None:
    settle(serve(model), lambda: oip.decode(body, length, serve(model)))


@given(model=MODELS, body=st.binary(max_size=60), length=st.none() | st.integers(0, 70))
@FEW
def test_oip_any_bytes(served: Serve, model: str, body: bytes, length: int | None) -> None:
    check_oip(served, model, body, length)


@given(model=MODELS, asked=requests, tail=st.none() | st.binary(max_size=40))
@example(model="linear", asked={"inputs": [{"name": "x", "shape": [0, 2**53], "datatype": "FP32", "data": []}]}, tail=None)
@FEW
def test_oip_requests(served: Serve, model: str, asked: Any, tail: bytes | None) -> None:
    header = as_json(asked)
    check_oip(served, model, header + (tail or b""), None if tail is None else len(header))


@pytest.mark.slow
@given(model=MODELS, asked=requests, tail=st.none() | st.binary(max_size=40))
@MANY
def test_oip_requests_at_length(served: Serve, model: str, asked: Any, tail: bytes | None) -> None:
    header = as_json(asked)
    check_oip(served, model, header + (tail or b""), None if tail is None else len(header))


@given(model=MODELS, asked=bodies | values)
@FEW
def test_tfs_and_invocations(served: Serve, model: str, asked: Any) -> None:
    body = as_json(asked)
    settle(served(model), lambda: tfs.decode(body, served(model)))
    settle(served(model), lambda: invocations.decode(body, ("", {}), [], served(model)))


@pytest.mark.slow
@given(model=MODELS, asked=bodies | values)
@MANY
def test_tfs_and_invocations_at_length(served: Serve, model: str, asked: Any) -> None:
    body = as_json(asked)
    settle(served(model), lambda: tfs.decode(body, served(model)))
    settle(served(model), lambda: invocations.decode(body, ("", {}), [], served(model)))


cells = (
    st.text(max_size=5)
    | st.floats().map(str)
    | st.integers(-(2**70), 2**70).map(str)
    | st.sampled_from(["", "1e999", "nan", "-inf"])
)


@given(
    model=MODELS,
    lines=st.lists(st.lists(cells, max_size=4), max_size=4),
    raw=st.none() | st.binary(max_size=30),
    header=st.sampled_from(["", "present", "absent"]),
    accept=st.sampled_from(["", "text/csv; header=present", "application/json", "application/jsonlines"]),
)
@FEW
def test_csv_and_lines(served: Serve, model: str, lines: list[list[str]], raw: bytes | None, header: str, accept: str) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    body = text.getvalue().encode(errors="surrogatepass") if raw is None else raw
    for kind in ("text/csv", "application/jsonlines"):
        settle(
            served(model),
            lambda kind=kind: invocations.decode(body, (kind, {"header": header}), by_weight(accept), served(model)),
        )  # type: ignore[misc]


@given(body=st.binary(max_size=60), encoding=st.sampled_from(["gzip", "deflate"]), most=st.integers(0, 20))
@FEW
def test_unpack_any_bytes(body: bytes, encoding: str, most: int) -> None:
    with suppress(InvalidRequest):
        assert len(unpack(body, encoding, most)) <= most


@given(st.text(max_size=60))
@FEW
def test_any_header(value: str) -> None:
    kind, parameters = media_type(value)
    assert kind == kind.lower()
    assert all(isinstance(v, str) for v in parameters.values())
    by_weight(value)


@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3), max_size=4), st.sampled_from([None, 2]))
@FEW
def test_json_that_doubles_no_key_is_read_as_it_is(value: Any, indent: int | None) -> None:
    import json

    assert read_json(json.dumps(value, indent=indent, ensure_ascii=False).encode()) == value


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=3), st.data())
@FEW
def test_json_that_doubles_a_key_never_is(value: dict[str, str], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    space = data.draw(st.text(" \n\t", max_size=2))
    doubled = b'[{"a":"b:c"},{%s,%s%s:"x"}]' % (orjson.dumps(value)[1:-1], orjson.dumps(key), space.encode())
    with pytest.raises(InvalidRequest, match="stands twice"):
        read_json(doubled)


def arrays(datatype: str) -> st.SearchStrategy[Any]:
    """Any bits for numbers; any text."""
    dtype = BY_OIP[datatype].numpy
    if datatype == "BYTES":
        return st.lists(st.text(), max_size=6).map(lambda items: np.array(items, dtype=object))
    if datatype == "BOOL":
        return st.lists(st.booleans(), max_size=20).map(lambda items: np.array(items, dtype=bool))
    return (
        st.integers(0, 20)
        .flatmap(lambda n: st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize))
        .map(lambda data: np.frombuffer(data, dtype))
    )


def wire(array: Any) -> bytes:
    if array.dtype.kind == "O":
        return b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in array)
    return bytes(array.tobytes())


@pytest.mark.parametrize("datatype", [d.oip for d in DATATYPES])
@given(data=st.data(), offset=st.integers(0, 7))
@settings(FEW, max_examples=60)
def test_binary_round_trip(datatype: str, data: st.DataObject, offset: int) -> None:
    """Bytes -> array -> bytes, at any alignment, NaN payloads included."""
    array = data.draw(arrays(datatype))
    sent = wire(array)
    read = tensors.from_bytes(memoryview(b"." * offset + sent)[offset:], datatype, [len(array)])
    assert read.dtype == BY_OIP[datatype].numpy
    assert read.flags.aligned
    assert tensors.to_bytes(read) == sent


@pytest.mark.parametrize("datatype", [d.oip for d in DATATYPES])
@given(data=st.data())
@settings(FEW, max_examples=60)
def test_json_round_trip(served: Serve, datatype: str, data: st.DataObject) -> None:
    """What an answer says in JSON, read as a request, is the same array to the bit; NaN and infinity apart."""
    array = data.draw(arrays(datatype))
    if array.dtype.kind == "f":
        array = array[np.isfinite(array)]
    said = orjson.loads(write_json({"data": plain(array, "y")}))["data"]
    inputs = [_given(d.oip, len(array), said if d.oip == datatype else None) for d in DATATYPES]
    read = served("every").signature.validate(oip.decode(as_json({"inputs": inputs}), None, served("every")).inputs)
    assert wire(read[f"in_{datatype}"]) == wire(array)


def _given(datatype: str, rows: int, data: Any) -> dict[str, Any]:
    others = [{"BYTES": "", "BOOL": False}.get(datatype, 0)] * rows
    return {"name": f"in_{datatype}", "shape": [rows], "datatype": datatype, "data": others if data is None else data}
