"""The Open Inference Protocol over gRPC: the surface of `triform.http` behind other messages.

    ModelInferRequest -> oip.InferRequest (+ bytes) -> service -> ModelInferResponse         any TriformError -> its grpc_status

Serve calls the methods of `OpenInference` by the names of the RPCs. Tensors in `raw_input_contents` are answered in
`raw_output_contents`, those in typed `contents` likewise, except that FP16 has no typed form.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from ray_apps.messages import MESSAGES, RPCS, SERVICE
from ray_apps.places import no_place
from triform.access import INFER, OPERATE, OVERRIDE
from triform.api_keys import SIGNED, Role
from triform.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    PayloadTooLarge,
    TriformError,
    Unauthenticated,
    UnsupportedMethod,
)
from triform.headers import Headers, named, values
from triform.http import HttpRequest, HttpSurface, request_id_of, told, version_of
from triform.models import Served
from triform.package import Manifest
from triform.protocols import oip, tensors
from triform.protocols.bodies import Call, Encoded, convert
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

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:
        async def metadata(_: HttpRequest) -> Any:
            from triform import __version__

            return MESSAGES["ServerMetadataResponse"](name="triform", version=__version__)

        return await self._told("ServerMetadata", request, grpc_context, metadata)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:
        async def ready(_: HttpRequest) -> Any:
            models = self.surface.service.models
            return MESSAGES["ModelReadyResponse"](ready=models.is_ready(request.name, version_of(request.version or None)))

        return await self._told("ModelReady", request, grpc_context, ready, model=request.name)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:
        async def metadata(_: HttpRequest) -> Any:
            models = self.surface.service.models
            served = models.get(request.name, version=version_of(request.version or None))
            return MESSAGES["ModelMetadataResponse"](**oip.model_metadata(served, models.versions(request.name)))

        return await self._told("ModelMetadata", request, grpc_context, metadata, model=request.name)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:
        return await self._told("ModelInfer", request, grpc_context, partial(self._infer, request), model=self._model(request))

    async def ModelStreamInfer(self, stream: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Answers in the order of the requests; an error is an answer, and the stream goes on, but for who may not ask.

        It ends where no request comes for as long as one may take: it holds a place among those that are under way.
        """
        messages = aiter(stream)
        try:
            await self._attend("ModelStreamInfer", None, grpc_context, _nothing)
            while (request := await self._next(messages, grpc_context)) is not None:
                yield await self._streamed(request, grpc_context)
        except (Unauthenticated, Forbidden) as error:
            self._refused(grpc_context, error)
        except Exception as error:  # noqa: BLE001 - it is told
            _fail(grpc_context, _known("ModelStreamInfer", error))

    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:
        async def index(http: HttpRequest) -> Any:
            models = self.surface.service.models
            index = MESSAGES["RepositoryIndexResponse"]()
            for name in sorted({*models.names(), *models.missing}):
                if http.caller is not None and not http.caller.may_see(name):
                    continue
                if (code := models.missing.get(name)) is not None:
                    if not request.ready:
                        index.models.add(name=name, state="UNAVAILABLE", reason=code)
                    continue
                for version, ready in models.states(name).items():
                    if ready or not request.ready:
                        index.models.add(name=name, version=str(version), state="READY" if ready else "UNAVAILABLE")
            return index

        return await self._told("RepositoryIndex", request, grpc_context, index)

    async def RepositoryModelLoad(self, request: Any, grpc_context: Any) -> Any:
        return await self._operate("RepositoryModelLoad", request, grpc_context)

    async def RepositoryModelUnload(self, request: Any, grpc_context: Any) -> Any:
        return await self._operate("RepositoryModelUnload", request, grpc_context)

    async def _operate(self, rpc: str, request: Any, context: Any) -> Any:
        async def refuse(_: HttpRequest) -> Any:
            raise UnsupportedMethod("models come and go by the release log: use `triform release`")

        return await self._told(rpc, request, context, refuse, model=request.model_name, role=OPERATE)

    async def _next(self, messages: AsyncIterator[Any], context: Any) -> Any:
        """The next of a stream; None at its end, or where none came in time."""
        try:
            async with asyncio.timeout(self.timeout):
                return await anext(messages, None)
        except TimeoutError:
            _fail(context, DeadlineExceeded(f"no request came for {self.timeout:g} s: the stream is closed"))
            return None

    async def _streamed(self, request: Any, context: Any) -> Any:
        answer = MESSAGES["ModelStreamInferResponse"]()
        try:
            infer = partial(self._infer, request)
            done = await self._attend("ModelStreamInfer", None, context, infer, model=self._model(request))
            answer.infer_response.ParseFromString(done.SerializeToString())
        except (Unauthenticated, Forbidden):
            raise
        except Exception as error:  # noqa: BLE001 - it is told
            answer.error_message = told(_known("ModelStreamInfer", error))
            answer.infer_response.id = request.id
        return answer

    async def _infer(self, request: Any, http: HttpRequest) -> Serialized:
        service, override = self.surface.service, values(http.headers, OVERRIDE)
        if len(override) + bool(request.model_version) > 1:
            raise InvalidRequest(f"the version that is to answer is named twice: by model_version or by {OVERRIDE}")
        deadline = time.monotonic() + self.timeout
        request_id, caller = request_id_of(http.headers, request.id), http.caller.id if http.caller else ""
        with service.exchange(request_id, deadline=deadline, caller=caller) as exchange:
            version = version_of(override[0] if override else request.model_version or None)
            model = request.model_name or None
            served = exchange.choose(model, version=version)
            size, limit = request.ByteSize(), self.surface.limits.request
            if size > limit:
                raise PayloadTooLarge(f"the message has more than the {limit} bytes that are allowed")
            if all(given.datatype != "BYTES" for given in request.inputs):  # numbers that are raw are not read one by one
                size -= sum(map(len, request.raw_input_contents))
            answer = self.surface.answer
            split = exchange.models.splits.live.get(served.manifest.name) if version is None else None
            if split is not None:
                encoded = await split.answer(answer, exchange, named(http.headers), partial(decode, request), size)
            else:
                encoded = await answer(exchange, partial(decode, request, served), size)
        return Serialized(encoded.body)

    def _model(self, request: Any) -> str | None:
        return request.model_name or self.surface.service.models.default_name()

    async def _attend(
        self, rpc: str, request: Any, context: Any, operation: Operation, *, model: str | None = None, role: Role = INFER
    ) -> Any:
        """What the operation returns, if the caller may have it. Raises `Unauthenticated`, `Forbidden`, and what it raises.

        Of a signed call the body is the message, serialized deterministically; a stream (`request` is None) takes a key.
        """
        headers = Headers((str(name), str(value)) for name, value in context.invocation_metadata())
        http, access = HttpRequest("POST", f"/{SERVICE}/{rpc}", headers, client=context.peer()), self.surface.access
        if access is None:
            return await operation(http)
        if any(value.startswith(SIGNED) for value in values(headers, "authorization")):
            if request is None:
                raise Unauthenticated("a stream cannot be signed: send an API key")
            http = http._replace(body=request.SerializeToString(deterministic=True))
        return await access.attend(await access.authenticate(http), rpc, role, model, operation)

    async def _told(
        self, rpc: str, request: Any, context: Any, operation: Operation, *, model: str | None = None, role: Role = INFER
    ) -> Any:
        """The operation's answer; of an error its status, and an answer that nobody sees."""
        try:
            return await self._attend(rpc, request, context, operation, model=model, role=role)
        except (Unauthenticated, Forbidden) as error:
            self._refused(context, error)
        except Exception as error:  # noqa: BLE001 - it is told
            _fail(context, _known(rpc, error))
        return MESSAGES[RPCS[rpc][1]]()

    def full(self, context: Any) -> None:
        """Refuses a call for which the replica has no place, nor one to wait for it."""
        request_id = self._refused(context, no_place())
        context.set_trailing_metadata([("request_id", request_id)])  # as Serve tells it

    def _refused(self, context: Any, error: TriformError) -> str:
        """Returns the id under which it is counted."""
        request_id = request_id_of([(str(name), str(value)) for name, value in context.invocation_metadata()], None)
        self.surface.service.refused(request_id, error, time.perf_counter())
        _fail(context, error)
        return request_id


