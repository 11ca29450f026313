"""TensorFlow Serving's REST API, version 1: predict in row and column format, status, metadata.

    {"instances": [row, ...]} -> arrays -> {"predictions": [row, ...]}
    {"inputs": columns}       -> arrays -> {"outputs": columns}

Names and meanings: TensorFlow Serving, "RESTful API". A row is a tensor's value where the model has one input, or an object of
values by input; an object of columns (those that model.toml maps) is a record, and its answer has columns, too. The name is
left out where there is only one output. Bytes may come as {"b64": ...}.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from triform.errors import InvalidInput, InvalidRequest
from triform.models import Served
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
from triform.signature import Array, TensorMetadata

SIGNATURE = "serving_default"
_DTYPES = {"FP16": "DT_HALF", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING"}  # the others are DT_ and the name


class PredictRequest(msgspec.Struct):
    """Exactly one of `instances` (rows) and `inputs` (columns)."""

    signature_name: str = SIGNATURE
    instances: list[Any] | None = None
    inputs: Any = None


def decode(body: bytes, served: Served) -> Call:
    """The call in a request's body. Raises `InvalidRequest` and its kinds."""
    request = convert(read_json(body), PredictRequest)
    if request.signature_name not in ("", SIGNATURE):
        raise InvalidRequest(f"signature_name {request.signature_name[:80]!r}: an ONNX model has {SIGNATURE!r} only")
    if (request.instances is None) == (request.inputs is None):
        raise InvalidRequest("expected instances (rows) or inputs (columns), one of them")
    if request.instances is not None:
        return rows_call(request.instances, served, say_rows)
    return columns_call(request.inputs, served, lambda answer: Encoded(write_json({"outputs": columns_of(answer)})))


Say = Callable[[Mapping[str, Array]], Encoded]  # how an answer, arrays of shape [rows, ...] by name, is said


def say_rows(answer: Mapping[str, Array]) -> Encoded:
    return Encoded(write_json({"predictions": rows_of(answer)}))


def rows_call(instances: Sequence[Any], served: Served, say: Say) -> Call:
    """The call that rows make."""
    inputs = served.signature.inputs
    if not instances:
        return Call({t.name: t.no_rows() for t in inputs}, say)
    first = instances[0]
    if not isinstance(first, dict) or _is_bytes(first):
        if len(inputs) != 1:
            raise InvalidInput(f"row 0: the model has {len(inputs)} inputs: expected an object with {_names(inputs)}", row=0)
        return Call(_tensors({inputs[0].name: instances}, inputs), say)
    if by_columns(first, served):
        return records_call(instances, served, say)
    if [t.name for t in inputs] == served.features.columns:  # both at once: what a column says of nulls holds
        tensors = _from_records(instances, served)
        return Call(tensors, say, keys=_keys(instances, served.key) if served.key is not None else None)
    rows = [_of_row(row, record, inputs) for row, record in enumerate(instances)]
    return Call(_tensors({t.name: [row[t.name] for row in rows] for t in inputs}, inputs), say)


def records_call(records: Sequence[Any], served: Served, say: Say) -> Call:
    """The call that objects of named columns make; the answer has columns, too."""
    tensors = _from_records(records, served)
    keys = _keys(records, served.key) if served.key is not None else None
    return Call(tensors, say, served.features.to_columns, keys=keys)


def _from_records(records: Sequence[Any], served: Served) -> dict[str, Array]:
    columns = frozenset(served.features.columns)
    check_values(len(records) * len(columns))
    return served.features.from_records([_record(row, record, columns) for row, record in enumerate(records)])


