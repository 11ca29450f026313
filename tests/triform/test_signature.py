"""Validation and casts. Python's integers and fractions say what a cast may do."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto

from triform.errors import InvalidInput, UnsupportedModel
from triform.signature import BY_OIP, DATATYPES, ROWS, Array, Signature, TensorMetadata, cast, datatype_of_onnx, unrepresentable

NUMERIC = [d for d in DATATYPES if d.oip != "BYTES"]
EDGES = [
    0,
    1,
    -1,
    0.5,
    -0.0,
    2**11 + 1,
    2**24 + 1,
    2**53 + 1,
    2**63,
    2**64 - 1,
    -(2**63),
    65504,
    65520,
    1e39,
    math.nan,
    math.inf,
    -math.inf,
]


def tensor(datatype: str, *row_shape: int | str, name: str = "x") -> TensorMetadata:
    return TensorMetadata(name, datatype, (ROWS, *row_shape))


def _holds(value: Any, target: np.dtype[Any]) -> bool:
    """The rule, in exact arithmetic: whether `value` (a Python number) may become an element of `target`."""
    if target.kind == "f":
        with np.errstate(over="ignore"):
            became = target.type(value)
        if isinstance(value, int):
            return bool(np.isfinite(became)) and int(became) == value
        return bool(np.isfinite(became)) or not math.isfinite(value)
    if not math.isfinite(value):
        return False
    low, high = (0, 1) if target.kind == "b" else (np.iinfo(target).min, np.iinfo(target).max)
    return Fraction(value).denominator == 1 and low <= value <= high


def _same(got: Any, value: Any, target: np.dtype[Any]) -> bool:
    if target.kind != "f":
        return int(got) == int(value)
    want = target.type(value)
    return bool(got == want and np.signbit(got) == np.signbit(want)) or (math.isnan(got) and math.isnan(value))


def _edges(source: np.dtype[Any]) -> Array:
    """The edge values that the source dtype can hold."""
    return np.array([source.type(e) for e in EDGES if _holds(e, source)], dtype=source)


def _check(values: Array, target: str) -> None:
    """`cast` gives each value to the digit, or names the first that it cannot give."""
    metadata = tensor(target)
    bad = [i for i, v in enumerate(values.tolist()) if not _holds(v, metadata.dtype)]
    mask = unrepresentable(values, metadata.dtype)
    assert ([] if mask is None else np.flatnonzero(mask).tolist()) == bad
    if bad:
        with pytest.raises(
            InvalidInput, match=rf"^input 'x': .* cannot be held as {target} without changing it \(at \[{bad[0]}\]\)"
        ) as e:
            cast(values, metadata)
        assert (e.value.input, e.value.row) == ("x", bad[0])
        values = np.delete(values, bad)
    got = cast(values, metadata)
    assert got.dtype == metadata.dtype
    assert all(_same(g, v, metadata.dtype) for g, v in zip(got, values.tolist(), strict=True))


@pytest.mark.parametrize("source", [d.numpy for d in NUMERIC], ids=str)
@pytest.mark.parametrize("target", [d.oip for d in NUMERIC])
def test_a_cast_keeps_every_value_or_refuses(source: np.dtype[Any], target: str) -> None:
    edges = _edges(source)
    assert len(edges)
    for value in edges:  # one at a time, so that each is seen to pass or fail by itself
        _check(np.array([value]), target)


@given(data=st.data())
def test_any_cast_keeps_every_value_or_refuses(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([d.numpy for d in NUMERIC]))
    _check(data.draw(hnp.arrays(source, st.integers(0, 5))), data.draw(st.sampled_from([d.oip for d in NUMERIC])))


@given(
    st.lists(st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans()), max_size=5),
    st.sampled_from([d.oip for d in NUMERIC]),
)
def test_a_list_means_its_numbers_whatever_stands_beside_them(values: list[Any], target: str) -> None:
    """numpy alone would turn [2**53 + 1, 0.5] into floats first and lose the integer's last digit."""
    metadata = tensor(target)
    if all(_holds(v, metadata.dtype) for v in values):
        assert all(_same(g, v, metadata.dtype) for g, v in zip(cast(values, metadata), values, strict=True))
    else:
        with pytest.raises(InvalidInput):
            cast(values, metadata)


@pytest.mark.parametrize(
    ("value", "target", "told"),
    [
        (["a"], "FP32", "expected FP32, got text"),
        ([1.0], "BYTES", "expected text, got float"),
        (np.array([1.0]), "BYTES", "expected BYTES, got float64"),
        ([[1], [1, 2]], "FP32", "make no array"),
        ([["a"], ["b", "c"]], "BYTES", "expected text, got list"),
        ([None], "FP32", "got objects"),
        ([1, "a"], "BYTES", "expected text, got int (element 0)"),
        (["a", b"\xff"], "BYTES", "element 1 is not UTF-8"),
        (np.array(["2026-01-01"], dtype="M8[D]"), "INT64", "got dates"),
        (np.array([1j]), "FP64", "got complex numbers"),
    ],
    ids=str,
)
def test_what_is_of_another_kind_is_refused(value: Any, target: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=r"^input 'x': ") as error:
        cast(value, tensor(target))
    assert told in str(error.value)
    assert error.value.input == "x"


@given(st.lists(st.text(), max_size=4))
def test_text_and_its_utf8_are_the_same_tensor(words: list[str]) -> None:
    encodable = [w.encode(errors="replace").decode() for w in words]
    for given_as in (encodable, np.array(encodable, dtype=object), [w.encode() for w in encodable]):
        assert cast(given_as, tensor("BYTES")).tolist() == encodable