Operation = Callable[[HttpRequest], Awaitable[Any]]


async def _nothing(_: HttpRequest) -> None:
    """Asks whether a caller may come in."""


def _known(rpc: str, error: Exception) -> TriformError:
    """What a caller is told of an error; the log is told of one of ours."""
    if not isinstance(error, TriformError):
        log.error("%s failed", rpc, exc_info=error)
        return TriformError("the server failed; its log knows why")
    if error.http_status >= 500:
        log.warning("%s: %s", rpc, error.code, exc_info=error)
    return error


def _fail(context: Any, error: TriformError) -> None:
    import grpc

    context.set_code(grpc.StatusCode[error.grpc_status])
    context.set_details(told(error)[:_MOST_TOLD])


def decode(request: Any, served: Served) -> Call:
    """The call in a ModelInferRequest. Raises `InvalidRequest` and its kinds."""
    raw = request.raw_input_contents
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
    outputs: Mapping[str, Array],
    *,
    manifest: Manifest,
    request_id: str | None,
    wanted: Sequence[oip.Wanted],
    raw: bool,
    version: str | None = None,
) -> Encoded:
    """The bytes of a ModelInferResponse."""
    version = version or str(manifest.version)
    answer = MESSAGES["ModelInferResponse"](model_name=manifest.name, model_version=version, id=request_id or "")
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
