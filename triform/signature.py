"""What a model takes and gives, and the only table of datatypes: ONNX <-> numpy <-> Open Inference Protocol (OIP).

    caller's arrays -> Signature.validate (names, shapes, casts) -> arrays that ONNX Runtime takes as they are

A shape holds ints (fixed), names (dynamic; the same name means the same size wherever it stands) and -1 (dynamic, unnamed).
Axis 0 is the batch axis: `Signature.validate` checks that every input brings the same number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from triform.errors import InvalidInput, UnsupportedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = np.ndarray[Any, np.dtype[Any]]  # what NDArray[Any] is
Dim = int | str
ROWS: Final = "rows"  # how the batch axis is called in every packaged signature


class Datatype(NamedTuple):
    """One row of the table. `numpy` is the dtype of the arrays that ONNX Runtime takes and returns."""

    oip: str  # Open Inference Protocol, "Tensor Data Types"
    onnx: str  # as onnxruntime's NodeArg.type spells it
    onnx_enum: int  # onnx.TensorProto.DataType
    numpy: np.dtype[Any]


DATATYPES: Final[tuple[Datatype, ...]] = (
    Datatype("BOOL", "tensor(bool)", 9, np.dtype(np.bool_)),
    Datatype("UINT8", "tensor(uint8)", 2, np.dtype(np.uint8)),
    Datatype("UINT16", "tensor(uint16)", 4, np.dtype(np.uint16)),
    Datatype("UINT32", "tensor(uint32)", 12, np.dtype(np.uint32)),
    Datatype("UINT64", "tensor(uint64)", 13, np.dtype(np.uint64)),
    Datatype("INT8", "tensor(int8)", 3, np.dtype(np.int8)),
    Datatype("INT16", "tensor(int16)", 5, np.dtype(np.int16)),
    Datatype("INT32", "tensor(int32)", 6, np.dtype(np.int32)),
    Datatype("INT64", "tensor(int64)", 7, np.dtype(np.int64)),
    Datatype("FP16", "tensor(float16)", 10, np.dtype(np.float16)),
    Datatype("FP32", "tensor(float)", 1, np.dtype(np.float32)),
    Datatype("FP64", "tensor(double)", 11, np.dtype(np.float64)),
    Datatype("BYTES", "tensor(string)", 8, np.dtype(object)),
)
BY_OIP: Final = {d.oip: d for d in DATATYPES}
BY_ONNX: Final = {d.onnx: d for d in DATATYPES}


def datatype_of_onnx(onnx_type: str, tensor: str) -> Datatype:
    """The datatype for onnxruntime's spelling (`tensor(float)`), or `UnsupportedModel` that says what to do."""
    if onnx_type in BY_ONNX:
        return BY_ONNX[onnx_type]
    if onnx_type == "tensor(bfloat16)":
        raise UnsupportedModel(
            f"'{tensor}' is BF16, which numpy cannot hold: put a Cast at the graph's boundary so that it is FLOAT or FLOAT16"
        )
    if onnx_type.startswith(("seq(", "map(", "optional(", "sparse_tensor(")):
        raise UnsupportedModel(
            f"'{tensor}' is {onnx_type}, not a tensor: export the model so that it gives tensors "
            "(skl2onnx: options={'zipmap': False}), or leave the output out with `drop = true` in model.toml"
        )
    raise UnsupportedModel(f"'{tensor}' has type {onnx_type}; Triform carries {', '.join(BY_OIP)}: add a Cast in the graph")


class TensorMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output. `shape` is as a caller sees it: axis 0 holds the rows, whatever axis the graph has them on."""

    name: str
    datatype: str
    shape: tuple[Dim, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return BY_OIP[self.datatype].numpy

    @property
    def row_shape(self) -> tuple[Dim, ...]:
        return self.shape[1:]

    def no_rows(self) -> Array:
        """The array of zero rows; a dynamic dimension is 0 too."""
        return np.empty((0, *(d if isinstance(d, int) and d >= 0 else 0 for d in self.row_shape)), self.dtype)

    def __str__(self) -> str:
        dims = ", ".join("?" if d == -1 else str(d) for d in self.shape)
        return f"{self.name} {self.datatype}[{dims}]"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The inputs a model takes and the outputs it gives, in the graph's order."""

    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]

    @cached_property
    def _expected(self) -> tuple[tuple[str, np.dtype[Any] | None, tuple[Dim, ...] | None, TensorMetadata], ...]:
        """Of each input: its name, the dtype of arrays that need no look at their elements, and the shape of a row that needs
        none either: found once, for a small request takes hardly longer than that."""
        return tuple(
            (t.name, None if t.datatype == "BYTES" else t.dtype, t.row_shape if t.shape[:1] == (ROWS,) else None, t)
            for t in self.inputs
        )

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.inputs)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.outputs)

    @cached_property
    def row_bytes(self) -> int | None:
        """Of a row's outputs; None where some have no fixed size."""
        sizes = [0 if t.datatype == "BYTES" else t.dtype.itemsize for t in self.outputs]
        shapes = [[d if isinstance(d, int) else -1 for d in t.row_shape] for t in self.outputs]
        if not all(sizes) or any(d < 0 for shape in shapes for d in shape):
            return None
        return sum(size * prod(shape) for size, shape in zip(sizes, shapes, strict=True))

    def validate(self, arrays: Mapping[str, Any]) -> dict[str, Array]:
        """Checks names, ranks, sizes and row counts, and casts where nothing is lost.

        Takes arrays of shape [rows, ...] by input name; returns them with the signature's dtypes (no copy where they
        fit already). Raises `InvalidInput`, naming the input, what was expected and what came.
        """
        self.check_names(arrays)
        sizes: dict[str, tuple[int, str]] = {}
        checked: dict[str, Array] = {}
        for name, dtype, row_shape, tensor in self._expected:
            array = arrays[name]
            if type(array) is not np.ndarray or dtype is None or array.dtype != dtype:
                array = cast(array, tensor, booleans=False)
            if array.ndim == 0 or array.shape[1:] != row_shape:
                _check_shape(array.shape, tensor, sizes)
            checked[name] = array
        if len(checked) > 1 and len({a.shape[0] for a in checked.values()}) > 1:
            counts = ", ".join(f"{n} has {a.shape[0]}" for n, a in checked.items())
            raise InvalidInput(f"the inputs differ in their number of rows: {counts}")
        return checked

    def check_names(self, names: Collection[str]) -> None:
        """Raises `InvalidInput` for a name that is no input's, and for an input that is not named."""
        known = self.input_names
        if known == (*names,):
            return
        for name in names:
            if name not in known:
                raise InvalidInput(f"no input is called {_quoted(name)}: expected {', '.join(known)}", input=name[:80])
        for name in known:
            if name not in names:
                raise InvalidInput(f"input '{name}' is missing: expected {', '.join(known)}", input=name)


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _check_shape(shape: tuple[int, ...], tensor: TensorMetadata, sizes: dict[str, tuple[int, str]]) -> None:
    """Compares one array's shape with the signature; `sizes` gathers what each named dimension has been so far."""
    fits = len(shape) == len(tensor.shape)
    for have, want in zip(shape, tensor.shape, strict=False):
        if isinstance(want, str) and want != ROWS:
            seen, where = sizes.setdefault(want, (have, tensor.name))
            if fits and seen != have:
                raise InvalidInput(
                    f"input '{tensor.name}': dimension '{want}' is {have} here and {seen} in '{where}'; it must be the same",
                    input=tensor.name,
                )
        elif isinstance(want, int) and want != -1:
            fits = fits and have == want
    if not fits:
        raise InvalidInput(f"input '{tensor.name}': expected {tensor}, got shape {list(shape)}", input=tensor.name)


