"""Flights as requests: Flights (examples/flights/online.py) -> build -> Payloads. Foreign code words them where there is some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson
import tritonclient.http as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from examples.flights.online import ANSWER, Flights
from loadtests.order import Protocol
from loadtests.payloads import SIZES, Payload, Payloads
from triform.features import Features
from triform.signature import Array

GRPC_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"


def build(flights: Flights, protocols: Sequence[Protocol], seed: int = 0) -> Payloads:
    """Payloads of every size in each protocol. `flights`: at least as many as the largest has rows, also without those that
    tensors in JSON cannot say."""
    manifest = flights.manifest
    answer = next(c for c in Features(manifest.signature, manifest.config).outputs if c.name == ANSWER)
    made = [payload for protocol in protocols for payload in _of(flights, protocol, np.random.default_rng(seed))]
    return Payloads(manifest.name, answer.tensor.name, answer.position or 0, ANSWER, made)


def _of(flights: Flights, protocol: Protocol, chance: np.random.Generator) -> Iterator[Payload]:
    which = np.arange(len(flights.batch))
    if protocol == "oip-json":  # JSON has no NaN, which a reading that is missing is in a tensor
        which = which[_complete(flights.tensors)]
    bound = flights.bound
    for rows, (_, different) in SIZES.items():
        for _ in range(different):
            some = chance.choice(which, rows, replace=False)
            path, headers, body = _worded(flights, protocol, some)
            expected = flights.batch[some].astype(np.float32)
            yield Payload(protocol, rows, path, headers, body, expected.tobytes(), bound[some].astype(np.float64).tobytes())


def _complete(tensors: Mapping[str, Array]) -> Array:
    floats = [tensor for tensor in tensors.values() if tensor.dtype.kind == "f"]
    complete: Array = np.all([np.isfinite(tensor).reshape(len(tensor), -1).all(axis=1) for tensor in floats], axis=0)
    return complete


def _worded(flights: Flights, protocol: Protocol, some: Array) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body."""
    name = flights.manifest.name
    if protocol == "tfs":
        body = orjson.dumps({"instances": [flights.records[i] for i in some]})
        return f"/v1/models/{name}/labels/stable:predict", {"content-type": "application/json"}, body
    if protocol == "oip-grpc":
        return GRPC_PATH, {}, _grpc(flights, some)
    binary, inputs = protocol == "oip-binary", []
    for tensor in flights.manifest.signature.inputs:
        rows = flights.tensors[tensor.name][some]
        inputs.append(triton.InferInput(tensor.name, list(rows.shape), tensor.datatype))
        inputs[-1].set_data_from_numpy(rows, binary_data=binary)
    outputs = [triton.InferRequestedOutput(t.name, binary_data=binary) for t in flights.manifest.signature.outputs]
    body, length = triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
    headers = {"content-type": "application/json"}
    if length is not None:
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(length)}
    return f"/v2/models/{name}/infer", headers, bytes(body)


def _grpc(flights: Flights, some: Array) -> bytes:
    request: Any = service_pb2.ModelInferRequest(model_name=flights.manifest.name)
    for tensor in flights.manifest.signature.inputs:
        rows = flights.tensors[tensor.name][some]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(rows.shape))
        raw = serialize_byte_tensor(rows).item() if tensor.datatype == "BYTES" else rows.tobytes()
        request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString(deterministic=True))  # as a signed request has it