def _keys(records: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """The records' own keys, null where one has none."""
    keys = [record.get(column) for record in records]
    return [_bytes_in(key) for key in keys] if dict in set(map(type, keys)) else keys


def columns_call(columns: Any, served: Served, say: Say) -> Call:
    """The call that columns make: a tensor, or an object of tensors (or of mapped columns) by name."""
    inputs = served.signature.inputs
    if not isinstance(columns, dict) or _is_bytes(columns):
        if len(inputs) != 1:
            raise InvalidInput(f"the model has {len(inputs)} inputs: expected an object with {_names(inputs)}")
        columns = {inputs[0].name: columns}
    if by_columns(columns, served):
        for name, values in columns.items():
            if not isinstance(values, list):
                raise InvalidInput(f"column {name[:80]!r}: expected a list of values", input=name[:80])
        named = {name: _bytes_in(values) for name, values in columns.items()}
        return table_call(named, served, say)
    return Call(_tensors(columns, inputs), say)


def table_call(columns: Mapping[str, Sequence[Any] | Array], served: Served, say: Say) -> Call:
    """The call that lists of values make, by the columns that model.toml maps; the answer has columns, too."""
    keys = columns.get(served.key) if served.key is not None else None
    return Call(from_columns(columns, served), say, served.features.to_columns, keys=keys)


def _names(inputs: Sequence[TensorMetadata]) -> str:
    return ", ".join(t.name for t in inputs)


def _of_row(row: int, record: Any, inputs: Sequence[TensorMetadata]) -> Mapping[str, Any]:
    if not isinstance(record, dict) or len(record) != len(inputs) or any(t.name not in record for t in inputs):
        raise InvalidInput(f"row {row}: expected an object with {_names(inputs)}", row=row)
    return record


def _record(row: int, record: Any, columns: Collection[str]) -> Mapping[str, Any]:
    """The record with the {"b64": ...} in its columns decoded; what is in no column may be anything."""
    if not isinstance(record, dict):
        raise InvalidInput(f"row {row}: expected an object of named columns, as row 0 is", row=row)
    if dict not in set(map(type, record.values())):
        return record
    try:
        return {name: _bytes_in(value) for name, value in record.items() if name in columns}
    except InvalidInput as error:
        raise InvalidInput(f"row {row}: {error}", row=row) from None


def _tensors(values: Mapping[str, Any], inputs: Sequence[TensorMetadata]) -> dict[str, Any]:
    """The values of BYTES tensors with their {"b64": ...} decoded; [] as no rows. `Signature.validate` does the rest."""
    tensors = {t.name: t for t in inputs}
    found = {}
    for name, value in values.items():
        tensor = tensors.get(name)
        if tensor is not None and value == []:
            found[name] = tensor.no_rows()
        else:
            found[name] = _bytes_in(value) if tensor is not None and tensor.datatype == "BYTES" else value
    return found


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"]


def _bytes_in(value: Any, depth: int = 0) -> Any:
    """The value with each {"b64": ...} in it decoded."""
    if isinstance(value, list):
        if depth == MAX_DIMS:
            raise InvalidInput(f"expected a tensor, got lists more than {MAX_DIMS} levels deep")
        return [_bytes_in(item, depth + 1) for item in value] if {dict, list} & set(map(type, value)) else value
    if not isinstance(value, dict):
        return value
    if not _is_bytes(value) or not isinstance(value["b64"], str):
        raise InvalidInput('expected a value or {"b64": text}, got another object')
    try:
        return b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("b64: this is not base64") from None


def rows_of(columns: Mapping[str, Array]) -> Any:
    """The rows of an answer: its values, or objects where it has several columns."""
    values = {name: plain(array, name) for name, array in columns.items()}
    if len(values) == 1:
        return next(iter(values.values()))
    return [dict(zip(values, row, strict=True)) for row in zip(*map(_listed, values.values()), strict=True)]


def _listed(values: Any) -> Any:
    """An array as a list of rows. Floats stay numpy's, which are written with the digits that their precision needs."""
    return values.tolist() if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind != "f" else list(values)


def columns_of(columns: Mapping[str, Array]) -> Any:
    """The only column itself, or all by name."""
    values = {name: plain(array, name) for name, array in columns.items()}
    return next(iter(values.values())) if len(values) == 1 else values


def status(ready: Mapping[int, bool]) -> dict[str, Any]:
    """Of a model's versions, the newest first. END is what a version comes to that failed to load."""
    good, bad = {"error_code": "OK", "error_message": ""}, {"error_code": "UNAVAILABLE", "error_message": "it failed to load"}
    return {
        "model_version_status": [
            {"version": str(v), "state": "AVAILABLE" if ready[v] else "END", "status": good if ready[v] else bad}
            for v in sorted(ready, reverse=True)
        ]
    }


def metadata(served: Served) -> dict[str, Any]:
    """The signature in the JSON form of TensorFlow's SignatureDefMap."""

    def tensors(metadata: Sequence[TensorMetadata]) -> dict[str, Any]:
        return {t.name: _tensor_info(t) for t in metadata}

    definition = {
        "inputs": tensors(served.signature.inputs),
        "outputs": tensors(served.signature.outputs),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": served.manifest.name, "signature_name": "", "version": str(served.manifest.version)},
        "metadata": {
            "signature_def": {
                "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
                "signature_def": {SIGNATURE: definition},
            }
        },
    }


def _tensor_info(tensor: TensorMetadata) -> dict[str, Any]:
    sizes = [{"size": str(d if isinstance(d, int) else -1), "name": ""} for d in tensor.shape]
    return {
        "dtype": _DTYPES.get(tensor.datatype, f"DT_{tensor.datatype}"),
        "tensor_shape": {"dim": sizes, "unknown_rank": False},
        "name": tensor.name,
    }
