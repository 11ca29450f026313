"""Arrow batches to tensors and back: the same rows as records, the same refusals, no copies where none are needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triform import arrow
from triform.config import Column, InputConfig, ModelConfig, OutputConfig
from triform.errors import InvalidInput
from triform.features import Features
from triform.signature import BY_OIP, ROWS, Array, Signature, TensorMetadata

INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
FLOATS = (pa.float16(), pa.float32(), pa.float64())
NUMBERS = (*INTEGERS, *FLOATS, pa.bool_())
TEXTS = (pa.string(), pa.large_string(), pa.string_view())
LISTS = (pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2))
TARGETS = [name for name in BY_OIP if name != "BYTES"]
WORDS = st.one_of(st.text(max_size=6), st.sampled_from(["", "é", "日本", "ends in NUL\0", "x" * 64, "x" * 65, "NaN"]))


def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Python values of an Arrow type, small ones often, so that many rows fit."""
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_floating(kind):
        return st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.5]), st.floats(width=kind.bit_width)).map(kind.to_pandas_dtype())
    if pa.types.is_integer(kind):
        info = np.iinfo(kind.to_pandas_dtype())
        return st.one_of(st.integers(0, 1), st.integers(int(info.min), int(info.max)))
    return WORDS


class Input(NamedTuple):
    tensor: TensorMetadata
    config: InputConfig
    columns: dict[str, pa.Array]


@st.composite
def inputs(draw: st.DrawFn, name: str, rows: int) -> Input:
    """One input tensor with its mapping, and the Arrow columns that feed it: values, several stacked, or lists."""
    datatype = draw(st.sampled_from([*TARGETS, "BYTES"]))
    sources = TEXTS if datatype == "BYTES" else NUMBERS
    policies: list[Any] = ["dead-letter", "nan", "?"] if datatype == "BYTES" else ["dead-letter", 0, 1]
    policies += ["nan"] if datatype.startswith("FP") else []
    shape = draw(st.sampled_from(["scalar", "one", "stacked", "lists"]))
    columns, given = {}, []
    for i in range(2 if shape == "stacked" else 1):
        kind = draw(st.sampled_from(sources))
        values = values_of(kind)
        if shape == "lists":
            kind = pa.string() if kind == pa.string_view() else kind  # Arrow cannot filter lists of views yet
            make = draw(st.sampled_from(LISTS))
            size = 2 if make is LISTS[2] else draw(st.sampled_from([2, 3]))
            values = st.lists(st.one_of(values, st.none()), min_size=2, max_size=size)
            array = pa.array(draw(st.lists(st.one_of(values, st.none()), min_size=rows, max_size=rows)), make(kind))
        else:
            array = pa.array(draw(st.lists(st.one_of(values, values, st.none()), min_size=rows, max_size=rows)), kind)
            if kind not in (pa.string_view(), pa.float16()) and draw(st.booleans()):
                array = array.dictionary_encode()
        columns[f"{name}{i}"] = array
        given.append(Column(f"{name}{i}", draw(st.sampled_from(policies))))
    row_shape = {"scalar": (), "one": (1,), "stacked": (2,), "lists": (2,)}[shape]
    return Input(TensorMetadata(name, datatype, (ROWS, *row_shape)), InputConfig(columns=tuple(given)), columns)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Features, pa.RecordBatch]:
    rows = draw(st.integers(0, 6))
    drawn = [draw(inputs(name, rows)) for name in ("a", "b")[: draw(st.integers(1, 2))]]
    config = ModelConfig(inputs={i.tensor.name: i.config for i in drawn})
    columns = {name: array for i in drawn for name, array in i.columns.items()}
    batch = pa.record_batch(columns).slice(draw(st.integers(0, rows)), draw(st.integers(0, rows)))
    return Features(Signature(tuple(i.tensor for i in drawn), ()), config), batch


def equal(a: Array, b: Array) -> bool:
    if "U" in (a.dtype.kind, b.dtype.kind):
        return a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


