"""CSV, tables and JSON Lines for a model with mapped columns (hosts show the default model), and numbers from text."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest

from triform import testing
from triform.content import by_weight
from triform.errors import InvalidInput, InvalidRequest, MissingValue, PayloadTooLarge
from triform.features import Features
from triform.models import Served
from triform.predictor import Predictor
from triform.protocols import invocations
from triform.protocols.bodies import MAX_VALUES, Call
from triform.signature import TensorMetadata

Serve = Callable[[str], Served]
ROWS = [
    {"p_on_time": 100.0, "p_late": 7.0, "outcome": "on time", "airline": "UA"},
    {"p_on_time": 5.0, "p_late": 9.0, "outcome": "late", "airline": "AA"},
]


def csv_call(served: Serve, body: bytes, model: str = "flights", accept: str = "application/json", **parameters: str) -> Call:
    return invocations.decode(body, ("text/csv", parameters), by_weight(accept), served(model))


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        (b"carrier,hour,tail,distance\nUA,7,N1,100\nAA,9,N2,5\n", {}),
        (b"distance,hour,carrier\n1e2,+7,UA\n5.0, 9,AA\n", {}),
        (b'"distance","hour","carrier"\r\n"100",7,UA\r\n5,9,"AA"', {}),
        (b"100,7,UA\n5,9,AA\n", {}),
        (b"100,7,UA\n5,9,AA\n", {"header": "absent"}),
        (b"carrier,distance,hour\nUA,100,7\nAA,5,9\n", {"header": "present"}),
    ],
)
def test_csv_by_columns(served: Serve, answered: Callable[[str, Call], Any], body: bytes, parameters: dict[str, str]) -> None:
    assert answered("flights", csv_call(served, body, **parameters)) == {"predictions": ROWS}


def test_an_empty_cell_is_null(served: Serve, answered: Callable[[str, Call], Any]) -> None:
    (row,) = answered("flights", csv_call(served, b"100,,UA\n"))["predictions"]
    assert (row["p_on_time"], row["p_late"]) == (100.0, None)
    with pytest.raises(MissingValue, match="row 1: column 'distance' is missing or null"):
        csv_call(served, b"100,7,UA\n,7,UA\n")
    with pytest.raises(MissingValue, match="row 0: column 'carrier'"):
        csv_call(served, b"100,7,\n")
    with pytest.raises(MissingValue, match="row 1: cell 2 is empty"):
        csv_call(served, b"1,2,3\n4,5,\n", "linear")


@pytest.fixture(scope="module")
def nullable(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """y = x, of one column that may be null."""
    root = tmp_path_factory.mktemp("nullable")
    config = '[inputs.x]\ncolumns = [{ name = "x", null = "nan" }]'
    models = testing.repository(root / "models", {"one": testing.identity(root / "one.onnx", "FP32")}, config={"one": config})
    predictor = Predictor.load(models.package("one", 1), verification="sealed")
    return Served(predictor, Features(predictor.signature, predictor.manifest.config))


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        (b"1\n\n3\n", [1, None, 3]),
        (b"1\r\n\r\n3", [1, None, 3]),
        (b"x\n1\n\n", [1, None]),
        (b'""\n\n1', [None, None, 1]),
        (b"\n", [None]),
        (b"x\n", []),
        (b"", []),
    ],
)
def test_an_empty_line_is_a_row_and_the_last_newline_is_none(nullable: Served, body: bytes, rows: list[Any]) -> None:
    call = invocations.decode(body, ("text/csv", {}), by_weight("application/json"), nullable)
    assert orjson.loads(call.encode(nullable.predictor.predict(call.inputs)).body) == {"predictions": rows}


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        ("flights", b"100,7,UA\n\n5,9,AA\n", "row 1: column 'distance' is missing"),
        ("flights", b"100,7,UA\n\n", "row 1: column 'distance' is missing"),
        ("linear", b"1,2,3\n\n4,5,6\n", "row 1: the line is empty"),
        ("linear", b"\n1,2,3\n", "row 0: the line is empty"),
    ],
)
def test_an_empty_line_that_makes_no_row(served: Serve, model: str, body: bytes, told: str) -> None:
    with pytest.raises(MissingValue, match=told):
        csv_call(served, body, model)


def test_columns_that_the_model_does_not_read_are_passed_over_and_keep_their_rows(served: Serve) -> None:
    """In every table, as in a Parquet file; rows of nothing else are rows without values."""
    with pytest.raises(MissingValue, match="row 0: column 'distance' is missing"):
        csv_call(served, b"tail,note\nN1,a\nN2,b\n", header="present")
    for asked in ({"columns": ["tail"], "data": [["N1"], ["N2"]]}, {"columns": ["tail", "hour"], "data": [["N1", 1]]}):
        with pytest.raises(MissingValue, match="row 0: column 'distance' is missing"):
            invocations.decode(orjson.dumps({"dataframe_split": asked}), ("", {}), [], served("flights"))


def test_a_column_that_may_be_null_may_be_left_out_where_the_header_is_announced(served: Serve) -> None:
    call = csv_call(served, b"carrier,distance\nUA,100\n", header="present")
    assert np.isnan(call.inputs["x"][0, 1])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"carrier,hour,distance\nUA,x,1\n", "row 0: column 'hour': 'x' is no number"),
        (b"1,2,UA\n1,2\n", "row 1: 2 cells for 3 columns"),
        (b"carrier,hour,distance,hour\nUA,1,1,1\n", "names a column twice"),
        (b"16777217,1,UA\n", "16777217 cannot be held as FP32"),
    ],
)
def test_csv_that_does_not_fit(served: Serve, body: bytes, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        csv_call(served, body)


def test_integers_in_csv_keep_every_digit(served: Serve, answered: Callable[[str, Call], Any]) -> None:
    names = [t.name for t in served("every").signature.inputs]
    digits = {"in_INT64": str(2**53 + 1), "in_UINT64": str(2**64 - 1), "in_BOOL": "true", "in_FP64": "0.1", "in_BYTES": "007"}
    body = ",".join(names) + "\n" + ",".join(digits.get(name, "1") for name in names) + "\n"
    (row,) = answered("every", csv_call(served, body.encode(), "every"))["predictions"]
    assert (row["out_INT64"], row["out_UINT64"], row["out_BOOL"]) == (2**53 + 1, 2**64 - 1, True)
    assert (row["out_FP64"], row["out_BYTES"]) == (0.1, "007")


@pytest.mark.parametrize(
    "cell", ["1", "-1.5", "1e3", "+.5", "5.", "0.1", "16777215", "3.4028234663852886e38", " 2", "3\t", "nan", "-inf"]
)
def test_numbers_read_together_are_those_read_alone(cell: str) -> None:
    tensor = TensorMetadata("x", "FP32", ("rows",))
    together = np.asarray(invocations._cells([cell, "2.5"], "x", tensor), np.float64)
    alone = np.asarray([invocations._cell(cell, "x", 0), 2.5], np.float64)
    assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("cell", ["1_0", "0x1", "1e", "", "one", "1e999", "\u0661", "--1", "1 2", "infinitely"])
def test_what_is_no_number_is_none_together_either(cell: str) -> None:
    tensor = TensorMetadata("x", "FP32", ("rows",))
    if cell == "":
        assert invocations._cells([cell, "2.5"], "x", tensor) == [None, 2.5]
    else:
        with pytest.raises(InvalidInput, match="is no number"):
            invocations._cells([cell, "2.5"], "x", tensor)


def test_csv_out(served: Serve) -> None:
    """A line a row; several cells for an array; NaN is an empty cell; text is quoted where it must be."""
    call = csv_call(served, b'1.5,,"a,b"\n', accept="text/csv;header=present")
    outputs = served("flights").predictor.predict(call.inputs)
    header, line = call.encode(outputs).body.decode().splitlines()
    assert header == "p_on_time,p_late,outcome,airline"
    assert line.startswith("1.5,,")
    assert line.endswith(',"a,b"')


@pytest.mark.parametrize(("text", "line"), [("nan", "nan"), ("", '""'), ("007", "007"), ('"', '""""')])
def test_text_in_csv_is_not_read_as_numbers(served: Serve, text: str, line: str) -> None:
    call = invocations.decode(orjson.dumps({"inputs": [text]}), ("", {}), by_weight("text/csv"), served("text"))
    assert call.encode(served("text").predictor.predict(call.inputs)).body.decode() == line + "\n"


