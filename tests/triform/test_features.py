"""Records to tensors and outputs to columns, by a model.toml's mapping."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tests.calls import calls_of
from triform.config import InputConfig, ModelConfig, OutputConfig, convert
from triform.errors import ConfigurationError, InvalidInput, MissingValue
from triform.features import Features, _shape
from triform.signature import ROWS, Array, Signature, TensorMetadata, cast


def features(datatype: str, *row_shape: int | str, **given: Any) -> Features:
    """The mapping of one input `x`; `given` is its table in model.toml."""
    config = ModelConfig(inputs={"x": convert(given, InputConfig, "model.toml")})
    return Features(Signature((TensorMetadata("x", datatype, (ROWS, *row_shape)),), ()), config)


def answers(datatype: str, *row_shape: int | str, **given: Any) -> Features:
    config = ModelConfig(outputs={"y": convert(given, OutputConfig, "model.toml")})
    return Features(Signature((), (TensorMetadata("y", datatype, (ROWS, *row_shape)),)), config)


@pytest.mark.parametrize(
    ("mapping", "records", "expected"),
    [
        (features("FP32"), [{"x": 1}, {"x": 2.5}], [1, 2.5]),
        (features("FP32", 1), [{"x": 1}, {"x": 2.5}], [[1], [2.5]]),
        (features("FP32", 1), [{"x": [1]}, {"x": [2.5]}], [[1], [2.5]]),
        (features("FP32", 2, columns=["a", "b"]), [{"a": 1, "b": 2, "more": "ignored"}, {"b": 4, "a": 3}], [[1, 2], [3, 4]]),
        (features("FP32", -1, columns=["a", "b", "a2"]), [{"a": 1, "b": 2, "a2": 3}], [[1, 2, 3]]),
        (features("INT64", "n"), [{"x": [1, 2]}, {"x": [3, 4]}], [[1, 2], [3, 4]]),
        (features("INT64", 2, 1), [{"x": [[1], [2]]}], [[[1], [2]]]),
        (features("INT64"), [{"x": 2**53 + 1}, {"x": 1.0}], [2**53 + 1, 1]),
        (features("BOOL"), [{"x": True}, {"x": 0}], [True, False]),
        (features("BYTES"), [{"x": "é"}, {"x": "ends in NUL\0"}], ["é", "ends in NUL\0"]),
        (features("BYTES", 2), [{"x": ["a", "bc"]}], [["a", "bc"]]),
        (features("INT64", null=-1), [{"x": None}, {}, {"x": 2**53 + 1}], [-1, -1, 2**53 + 1]),
        (features("BYTES", null="nan"), [{}], ["nan"]),
        (features("INT64", 2, null=0), [{"x": [None, 5]}], [[0, 5]]),
        (features("FP32", 2, columns=[{"name": "a", "null": 7}, "b"]), [{"b": 1}], [[7, 1]]),
    ],
)
def test_records_become_tensors(mapping: Features, records: list[dict[str, Any]], expected: Any) -> None:
    tensor = mapping.from_records(records)["x"]
    assert tensor.tolist() == expected
    assert tensor.dtype == mapping.signature.inputs[0].dtype


def test_a_null_becomes_nan_where_the_column_says_so() -> None:
    tensor = features("FP32", 2, columns=["a", "b"], null="nan").from_records([{"a": 1, "b": None}])["x"]
    assert tensor[0, 0] == 1
    assert math.isnan(tensor[0, 1])


@pytest.mark.parametrize(
    ("mapping", "good", "bad"),
    [
        (features("FP32", columns=["c"]), 1, "text"),
        (features("FP32", columns=["c"]), 0.5, 2**24 + 1),
        (features("FP32", columns=["c"]), 0.5, 1e39),
        (features("FP32", columns=["c"]), 1, [1]),
        (features("FP32", columns=["c"]), 1, {}),
        (features("UINT8", columns=["c"]), 1, 300),
        (features("INT64", columns=["c"]), 1, 0.5),
        (features("INT64", columns=["c"]), 1, 2**64),
        (features("BYTES", columns=["c"]), "a", 1),
        (features("FP32", 2, columns=["c"]), [1, 2], [1, 2, 3]),
        (features("FP32", 2, columns=["c"]), [1, 2], [1, [2]]),
        (features("FP32", 2, columns=["c"]), [1, 2], 1),
        (features("FP32", "n", columns=["c"]), [1, 2], [1]),
        (features("BYTES", 2, columns=["c"]), ["a", "b"], ["a", 1]),
        (features("FP32", columns=["c"], null="nan"), None, "text"),
        (features("UINT8", columns=["c"]), 1, None),
        (features("FP32", 2, columns=["c"], null="nan"), [1, None], None),
        (features("FP32", 2, columns=["c"]), [1, 2], [1, None]),
    ],
)
def test_a_row_that_does_not_fit_is_named(mapping: Features, good: Any, bad: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^row 2: column 'c'") as error:
        mapping.from_records([{"c": good}, {"c": good}, {"c": bad}, {"c": good}])
    assert (error.value.row, error.value.input) == (2, "c")
    assert isinstance(error.value, MissingValue) == (bad is None or (isinstance(bad, list) and None in bad))


def test_a_record_is_an_object() -> None:
    with pytest.raises(InvalidInput, match=r"^row 1: expected an object of named columns, got int$"):
        features("FP32").from_records([{"x": 1}, 5])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("mapping", "shape"),
    [(features("FP32"), (0,)), (features("BYTES", 2, columns=["a", "b"]), (0, 2)), (features("FP32", 3, "n"), (0, 3, 0))],
)
def test_no_records_are_a_tensor_of_no_rows(mapping: Features, shape: tuple[int, ...]) -> None:
    tensor = mapping.from_records([])["x"]
    assert (tensor.shape, tensor.dtype) == (shape, mapping.signature.inputs[0].dtype)


@pytest.mark.parametrize(
    ("mapping", "output", "columns"),
    [
        (answers("FP32"), [1.0, 2.0], {"y": [1.0, 2.0]}),
        (answers("FP32", 1), [[1.0], [2.0]], {"y": [1.0, 2.0]}),
        (answers("FP32", 2), [[1.0, 2.0]], {"y": [[1.0, 2.0]]}),
        (answers("FP32", 1, columns=["p"]), [[1.0], [2.0]], {"p": [1.0, 2.0]}),
        (answers("FP32", 2, columns=["p", "q"]), [[1.0, 2.0], [3.0, 4.0]], {"p": [1.0, 3.0], "q": [2.0, 4.0]}),
        (answers("FP32", -1, columns=["p", "q"]), [[1.0, 2.0]], {"p": [1.0], "q": [2.0]}),
        (answers("INT64", labels=["on time", "late"]), [1, 0], {"y": ["late", "on time"]}),
        (answers("INT64", 2, labels=["on time", "late"]), [[1, 0]], {"y": [["late", "on time"]]}),
        (answers("FP32", 2, columns=["p", "q"]), np.empty((0, 2)), {"p": [], "q": []}),
    ],
)
def test_outputs_become_labelled_columns(mapping: Features, output: Any, columns: dict[str, Any]) -> None:
    got: dict[str, Array] = mapping.to_columns({"y": np.asarray(output, dtype=mapping.signature.outputs[0].dtype)})
    assert {name: values.tolist() for name, values in got.items()} == columns


@pytest.mark.parametrize(
    ("mapping", "output", "told"),
    [
        (answers("INT64", labels=["a", "b"]), [2], "outputs.y.labels names 2 classes; the model answered 2"),
        (answers("FP32", -1, columns=["p", "q"]), [[1.0]], "it has no column 'q'"),
    ],
)
def test_an_answer_that_the_mapping_did_not_foresee(mapping: Features, output: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        mapping.to_columns({"y": np.asarray(output)})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"columns": ["a", "b"]}, "names 2 columns for x INT64[rows, 3]"),
        ({"null": "nan"}, "INT64 has no NaN"),
        ({"null": 0.5}, "cannot be held as INT64"),
        ({"null": "unknown"}, """expected "nan", "dead-letter" or a number, got 'unknown'"""),
    ],
)
def test_a_mapping_that_does_not_fit_the_signature(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        features("INT64", 3, **given)
    assert str(error.value).startswith("model.toml: inputs.x.columns")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("datatype", "shape", "given", "told"),
    [
        ("FP32", (2,), {"columns": ["p"]}, "outputs.y.columns names 1 column"),
        ("FP32", (2, 2), {"columns": ["p", "q"]}, "outputs.y.columns names 2 column"),
        ("FP32", (), {"labels": ["a"]}, "outputs.y.labels: needs an integer output"),
    ],
)
def test_output_columns_that_do_not_fit(datatype: str, shape: tuple[int, ...], given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        answers(datatype, *shape, **given)


def test_two_outputs_cannot_share_a_column() -> None:
    outputs = tuple(TensorMetadata(name, "FP32", (ROWS,)) for name in ("p", "q"))
    with pytest.raises(ConfigurationError, match="two outputs give a column 'p'"):
        Features(Signature((), outputs), ModelConfig(outputs={"q": OutputConfig(columns=("p",))}))


@pytest.mark.parametrize("at", [1, 1234, 4998, 4999])
@pytest.mark.parametrize(
    ("mapping", "good", "bad"),
    [
        (features("INT64"), 1, "a"),
        (features("INT64"), 1, 1.5),
        (features("INT64", 2), [1, 2], [1, "a"]),
        (features("INT64", 2), [1, 2], [1]),
        (features("INT64", "n"), [1, 2], [1, 2, 3]),
    ],
)
def test_the_row_at_fault_is_found_without_a_look_at_each(mapping: Features, good: Any, bad: Any, at: int) -> None:
    """A caller chooses how many rows stand before it."""
    records = [{"x": bad if row == at else good} for row in range(5000)]

    def refused() -> None:
        with pytest.raises(InvalidInput, match=f"row {at}: column 'x'"):
            mapping.from_records(records)

    assert calls_of(cast, refused) + calls_of(_shape, refused) < 100


def test_rows_that_fit_by_themselves_and_not_together_are_refused_all_the_same() -> None:
    with pytest.raises(InvalidInput, match="column 'x'"):
        features("INT64", 1).from_records([{"x": 1}, {"x": [1]}])


def test_one_long_text_does_not_make_all_values_as_long() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="row 0: column 'x': expected x FP32"):
            features("FP32", 3).from_records([{"x": ["x" * 100_000, *[""] * 1000]}])
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_column_that_is_left_out_is_filled_as_its_nulls_are() -> None:
    mapping = features("FP32", 3, columns=["a", {"name": "b", "null": "nan"}, {"name": "c", "null": 7}])
    assert str(mapping.from_columns({"a": [1, 2]})["x"].tolist()) == "[[1.0, nan, 7.0], [2.0, nan, 7.0]]"
    text = features("BYTES", 2, columns=["a", {"name": "b", "null": "none"}])
    assert text.from_columns({"a": ["x"]})["x"].tolist() == [["x", "none"]]
    with pytest.raises(MissingValue, match="row 0: column 'a'"):
        text.from_columns({"b": ["x"]})


@pytest.mark.parametrize("datatype", ["FP32", "INT8", "BOOL"])
def test_booleans_are_0_and_1_in_a_column(datatype: str) -> None:
    """As those of a Parquet file are; a tensor takes none (test_signature.py)."""
    assert features(datatype).from_records([{"x": True}, {"x": 0}])["x"].tolist() == [1, 0]
    assert features(datatype).from_columns({"x": [False, 1]})["x"].tolist() == [0, 1]