@settings(max_examples=300)
@given(batches())
def test_arrow_and_records_mean_the_same(drawn: tuple[Features, pa.RecordBatch]) -> None:
    features, batch = drawn
    records = batch.to_pylist()
    refused = {}
    for row, record in enumerate(records):
        try:
            features.from_records([record])
        except InvalidInput as error:
            refused[row] = error.code
    encoded = arrow.encode(features, batch)
    assert [r.row for r in encoded.refused] == sorted(refused)
    if not any(f.tensor.row_shape == (2,) for f in features.inputs):  # a list may have two faults: either is told
        assert {r.row: r.code for r in encoded.refused} == refused
    fitting = features.from_records([r for row, r in enumerate(records) if row not in refused])
    for name, tensor in fitting.items():
        assert equal(encoded.inputs[name], tensor), (encoded.inputs[name], tensor)
    if encoded.keep is not None:
        assert np.flatnonzero(~encoded.keep).tolist() == sorted(refused)


def one(datatype: str, *row_shape: int | str, null: Any = "dead-letter") -> Features:
    tensor = TensorMetadata("x", datatype, (ROWS, *row_shape))
    return Features(Signature((tensor,), ()), ModelConfig(inputs={"x": InputConfig(null=null)}))


def encode(features: Features, values: pa.Array) -> arrow.Encoded:
    return arrow.encode(features, pa.record_batch({"x": values}))


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("row_shape", [(), (1,)])
def test_a_column_that_fits_is_not_copied(offset: int, row_shape: tuple[int, ...]) -> None:
    values = pa.array(np.arange(10, dtype=np.float32)).slice(offset)
    tensor = encode(one("FP32", *row_shape), values).inputs["x"]
    assert tensor.ravel().tolist() == list(range(offset, 10))
    assert tensor.__array_interface__["data"][0] == values.buffers()[1].address + 4 * offset


def test_fixed_size_lists_that_fit_are_not_copied() -> None:
    numbers = pa.array(np.arange(6, dtype=np.float32))
    tensor = encode(one("FP32", 3), pa.FixedSizeListArray.from_arrays(numbers, 3)).inputs["x"]
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.__array_interface__["data"][0] == numbers.buffers()[1].address


@pytest.mark.parametrize("words", [127, 128, 255, 256])
@pytest.mark.parametrize("index", [pa.int8(), pa.uint8()])
def test_a_full_dictionary_beside_a_null(words: int, index: pa.DataType) -> None:
    """The word that stands for a null must not be out of the index type's range."""
    last = min(words, 2 ** (8 if index == pa.uint8() else 7)) - 1
    codes = pa.array([0, None, last], index)
    values = pa.DictionaryArray.from_arrays(codes, pa.array([f"word {i}" for i in range(words)]))
    assert encode(one("BYTES", null="?"), values).inputs["x"].tolist() == ["word 0", "?", f"word {last}"]


def test_a_null_in_the_dictionary_is_a_null() -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None]))
    assert [(r.row, r.code) for r in encode(one("BYTES"), values).refused] == [(1, "missing_value")]


def test_text_that_is_not_utf8_is_refused_row_by_row() -> None:
    values = pa.array([b"a", b"\xff", b"\xc3\xa9", b"b\xff"]).view(pa.string())
    encoded = encode(one("BYTES"), values)
    assert encoded.inputs["x"].tolist() == ["a", "é"]
    assert [(r.row, r.code, r.reason) for r in encoded.refused] == [
        (row, "invalid_input", "column 'x': the text is not UTF-8") for row in (1, 3)
    ]


@pytest.mark.parametrize(("null", "kept", "refused"), [("dead-letter", [], [0, 1]), (0, [0, 0], []), ("nan", [np.nan] * 2, [])])
def test_a_column_without_any_value_holds_nulls(null: Any, kept: list[float], refused: list[int]) -> None:
    encoded = encode(one("FP32", null=null), pa.nulls(2))
    np.testing.assert_array_equal(encoded.inputs["x"], np.array(kept, np.float32))
    assert [r.row for r in encoded.refused] == refused


def test_a_refusal_says_why() -> None:
    encoded = encode(one("UINT8"), pa.array([1, 300, None, -1]))
    assert encoded.inputs["x"].tolist() == [1]
    assert encoded.refused == [
        (1, "invalid_input", "column 'x': 300 cannot be held as UINT8 without changing it"),
        (2, "missing_value", "column 'x' is null"),
        (3, "invalid_input", "column 'x': -1 cannot be held as UINT8 without changing it"),
    ]