def cast(value: Any, tensor: TensorMetadata, *, booleans: bool = True) -> Array:
    """`value` as an array of the tensor's dtype. Float rounding is allowed; nothing else may change.

    Refused with `InvalidInput`: overflow (a finite value that becomes infinite, an integer out of range), a fraction or NaN
    for an integer, an integer beyond a float's mantissa, text for numbers and numbers for text. `booleans`: whether those in
    lists are the numbers 0 and 1, as those of a typed array are.
    """
    array = _as_array(value, tensor, booleans)
    if tensor.datatype == "BYTES":
        return _as_text(array, tensor.name)
    if array.dtype == tensor.dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise InvalidInput(f"input '{tensor.name}': expected {tensor.datatype}, got {_kind(array)}", input=tensor.name)
    bad = unrepresentable(array, tensor.dtype)
    if bad is not None and bad.any():
        raise _changed(array, np.argwhere(bad)[0], tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(tensor.dtype)


def _changed(array: Array, at: Iterable[int], tensor: TensorMetadata) -> InvalidInput:
    place = tuple(map(int, at))
    return InvalidInput(
        f"input '{tensor.name}': {array[place]!s:.80} cannot be held as {tensor.datatype} without changing it (at {list(place)})",
        input=tensor.name,
        row=place[0] if place else None,
    )


def _as_array(value: Any, tensor: TensorMetadata, booleans: bool) -> Array:
    """`value` as numpy reads it, but that nothing is lost: numpy rounds integers beside floats, and cuts a NUL off text."""
    if isinstance(value, np.ndarray):
        return value
    try:
        if tensor.datatype == "BYTES":
            return np.asarray(value, dtype=object)
        if (array := few_numbers(value, tensor.dtype)) is not None:
            return array
        if refused := _kinds(value, _TEXT if booleans or tensor.datatype == "BOOL" else _NO_NUMBERS):
            told = "booleans" if refused == {bool} else "text"
            raise InvalidInput(f"input '{tensor.name}': expected {tensor.datatype}, got {told}", input=tensor.name)
        array = np.asarray(value)
        if _are_small(array, tensor.dtype):
            return array.astype(tensor.dtype)
        return _unrounded(np.asarray(value, dtype=object), array, tensor) if _may_be_rounded(array, tensor.dtype) else array
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"input '{tensor.name}': expected {tensor.datatype}, got values that make no array ({error})", input=tensor.name
        ) from error


_TEXT: Final = frozenset({str, bytes})  # numpy would make text of all, each as long as the longest
_NO_NUMBERS: Final = _TEXT | {bool}
_FEW: Final = 256


def _kinds(value: Any, looked_for: frozenset[type]) -> frozenset[type]:
    """Which of some types there are in nested lists: those of the first list that has any."""
    pending = [value]
    for item in pending:  # grows meanwhile: level by level
        kinds = set(map(type, item)) if isinstance(item, list | tuple) else {type(item)}
        if not looked_for.isdisjoint(kinds):
            return looked_for & kinds
        if list in kinds or tuple in kinds:
            pending.extend(item)
    return frozenset()


def few_numbers(value: Any, dtype: np.dtype[Any]) -> Array | None:
    """A short list of numbers of which the dtype holds every one, floats rounded at most; None: it takes a closer look.

    That is seen faster without numpy. A list of floats that begins with NaN is looked at closely.
    """
    if type(value) is not list or not 0 < len(value) <= _FEW or (held := _HELD.get(dtype)) is None:
        return None
    kinds, least, most = held
    if kinds.issuperset(map(type, value)) and least <= min(value) and max(value) <= most:
        return np.array(value, dtype)
    return None


def _may_be_rounded(array: Array, target: np.dtype[Any]) -> bool:
    """Whether numbers that numpy made an array of may have been integers that a float or 64 bits do not hold."""
    if array.dtype.kind != "f":
        return array.dtype.kind == "O"
    return bool((np.abs(array) >= _WHOLE.get(target, 2.0**53)).any())


# The numbers below which a float of this type holds every integer.
_WHOLE: Final = {d.numpy: 2.0 ** (np.finfo(d.numpy).nmant + 1) for d in DATATYPES if d.numpy.kind == "f"}
# Of Python's numbers the types and the bounds of those that this type holds.
_HELD: Final[Mapping[np.dtype[Any], tuple[frozenset[type], float, float]]] = {
    **{dtype: (frozenset({int, float}), -bound, bound) for dtype, bound in _WHOLE.items()},
    **{
        d.numpy: (frozenset({int}), int(np.iinfo(d.numpy).min), int(np.iinfo(d.numpy).max))
        for d in DATATYPES
        if d.numpy.kind in "iu"
    },
}


def _are_small(array: Array, target: np.dtype[Any]) -> bool:
    """Whether all are finite numbers that the float type `target` holds, rounded at most: seen at a glance, which most pass."""
    bound = _WHOLE.get(target)
    if bound is None or array.size == 0 or array.dtype.kind not in "iuf":
        return False
    return float(array.max()) < bound and float(array.min()) > -bound


