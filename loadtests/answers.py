"""Whether an answer is right: body -> p_late of each row -> as far from the batch job's as the package allows, or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from loadtests.payloads import Payload, Payloads


def wrong(payloads: Payloads, payload: Payload, headers: Mapping[str, str], body: bytes) -> str | None:
    """What is wrong with the answer to the payload; None: nothing. `headers`: of the answer, names in small letters."""
    try:
        got = _answers(payloads, payload, headers, body)
    except Exception as error:  # noqa: BLE001 - whatever keeps an answer from being read makes it none
        return f"it cannot be read: {type(error).__name__}: {error}"
    return differs(got, np.frombuffer(payload.expected, np.float32), np.frombuffer(payload.bound, np.float64))


def differs(got: NDArray[Any], expected: NDArray[np.float32], bound: NDArray[np.float64]) -> str | None:
    """The first of the answers, FP32[rows], that is further from the expected one than its bound, in words. NaN is far from
    everything."""
    if got.shape != expected.shape:
        return f"{list(got.shape)} answers where {list(expected.shape)} are right"
    near = np.abs(np.subtract(got, expected, dtype=np.float64)) <= bound
    if near.all():
        return None
    row = int(np.argmin(near))
    return f"row {row} of {len(got)}: {got[row]} where the batch job has {expected[row]}, give or take {bound[row]:.1e}"


def _answers(payloads: Payloads, payload: Payload, headers: Mapping[str, str], body: bytes) -> NDArray[Any]:
    if payload.protocol == "tfs":
        predictions = orjson.loads(body)["predictions"]
        return np.array([row[payloads.column] for row in predictions], np.float32)
    result: Any
    if payload.protocol == "oip-grpc":
        result = tritonclient.grpc.InferResult(service_pb2.ModelInferResponse.FromString(body))
    else:
        length = headers.get("inference-header-content-length")
        result = tritonclient.http.InferResult.from_response_body(body, header_length=None if length is None else int(length))
    tensor: NDArray[Any] = result.as_numpy(payloads.tensor)
    return np.asarray(tensor.reshape(len(tensor), -1)[:, payloads.position], np.float32)