@pytest.mark.parametrize(
    ("row_shape", "values", "kept", "refused"),
    [
        ((2,), [[1, 2], [3], None, [4, 5]], [[1, 2], [4, 5]], [1, 2]),
        (("n",), [[1, 2], [], [3, 4]], [[1, 2], [3, 4]], [1]),
        (("n",), [[], [1, 2]], [[]], [1]),
        ((2, 2), [[[1, 2], [3, 4]], [[1, 2]], [[1, 2], [3]], [[1, 2], None]], [[[1, 2], [3, 4]]], [1, 2, 3]),
        (("n", "m"), [[], [[1, 2]]], [[]], [1]),
    ],
)
def test_lists_of_another_shape_are_refused(row_shape: Any, values: list[Any], kept: list[Any], refused: list[int]) -> None:
    kind = pa.float32()
    for _ in row_shape:
        kind = pa.list_(kind)
    encoded = encode(one("FP32", *row_shape), pa.array(values, kind))
    assert encoded.inputs["x"].tolist() == kept
    assert [r.row for r in encoded.refused] == refused


@pytest.mark.parametrize("digits", [15, 16])
def test_decimals_feed_integers_as_far_as_fp64_holds_them(digits: int) -> None:
    values = pa.array([10**digits - 1]).cast(pa.decimal128(19, 0)).cast(pa.decimal128(digits, 0))
    if digits == 15:
        assert encode(one("INT64"), values).inputs["x"].tolist() == [10**15 - 1]
    else:
        with pytest.raises(InvalidInput, match="decimal128"):
            encode(one("INT64"), values)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"y": pa.array([1.0])}, "column 'x' is missing"),
        ({"x": pa.array(["a"])}, "column 'x' is string, x FP32[rows] cannot be filled from it"),
        ({"x": pa.array([[1.0]])}, "cannot be filled from it"),
        ({"x": pa.array([[None]])}, "column 'x' is list<item: null>"),
        ({"x": pa.array([0], pa.timestamp("us"))}, "cannot be filled from it"),
        ({"x": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))}, "cannot be filled from it"),
    ],
)
def test_a_schema_that_does_not_fit_is_told_at_once(columns: dict[str, pa.Array], told: str) -> None:
    with pytest.raises(InvalidInput) as error:
        arrow.encode(one("FP32"), pa.record_batch(columns))
    assert told in str(error.value)
    with pytest.raises(InvalidInput, match="there twice"):
        arrow.encode(one("FP32"), pa.RecordBatch.from_arrays([pa.array([1.0])] * 2, ["x", "x"]))


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("datatype", list(BY_OIP))
@pytest.mark.parametrize("row_shape", [(), (1,), (3,), (2, 2), (-1, "n")], ids=str)
def test_outputs_become_columns_of_their_schema(datatype: str, row_shape: tuple[int | str, ...], rows: int) -> None:
    tensor = TensorMetadata("y", datatype, (ROWS, *row_shape))
    features = Features(Signature((), (tensor,)), ModelConfig())
    values = np.ones((rows, *(d if isinstance(d, int) and d > 0 else 2 for d in row_shape)), tensor.dtype)
    values = tensor.no_rows() if rows == 0 else values.astype(str).astype(object) if datatype == "BYTES" else values
    column = arrow.to_arrow(features, {"y": values})["y"]
    column.validate(full=True)
    assert column.type == arrow.output_schema(features).field("y").type
    assert column.to_pylist() == features.to_columns({"y": values})["y"].tolist()


def test_labels_and_nan_in_the_answer() -> None:
    tensors = TensorMetadata("label", "INT64", (ROWS,)), TensorMetadata("p", "FP32", (ROWS, 2))
    config = ModelConfig(outputs={"label": OutputConfig(labels=("no", "yes")), "p": OutputConfig(columns=("p0", "p1"))})
    outputs = {"label": np.array([1, 0]), "p": np.array([[0.5, np.nan], [1, 0]], np.float32)}
    columns = arrow.to_arrow(Features(Signature((), tensors), config), outputs)
    assert columns["label"].to_pylist() == ["yes", "no"]
    assert columns["p1"].null_count == 0
    assert np.isnan(columns["p1"][0].as_py())