def test_an_array_that_fits_is_not_copied() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert Signature((tensor("FP32", 2),), ()).validate({"x": array})["x"] is array


def test_an_array_of_numbers_is_no_text() -> None:
    signature = Signature((TensorMetadata("x", "BYTES", ("rows",)),), ())
    for array in np.array([1.5]), np.array([1]), np.array([True]):  # numpy's default dtype among them
        with pytest.raises(InvalidInput, match="expected BYTES"):
            signature.validate({"x": array})
    assert signature.validate({"x": np.array(["a"], dtype=object)})["x"].tolist() == ["a"]


AGREEING = Signature((tensor("FP32", "n", "n", name="a"), tensor("FP32", "n", 3, name="b"), tensor("FP32", -1, name="c")), ())


def _arrays(**shapes: tuple[int, ...]) -> dict[str, Array]:
    fitting = {"a": (2, 4, 4), "b": (2, 4, 3), "c": (2, 9)}
    return {name: np.zeros(shape, np.float32) for name, shape in (fitting | shapes).items()}


def test_fixed_named_and_free_dimensions() -> None:
    AGREEING.validate(_arrays())
    AGREEING.validate(_arrays(a=(2, 7, 7), b=(2, 7, 3), c=(2, 0)))


@pytest.mark.parametrize(
    ("shapes", "name", "told"),
    [
        ({"a": (2, 4, 5)}, "a", "dimension 'n' is 5 here and 4 in 'a'"),
        ({"b": (2, 5, 3)}, "b", "dimension 'n' is 5 here and 4 in 'a'"),
        ({"b": (2, 4, 2)}, "b", "expected b FP32[rows, n, 3], got shape [2, 4, 2]"),
        ({"c": (2,)}, "c", "expected c FP32[rows, ?], got shape [2]"),
        ({"c": ()}, "c", "expected c FP32[rows, ?], got shape []"),
        ({"c": (3, 9)}, None, "a has 2, b has 2, c has 3"),
        ({"d": (2,)}, "d", "no input is called 'd': expected a, b, c"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], name: str | None, told: str) -> None:
    with pytest.raises(InvalidInput) as error:
        AGREEING.validate(_arrays(**shapes))
    assert told in str(error.value)
    assert error.value.input == name


def test_a_missing_input_and_an_endless_name_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"^input 'b' is missing: expected a, b, c$"):
        AGREEING.validate({"a": np.zeros((1, 2, 2), np.float32), "c": np.zeros((1, 1), np.float32)})
    with pytest.raises(InvalidInput) as error:
        AGREEING.validate(_arrays() | {"z" * 10_000: np.zeros(1)})
    assert len(str(error.value)) < 200


def test_the_table_agrees_with_onnx_and_numpy() -> None:
    for row in DATATYPES:
        assert datatype_of_onnx(row.onnx, "x") is row
        assert BY_OIP[row.oip] is row
    names = {"tensor(float)": "FLOAT", "tensor(double)": "DOUBLE"}
    for row in DATATYPES:
        spelled = names.get(row.onnx, row.onnx.removeprefix("tensor(").removesuffix(")").upper())
        assert TensorProto.DataType.Value(spelled) == row.onnx_enum


@pytest.mark.parametrize(
    ("onnx_type", "advice"),
    [
        ("tensor(bfloat16)", "put a Cast at the graph's boundary"),
        ("seq(map(int64,tensor(float)))", "drop = true"),
        ("optional(tensor(float))", "drop = true"),
        ("tensor(complex64)", "add a Cast in the graph"),
    ],
)
def test_a_type_that_no_array_carries_is_refused_with_advice(onnx_type: str, advice: str) -> None:
    with pytest.raises(UnsupportedModel, match="'probabilities'") as error:
        datatype_of_onnx(onnx_type, "probabilities")
    assert advice in str(error.value)


def test_text_among_numbers_is_refused_before_numpy_makes_text_of_all() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="expected FP32, got text"):
            cast([["x" * 100_000, 1, 2], *([1, 2, 3] for _ in range(1000))], TensorMetadata("x", "FP32", ("rows", 3)))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "UINT64"])
@pytest.mark.parametrize("value", [[True], [[1, 2], [3, False]], True, [1, [True]]])
def test_a_tensor_takes_booleans_only_as_what_they_are(datatype: str, value: Any) -> None:
    """JSON's true is no number for the Open Inference Protocol and TensorFlow Serving."""
    with pytest.raises(InvalidInput, match=f"expected {datatype}, got booleans"):
        cast(value, TensorMetadata("x", datatype, ()), booleans=False)


def test_booleans_of_a_typed_array_are_numbers() -> None:
    signature = Signature((TensorMetadata("x", "FP32", ("rows",)),), ())
    assert signature.validate({"x": np.array([True, False])})["x"].tolist() == [1.0, 0.0]
    with pytest.raises(InvalidInput, match="expected FP32, got booleans"):
        signature.validate({"x": [True, False]})
    boolean = Signature((TensorMetadata("x", "BOOL", ("rows",)),), ())
    assert boolean.validate({"x": [True, 0, 1.0]})["x"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([("y", "FP32", ())], 4),
        ([("y", "FP32", (2, 3)), ("label", "INT64", ())], 32),
        ([("y", "FP32", (-1,))], None),
        ([("y", "FP32", ("words",))], None),
        ([("y", "FP32", ()), ("label", "BYTES", ())], None),
    ],
)
def test_the_bytes_of_a_rows_outputs_are_known_where_they_are_fixed(outputs: Any, expected: int | None) -> None:
    made = tuple(TensorMetadata(name, datatype, (ROWS, *shape)) for name, datatype, shape in outputs)
    assert Signature((), made).row_bytes == expected