def _unrounded(items: Array, array: Array, tensor: TensorMetadata) -> Array:
    """The Python numbers in `items`, integers to the digit; `array` if they are not all numbers, or no integers for integers."""
    flat = items.ravel().tolist()
    if not all(isinstance(v, int | float) for v in flat):
        return array
    if tensor.dtype.kind == "f":
        with np.errstate(over="ignore"):
            changed = [isinstance(v, int) and float(tensor.dtype.type(v)) != v for v in flat]
        if any(changed):
            raise _changed(items, np.argwhere(np.reshape(changed, items.shape))[0], tensor)
        return items.astype(np.float64)
    if tensor.dtype.kind in "iu" and all(isinstance(v, int) or v.is_integer() for v in flat):
        least, most = np.iinfo(tensor.dtype).min, np.iinfo(tensor.dtype).max
        outside = [not least <= v <= most for v in flat]
        if any(outside):
            raise _changed(items, np.argwhere(np.reshape(outside, items.shape))[0], tensor)
        return np.array([int(v) for v in flat], tensor.dtype).reshape(items.shape)
    return array


def unrepresentable(array: Array, target: np.dtype[Any]) -> NDArray[np.bool_] | None:
    """Which elements of a bool, integer or float array would change if cast to `target`; None if the dtypes rule it out."""
    source, wanted = array.dtype.kind, target.kind
    rounds = source in "iu" and wanted == "f" and array.dtype.itemsize == 8  # which numpy calls safe all the same
    if np.can_cast(array.dtype, target, "safe") and not rounds:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        if wanted == "b":
            return np.asarray((array != 0) & (array != 1))
        if source == "f" and wanted == "f":
            return np.asarray(np.isfinite(array) & ~np.isfinite(array.astype(target)))
        if wanted == "f":
            return ~_same_integer(array, array.astype(target))
        info = np.iinfo(target)
        if source == "f":
            array = array.astype(np.float64)  # the bounds of wide integers are infinite in half precision
            inside = (array >= float(info.min)) & (array < float(info.max) + 1.0)
            return np.asarray(~inside | (np.trunc(array) != array))
        return np.asarray((array < info.min) | (array > info.max))


def _same_integer(array: Array, back: Array) -> NDArray[np.bool_]:
    """Whether each integer survives the way through a float: compared as integers, so that no rounding hides a change."""
    info = np.iinfo(array.dtype)
    inside = np.isfinite(back) & (back >= float(info.min)) & (back < float(info.max))
    return np.asarray(inside & (np.where(inside, back, 0).astype(array.dtype) == array))


def _as_text(array: Array, name: str) -> Array:
    """A BYTES tensor for ONNX Runtime: text as numpy `U` (which it reads fastest) or objects that are all `str`.

    Bytes are decoded as UTF-8: ONNX Runtime itself would store the Python repr of a bytes object.
    """
    if array.dtype.kind == "U":
        return array
    if array.dtype.kind not in "SO":
        raise InvalidInput(f"input '{name}': expected BYTES, got {_kind(array)}", input=name)
    flat = array.ravel().tolist()
    if array.dtype.kind == "O" and set(map(type, flat)) <= {str}:
        return array
    text = np.empty(len(flat), dtype=object)
    for i, item in enumerate(flat):
        text[i] = _decode(item, name, i)
    return text.reshape(array.shape)


def _decode(item: object, name: str, at: int) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, bytes):
        try:
            return item.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"input '{name}': element {at} is not UTF-8 ({error.reason} at byte {error.start})", input=name
            ) from None
    raise InvalidInput(f"input '{name}': expected text, got {type(item).__name__} (element {at})", input=name)


def _kind(array: Array) -> str:
    words = {
        "U": "text",
        "S": "bytes",
        "O": "objects, ragged lists or integers beyond 64 bits",
        "M": "dates",
        "m": "durations",
        "c": "complex numbers",
    }
    return words.get(array.dtype.kind, str(array.dtype))


def rows_of(arrays: Mapping[str, Array]) -> int:
    """The number of rows of arrays that share it (0 for no arrays)."""
    for array in arrays.values():
        rows: int = array.shape[0]
        return rows
    return 0
