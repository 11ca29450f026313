"""The Open Inference Protocol v2 over HTTP, with the binary tensor extension.

    JSON header (+ tensors' bytes, in the order of the inputs) -> arrays          arrays -> JSON header (+ bytes)

Names and meanings: "Open Inference Protocol", Inference Request and Response JSON Object; "Binary Tensor Data Extension"
(Triton Inference Server, protocol/extension_binary_data.md), see tensors.py. Inputs are named as the model's tensors, or as the
columns that its model.toml maps to them; then the answer's outputs are columns, too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np
import orjson

from triform.errors import InvalidInput, InvalidRequest
from triform.models import Served
from triform.package import Manifest
from triform.protocols.bodies import (
    MAX_DIMS,
    Call,
    Encoded,
    by_columns,
    check_values,
    convert,
    from_columns,
    plain,
    read_json,
    write_json,
)
from triform.protocols.tensors import WIRE, Bytes, from_bytes, to_bytes
from triform.signature import BY_OIP, DATATYPES, Array, Signature, TensorMetadata, cast, few_numbers

HEADER_LENGTH: Final = "inference-header-content-length"
EXTENSIONS: Final = ("binary_tensor_data",)
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Datatype = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(BY_OIP)})]
Parameters = dict[str, Any]
_DATA: Final = re.compile(rb'"data": ?\[(?=[ \t\r\n]*[-0-9])')
_ID: Final = b'"id"'
_FEW: Final = 8 << 10  # bytes of few numbers
_AROUND: Final = 1 << 10  # bytes around them, at most, that are remembered
_PLACE: Final = os.urandom(16).hex()  # of data: what no caller can know
_REFUSED: Final = {
    "shared_memory_region": "shared memory is not offered: send the tensor in the body",
    "shared_memory_offset": "shared memory is not offered: send the tensor in the body",
    "shared_memory_byte_size": "shared memory is not offered: send the tensor in the body",
    "classification": "the classification extension is not offered: ask for the output itself",
}
_NAMES: Final = {d.numpy: d.oip for d in DATATYPES if d.oip != "BYTES"}


class RequestInput(msgspec.Struct):
    """$request_input: one tensor. `data` is flat or nested, row-major; with `binary_data_size` it follows the header."""

    name: str
    shape: Annotated[list[Size], msgspec.Meta(max_length=MAX_DIMS)]
    datatype: Datatype
    parameters: Parameters | None = None
    data: Annotated[Any, msgspec.Meta(extra_json_schema={"type": ["array", "null"]})] = None


class RequestOutput(msgspec.Struct):
    """$request_output: an output that is wanted; `binary_data`: as bytes after the header."""

    name: str
    parameters: Parameters | None = None


class InferRequest(msgspec.Struct):
    """$inference_request. Without `outputs` all are wanted, in JSON unless `binary_data_output` says otherwise."""

    inputs: Annotated[list[RequestInput], msgspec.Meta(min_length=1)]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[RequestOutput] | None = None


class Wanted(NamedTuple):
    """An output that is wanted, and how."""

    name: str
    binary: bool


class Encode(Protocol):
    def __call__(
        self,
        outputs: Mapping[str, Array],
        *,
        manifest: Manifest,
        request_id: str | None,
        wanted: Sequence[Wanted],
        version: str | None = None,
    ) -> Encoded: ...  # `version`: that made the answer, where it is not the manifest's alone


def decode(body: bytes, header_length: int | None, served: Served) -> Call:
    """The call in a request's body. `header_length`: the size of the JSON before the tensors' bytes, None for JSON alone; 0 for
    the bytes of the model's only input without any JSON. Raises `InvalidRequest` and its kinds."""
    if header_length == 0 and body:
        return _raw(body, served)
    if header_length is not None and header_length > len(body):
        raise InvalidRequest(f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes")
    if header_length is None and (call := _at_a_glance(body, served)) is not None:
        return call
    header, tail = (body, b"") if header_length is None else (body[:header_length], memoryview(body)[header_length:])
    known = tail and len(header) <= _AROUND and _ID not in header
    return decode_request(_header(header) if known else convert(read_json(header), InferRequest), tail, served)


@lru_cache(maxsize=256)
def _header(header: bytes) -> InferRequest:
    """Of tensors in binary: callers say the same each time, where each request has as many rows. Not to be changed."""
    return convert(read_json(header), InferRequest)


def _at_a_glance(body: bytes, served: Served) -> Call | None:
    """The call of a request for one tensor of few numbers, of which all but the numbers has been read before, as callers say the
    same around them each time. None: it is to be read whole.

    `[1.5, 2]` is read by itself, and stands for what is in its place in what is around it. So the request is what it would be
    when read whole: numbers hold neither brackets nor keys, and one beyond 64 bits is none of `few_numbers`.
    """
    if (found := _DATA.search(body)) is None:
        return None
    start, end = found.end(), body.find(b"]", found.end())
    if end < start or end - start > _FEW or len(body) - (end - start) > _AROUND:
        return None
    before, after = body[:start], body[end:]
    if _ID in before or _ID in after:  # each request has its own
        return None
    try:
        request, numbers = _around(before, after), orjson.loads(body[start - 1 : end + 1])
    except (InvalidRequest, orjson.JSONDecodeError):
        return None
    if request is None:
        return None
    arrays = _as_expected(request.inputs, served.signature, numbers)
    return None if arrays is None else _call(request, served, _encode, arrays)


@lru_cache(maxsize=256)
def _around(before: bytes, after: bytes) -> InferRequest | None:
    """The request in whose only input's `data` numbers are to stand between these two; None where they would stand elsewhere."""
    request = convert(read_json(b'%b"%b"%b' % (before, _PLACE.encode(), after)), InferRequest)
    if request.parameters or len(request.inputs) > 1 or request.inputs[0].data != [_PLACE]:
        return None
    return request


def decode_request(request: InferRequest, tail: Bytes, served: Served, encode: Encode | None = None) -> Call:
    """The same of a request that is read already. `encode`: says the outputs, where it is not JSON with the binary extension."""
    encode = encode or _encode
    _check_parameters(request.parameters, "the request")
    arrays = _in_bytes(request.inputs, tail, served.signature) if tail else _as_expected(request.inputs, served.signature)
    if arrays is not None:
        return _call(request, served, encode, arrays)
    named = {given.name for given in request.inputs}
    if len(named) < len(request.inputs):
        raise InvalidInput("an input is given twice")
    if by_columns(named, served):
        return _by_columns(request, tail, served, encode)
    return _by_tensors(request, tail, served, encode)


def _as_expected(inputs: Sequence[RequestInput], signature: Signature, data: Any = None) -> dict[str, Array] | None:
    """The tensors of a request as most are: the model's own, each a short list of numbers. None: it takes a closer look.

    `data`: of the only input, in the place of its own.
    """
    arrays = {}
    if len(inputs) != len(signature.inputs):
        return None
    for given, tensor in zip(inputs, signature.inputs, strict=True):
        if given.name != tensor.name or given.datatype != tensor.datatype or given.parameters:
            return None
        array = few_numbers(given.data if data is None else data, tensor.dtype)
        if array is None or math.prod(given.shape) != array.size:
            return None
        arrays[given.name] = array.reshape(given.shape)
    return arrays


def _in_bytes(inputs: Sequence[RequestInput], tail: Bytes, signature: Signature) -> dict[str, Array] | None:
    """The same where their bytes follow the header, one tensor's after another's."""
    arrays, at = {}, 0
    if len(inputs) != len(signature.inputs):
        return None
    for given, tensor in zip(inputs, signature.inputs, strict=True):
        parameters = given.parameters
        if given.name != tensor.name or given.datatype != tensor.datatype or given.datatype == "BYTES" or given.data is not None:
            return None
        size = parameters.get("binary_data_size") if parameters is not None and len(parameters) == 1 else None
        if (
            type(size) is not int
            or not 0 < size <= len(tail) - at
            or size != math.prod(given.shape) * WIRE[given.datatype].itemsize
        ):
            return None
        arrays[given.name] = _from_bytes(tail[at : at + size], given).reshape(given.shape)
        at += size
    return arrays if at == len(tail) else None


def _call(request: InferRequest, served: Served, encode: Encode, arrays: dict[str, Array], keys: Array | None = None) -> Call:
    """Of tensors. `keys`: None: those of a tensor, if one is the key column."""
    if keys is None and served.key is not None:
        keys = arrays.get(served.key)
    wanted = _wanted(request, served.signature.output_names)
    say = partial(encode, manifest=served.manifest, request_id=request.id, wanted=wanted)
    return Call(arrays, say, says_version=True, keys=keys)


def _by_tensors(request: InferRequest, tail: Bytes, served: Served, encode: Encode) -> Call:
    metadata = served.features.tensors
    served.signature.check_names([given.name for given in request.inputs if given.name != served.key or given.name in metadata])
    for given in request.inputs:
        tensor = metadata.get(given.name)
        if tensor is not None and given.datatype != tensor.datatype:
            raise InvalidInput(f"input {given.name!r}: expected {tensor}, got {given.datatype[:40]!r}", input=given.name)
    arrays = {given.name: _shaped(given, data, metadata.get(given.name)) for given, data in _data(request.inputs, tail)}
    keys = None
    if served.key is not None and served.key in arrays:
        keys = arrays[served.key] if served.key in metadata else _beside(arrays, served.key)
    return _call(request, served, encode, arrays, keys)


def _beside(arrays: dict[str, Array], key: str) -> Array:
    """The key column, taken out of the model's own tensors; it has a value for each of their rows."""
    keys = arrays.pop(key)
    if any(keys.shape not in (array.shape[:1], (*array.shape[:1], 1)) for array in arrays.values()):
        raise InvalidInput(f"input {key!r}: expected a key for each row, in shape [rows] or [rows, 1]", input=key)
    return keys


def _by_columns(request: InferRequest, tail: Bytes, served: Served, encode: Encode) -> Call:
    """Each input is a column, of shape [rows] or [rows, 1]; a null means what the column says."""
    columns: dict[str, Sequence[Any] | Array] = {}
    for given, data in _data(request.inputs, tail):
        if given.shape[1:] not in ([], [1]) or not given.shape:
            raise InvalidInput(_name(given) + f"expected a column of shape [rows] or [rows, 1], got {_shown(given.shape)}")
        flat = data.reshape(-1) if isinstance(data, np.ndarray) else _flat(data)
        if given.name not in served.features.columns and given.name != served.key:
            known = ", ".join(served.features.columns)
            raise InvalidInput(_name(given) + f"no column is called so: expected {known[:300]}", input=given.name[:80])
        if isinstance(flat, list):
            cast([value for value in flat if value is not None], TensorMetadata(given.name, given.datatype, ()), booleans=False)
        if len(flat) != given.shape[0]:
            raise InvalidInput(_name(given) + f"shape {_shown(given.shape)}, but data has {len(flat)} elements")
        columns[given.name] = flat
    wanted = _wanted(request, tuple(c.name for c in served.features.outputs))
    say = partial(encode, manifest=served.manifest, request_id=request.id, wanted=wanted)
    keys = columns.get(served.key) if served.key is not None else None
    return Call(from_columns(columns, served), say, served.features.to_columns, says_version=True, keys=keys)


def _flat(data: list[Any]) -> list[Any]:
    """[[1], [2]] as [1, 2]."""
    if data and all(isinstance(item, list) and len(item) == 1 for item in data):
        return [item[0] for item in data]
    return data


def _name(given: RequestInput) -> str:
    return f"input {given.name[:80]!r}: "


def _shown(shape: Sequence[int]) -> str:
    return str(list(shape))[:200]


def _check_parameters(parameters: Parameters | None, where: str) -> None:
    for name in parameters or ():
        if name in _REFUSED:
            raise InvalidRequest(f"{where}: {name}: {_REFUSED[name]}")


def _data(inputs: Sequence[RequestInput], tail: Bytes) -> Iterator[tuple[RequestInput, list[Any] | Array]]:
    """Each input with its data as it came: nested lists, or from `tail`, what follows the header, an array of one dimension."""
    at = texts = 0
    for given in inputs:
        _check_parameters(given.parameters, f"input {given.name[:80]!r}")
        if given.datatype not in BY_OIP:
            known = ", ".join(BY_OIP)
            raise InvalidInput(_name(given) + f"no datatype is called {given.datatype[:40]!r}: expected {known}")
        size = (given.parameters or {}).get("binary_data_size")
        if (size is None) == (given.data is None):
            raise InvalidInput(
                _name(given) + ("expected data or binary_data_size" if size is None else "has both data and binary_data_size")
            )
        if given.data is not None:
            if not isinstance(given.data, list):
                raise InvalidInput(_name(given) + "data: expected an array")
            yield given, given.data
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InvalidInput(_name(given) + "binary_data_size: expected a number of bytes")
        if size > len(tail) - at:
            raise InvalidInput(_name(given) + f"binary_data_size is {size}, but {len(tail) - at} bytes are left in the body")
        if given.datatype == "BYTES":
            texts += min(math.prod(given.shape), size // 4)
            check_values(texts)
        yield given, _from_bytes(tail[at : at + size], given)
        at += size
    if at != len(tail):
        raise InvalidRequest(f"{len(tail) - at} byte(s) follow the last tensor: the binary_data_size do not add up to the body")


def _from_bytes(data: Bytes, given: RequestInput) -> Array:
    try:
        return from_bytes(data, given.datatype, given.shape)
    except InvalidInput as error:
        raise InvalidInput(_name(given) + str(error)) from None


def _shaped(given: RequestInput, data: list[Any] | Array, tensor: TensorMetadata | None) -> Array:
    """The data, flat or nested, in the shape that the request says. `tensor`: the model's, if it is one of its own."""
    if isinstance(data, np.ndarray):
        array = data
    else:
        array = cast(data, tensor or TensorMetadata(given.name, given.datatype, ()), booleans=False)
    if array.ndim != 1 and array.shape != tuple(given.shape):
        raise InvalidInput(_name(given) + f"shape is {_shown(given.shape)}, but data is nested as {_shown(array.shape)}")
    if array.size != (elements := math.prod(given.shape)):  # of Python's integers: it does not wrap
        raise InvalidInput(_name(given) + f"shape {_shown(given.shape)} means {elements} elements, the data has {array.size}")
    try:
        return array.reshape(given.shape)
    except ValueError:  # no elements, but sizes beyond what numpy counts
        raise InvalidInput(_name(given) + f"shape {_shown(given.shape)}: too large") from None


def _raw(body: bytes, served: Served) -> Call:
    """The bytes of the only input: as many rows as they make; of a BYTES tensor, one element. The answer is binary, too."""
    inputs = served.signature.inputs
    if len(inputs) != 1:
        raise InvalidRequest(
            f"a raw body ({HEADER_LENGTH}: 0) needs a model with one input, {served.manifest.ref} has {len(inputs)}"
        )
    (tensor,) = inputs
    if tensor.datatype == "BYTES":
        array = np.empty(1, dtype=object)
        array[0] = body
    else:
        if any(not isinstance(d, int) or d < 0 for d in tensor.row_shape):
            raise InvalidRequest(f"a raw body needs rows of one shape, the input is {tensor}")
        row = math.prod(d for d in tensor.row_shape if isinstance(d, int)) * WIRE[tensor.datatype].itemsize
        if row == 0 or len(body) % row:
            raise InvalidInput(f"input '{tensor.name}': {len(body)} bytes make no whole rows of {row} bytes", input=tensor.name)
        shape = [len(body) // row, *(d for d in tensor.row_shape if isinstance(d, int))]
        array = _from_bytes(body, RequestInput(tensor.name, shape, tensor.datatype)).reshape(shape)
    if tensor.datatype == "BYTES":
        if tensor.row_shape not in ((), (1,)):
            raise InvalidRequest(f"a raw body of BYTES is one element, the input is {tensor}")
        array = array.reshape((1, *(1 for _ in tensor.row_shape)))
    wanted = [Wanted(t.name, binary=True) for t in served.signature.outputs]
    say = partial(_encode, manifest=served.manifest, request_id=None, wanted=wanted)
    return Call({tensor.name: array}, say, says_version=True)


@lru_cache(maxsize=256)
def _all(known: tuple[str, ...], binary: bool) -> Sequence[Wanted]:
    return tuple(Wanted(name, binary) for name in known)


def _wanted(request: InferRequest, known: tuple[str, ...]) -> Sequence[Wanted]:
    binary = request.parameters is not None and _flag(request.parameters, "binary_data_output", "the request")
    if not request.outputs:
        return _all(known, binary)
    if len({asked.name for asked in request.outputs}) < len(request.outputs):
        raise InvalidRequest("an output is asked for twice")
    wanted = []
    for asked in request.outputs:
        where = f"output {asked.name[:80]!r}"
        if asked.name not in known:
            raise InvalidInput(f"no output is called {asked.name[:80]!r}: expected {', '.join(known)}")
        _check_parameters(asked.parameters, where)
        wanted.append(Wanted(asked.name, _flag(asked.parameters, "binary_data", where, binary)))
    return wanted


def _flag(parameters: Parameters | None, name: str, where: str, otherwise: bool = False) -> bool:
    value = (parameters or {}).get(name, otherwise)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where}: {name}: expected true or false")
    return value


def _encode(
    outputs: Mapping[str, Array],
    *,
    manifest: Manifest,
    request_id: str | None,
    wanted: Sequence[Wanted],
    version: str | None = None,
) -> Encoded:
    entries, tail = [], []
    for name, binary in wanted:
        array = outputs[name]
        entry: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": datatype_of(array)}
        if binary:
            tail.append(to_bytes(array))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = plain(array.reshape(-1), name)
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": version or str(manifest.version), "outputs": entries}
    if request_id is not None:
        answer["id"] = request_id
    header = write_json(answer)
    if not tail:
        return Encoded(header)
    return Encoded(b"".join([header, *tail]), "application/octet-stream", {HEADER_LENGTH: str(len(header))})


def datatype_of(array: Array) -> str:
    """What the protocol calls the array's dtype."""
    return "BYTES" if array.dtype.kind in "OUS" else _NAMES[array.dtype]


def server_metadata(version: str) -> dict[str, Any]:
    """$metadata_server_response."""
    return {"name": "triform", "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(served: Served, versions: Sequence[int]) -> dict[str, Any]:
    """$metadata_model_response; a dimension that varies is -1."""

    def tensors(metadata: Sequence[TensorMetadata]) -> list[dict[str, Any]]:
        shapes = [[d if isinstance(d, int) else -1 for d in t.shape] for t in metadata]
        return [{"name": t.name, "datatype": t.datatype, "shape": shape} for t, shape in zip(metadata, shapes, strict=True)]

    return {
        "name": served.manifest.name,
        "versions": [str(version) for version in versions],
        "platform": "onnx_onnxv1",
        "inputs": tensors(served.signature.inputs),
        "outputs": tensors(served.signature.outputs),
    }
