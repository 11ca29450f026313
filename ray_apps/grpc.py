"""The Open Inference Protocol over gRPC: the surface of `triform.http` behind other messages.

    ModelInferRequest -> oip.InferRequest (+ bytes) -> service -> ModelInferResponse         any TriformError -> its grpc_status

Serve calls the methods of `OpenInference` by the names of the RPCs. Tensors in `raw_input_contents` are answered in
`raw_output_contents`, those in typed `contents` likewise, except that FP16 has no typed form.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from ray_apps.messages import MESSAGES
from triform.errors import InvalidRequest, PayloadTooLarge, TriformError, UnsupportedMethod
from triform.http import HttpSurface, request_id_of, told, version_of
from triform.package import Manifest
from triform.protocols import oip, tensors
from triform.protocols.bodies import Call, Encoded, convert
from triform.service import Served
from triform.signature import Array

log = logging.getLogger(__name__)

_MOST_TOLD: Final = 1000  # characters of a status: it travels in the trailers
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Serialized:
    """A message that is bytes already."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self) -> bytes:
        """As a message has it; that is all Serve asks of one."""
        return self._body


class OpenInference:
    """The RPCs. `surface` and `timeout` (seconds to a request's deadline) are the host's to set; each context is Serve's."""

    surface: HttpSurface
    timeout: float

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002 - all RPCs are called alike
        return MESSAGES["ServerLiveResponse"](live=True)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002
        return MESSAGES["ServerReadyResponse"](ready=self.surface.service.models.all_ready())

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002
        from triform import __version__

        return MESSAGES["ServerMetadataResponse"](name="triform", version=__version__)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:
        async def ready() -> Any:
            models = self.surface.service.models
            return MESSAGES["ModelReadyResponse"](ready=models.is_ready(request.name, version_of(request.version or None)))

        return await _told(ready, grpc_context, "ModelReadyResponse")

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:
        async def metadata() -> Any:
            models = self.surface.service.models
            served = models.get(request.name, version=version_of(request.version or None))
            return MESSAGES["ModelMetadataResponse"](**oip.model_metadata(served, models.versions(request.name)))

        return await _told(metadata, grpc_context, "ModelMetadataResponse")

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:
        return await _told(partial(self._infer, request, grpc_context), grpc_context, "ModelInferResponse")

    async def ModelStreamInfer(self, stream: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Answers in the order of the requests; an error is an answer, and the stream goes on."""
        async for request in stream:
            answer = MESSAGES["ModelStreamInferResponse"]()
            try:
                done = await self._infer(request, grpc_context)
                answer.infer_response.ParseFromString(done.SerializeToString())
            except TriformError as error:
                answer.error_message = told(error)
                answer.infer_response.id = request.id
            yield answer

    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002
        models = self.surface.service.models
        index = MESSAGES["RepositoryIndexResponse"]()
        for name in models.names():
            for version in models.versions(name):
                ready = models.is_ready(name, version)
                if ready or not request.ready:
                    index.models.add(name=name, version=str(version), state="READY" if ready else "UNAVAILABLE")
        return index

    async def RepositoryModelLoad(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002
        return await _told(_refuse, grpc_context, "RepositoryModelLoadResponse")

    async def RepositoryModelUnload(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002
        return await _told(_refuse, grpc_context, "RepositoryModelUnloadResponse")

    async def _infer(self, request: Any, context: Any) -> Serialized:
        service = self.surface.service
        headers = [(str(name), str(value)) for name, value in context.invocation_metadata()]
        deadline = time.monotonic() + self.timeout
        with service.exchange(request_id_of(headers, request.id), deadline=deadline) as exchange:
            served = exchange.choose(request.model_name or None, version=version_of(request.model_version or None))
            encoded = await self.surface.answer(exchange, partial(decode, request, served, limit=self.surface.limits.request))
        return Serialized(encoded.body)


async def _refuse() -> Any:
    raise UnsupportedMethod("models come and go by the release log: use `triform release`")


async def _told(operation: Callable[[], Awaitable[Any]], context: Any, response: str) -> Any:
    """The operation's answer; of an error its status, and an answer that nobody sees."""
    import grpc

    try:
        return await operation()
    except TriformError as error:
        if error.http_status >= 500:
            log.warning("%s: %s", response, error.code, exc_info=error)
        status, details = error.grpc_status, told(error)
    except Exception:
        log.exception("%s failed", response)
        status, details = TriformError.grpc_status, "the server failed; its log knows why"
    context.set_code(grpc.StatusCode[status])
    context.set_details(details[:_MOST_TOLD])
    return MESSAGES[response]()


def decode(request: Any, served: Served, *, limit: int) -> Call:
    """The call in a ModelInferRequest. Raises `InvalidRequest` and its kinds."""
    raw = request.raw_input_contents
    if request.ByteSize() > limit:
        raise PayloadTooLarge(f"the message has more than the {limit} bytes that are allowed")
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} tensors, inputs has {len(request.inputs)}")
    if raw and any(given.HasField("contents") for given in request.inputs):
        raise InvalidRequest("tensors are given both in raw_input_contents and in contents: send one of them")
    inputs = []
    for position, given in enumerate(request.inputs):
        tensor = {"name": given.name, "shape": list(given.shape), "datatype": given.datatype}
        parameters = _parameters(given.parameters)
        if raw:
            tensor["parameters"] = {**parameters, "binary_data_size": len(raw[position])}
        else:
            tensor |= {"parameters": parameters, "data": _typed(given)}
        inputs.append(tensor)
    outputs = [{"name": wanted.name, "parameters": _parameters(wanted.parameters)} for wanted in request.outputs]
    asked = {"inputs": inputs, "outputs": outputs, "parameters": _parameters(request.parameters), "id": request.id}
    tail = raw[0] if len(raw) == 1 else b"".join(raw)
    return oip.decode_request(convert(asked, oip.InferRequest), memoryview(tail), served, partial(encode, raw=bool(raw)))


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in given.items()}


def _typed(given: Any) -> list[Any]:
    """The elements of a tensor's `contents`, which must stand in the field of its datatype alone."""
    if given.datatype not in _CONTENTS:
        raise InvalidRequest(f"input {given.name[:80]!r}: {given.datatype[:40]!r} has no typed contents: use raw_input_contents")
    field = _CONTENTS[given.datatype]
    others = [other.name for other, _ in given.contents.ListFields() if other.name != field]
    if others:
        raise InvalidRequest(f"input {given.name[:80]!r}: {given.datatype} stands in {field}, not in {others[0]}")
    return list(getattr(given.contents, field))


def encode(
    outputs: Mapping[str, Array], *, manifest: Manifest, request_id: str | None, wanted: Sequence[oip.Wanted], raw: bool
) -> Encoded:
    """The bytes of a ModelInferResponse."""
    answer = MESSAGES["ModelInferResponse"](model_name=manifest.name, model_version=str(manifest.version), id=request_id or "")
    raw = raw or any(oip.datatype_of(outputs[w.name]) not in _CONTENTS for w in wanted)
    for name, _ in wanted:
        array = outputs[name]
        datatype = oip.datatype_of(array)
        entry = answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            answer.raw_output_contents.append(tensors.to_bytes(array))
        else:
            items = array.reshape(-1).tolist()
            if datatype == "BYTES":
                items = [item if isinstance(item, bytes) else str(item).encode() for item in items]
            getattr(entry.contents, _CONTENTS[datatype]).extend(items)
    return Encoded(answer.SerializeToString(), "application/grpc")