@pytest.mark.parametrize(
    "asked",
    [
        {"dataframe_records": [{"carrier": "UA", "distance": 100, "hour": 7}, {"carrier": "AA", "distance": 5, "hour": 9}]},
        {"dataframe_split": {"columns": ["hour", "tail", "carrier", "distance"], "data": [[7, "", "UA", 100], [9, "", "AA", 5]]}},
        {"instances": [{"carrier": "UA", "distance": 100, "hour": 7}, {"carrier": "AA", "distance": 5, "hour": 9}]},
    ],
)
def test_tables_of_mapped_columns(served: Serve, answered: Callable[[str, Call], Any], asked: Any) -> None:
    call = invocations.decode(orjson.dumps(asked), ("application/json", {}), [], served("flights"))
    assert answered("flights", call) == {"predictions": ROWS}


def test_columns_in_columns_out(served: Serve, answered: Callable[[str, Call], Any]) -> None:
    asked = {"inputs": {"carrier": ["UA"], "distance": [100], "hour": [7]}}
    call = invocations.decode(orjson.dumps(asked), ("", {}), [], served("flights"))
    assert answered("flights", call) == {"predictions": {name: [value] for name, value in ROWS[0].items()}}


def test_json_lines_name_the_line(served: Serve) -> None:
    with pytest.raises(InvalidRequest, match="line 3: the body is not JSON"):
        invocations.decode(b"[1,2,3]\n\n[1,2\n", ("application/jsonlines", {}), [], served("linear"))


def test_one_long_text_does_not_make_all_cells_as_long(served: Serve) -> None:
    call = invocations.decode(orjson.dumps({"inputs": ["a"]}), ("", {}), by_weight("text/csv"), served("text"))
    texts = np.array(["x" * 100_000, *["a"] * 1000], dtype=object)
    tracemalloc.start()
    try:
        assert call.encode({"y": texts}).body.count(b"\n") == 1001
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"\n" * (MAX_VALUES // 3 + 1), "text/csv"),
        (b"\r" * (MAX_VALUES + 1), "text/csv"),
        (b"," * (MAX_VALUES + 1), "text/csv"),
        (b"\n" * (MAX_VALUES + 1), "application/jsonlines"),
        (b'{"dataframe_records":[%s]}' % b",".join([b"{}"] * (MAX_VALUES // 3 + 1)), ""),
        (b'{"dataframe_split":{"columns":["hour"],"data":[%s]}}' % b",".join([b"[1]"] * (MAX_VALUES // 2 + 1)), ""),
    ],
)
def test_rows_and_columns_are_at_most_so_many_values(served: Serve, body: bytes, kind: str) -> None:
    """What is left out counts, too: it is filled in."""
    with pytest.raises(PayloadTooLarge, match="more than 2,097,152 values"):
        invocations.decode(body, (kind, {}), [], served("flights"))
