"""The messages of `inference.GRPCInferenceService`, made from the protocol's numbers: no generated code, no compiler.

Source of names and numbers: the Open Inference Protocol's gRPC definition (`open_inference_grpc.proto`), and for the stream, the
repository and the parameters' wider choice that of Triton Inference Server, which extends it (`grpc_service.proto`).
"""

from __future__ import annotations

from operator import methodcaller
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ray_apps.places import refusing

SERVICE: Final = "inference.GRPCInferenceService"
_NAME: Final = "triform/inference.proto"
_NAMED: Final = "name:1:string version:2:string"
_TENSOR: Final = "name:1:string datatype:2:string shape:3:int64*"

# "field:number:type"; a star after the type: repeated; a percent sign: the values of a map with string keys.
_MESSAGES: Final = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:1:string version:2:string extensions:3:string*",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "ready:1:bool",
    "ModelMetadataRequest": _NAMED,
    "TensorMetadata": _TENSOR,
    "ModelMetadataResponse": "name:1:string versions:2:string* platform:3:string "
    "inputs:4:TensorMetadata* outputs:5:TensorMetadata*",
    "InferParameter": "bool_param:1:bool int64_param:2:int64 string_param:3:string double_param:4:double uint64_param:5:uint64",
    "InferTensorContents": "bool_contents:1:bool* int_contents:2:int32* int64_contents:3:int64* uint_contents:4:uint32* "
    "uint64_contents:5:uint64* fp32_contents:6:float* fp64_contents:7:double* bytes_contents:8:bytes*",
    "InferInputTensor": f"{_TENSOR} parameters:4:InferParameter% contents:5:InferTensorContents",
    "InferRequestedOutputTensor": "name:1:string parameters:2:InferParameter%",
    "InferOutputTensor": f"{_TENSOR} parameters:4:InferParameter% contents:5:InferTensorContents",
    "ModelInferRequest": "model_name:1:string model_version:2:string id:3:string parameters:4:InferParameter% "
    "inputs:5:InferInputTensor* outputs:6:InferRequestedOutputTensor* raw_input_contents:7:bytes*",
    "ModelInferResponse": "model_name:1:string model_version:2:string id:3:string parameters:4:InferParameter% "
    "outputs:5:InferOutputTensor* raw_output_contents:6:bytes*",
    "ModelStreamInferResponse": "error_message:1:string infer_response:2:ModelInferResponse",
    "RepositoryIndexRequest": "repository_name:1:string ready:2:bool",
    "ModelIndex": "name:1:string version:2:string state:3:string reason:4:string",
    "RepositoryIndexResponse": "models:1:ModelIndex*",
    "RepositoryModelLoadRequest": "repository_name:1:string model_name:2:string",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name:1:string model_name:2:string",
    "RepositoryModelUnloadResponse": "",
}
_ONE_OF: Final = {"InferParameter": "parameter_choice"}  # all fields of the message are one choice
RPCS: Final = {
    **{rpc: (f"{rpc}Request", f"{rpc}Response") for rpc in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady")},
    **{rpc: (f"{rpc}Request", f"{rpc}Response") for rpc in ("ModelMetadata", "ModelInfer", "RepositoryIndex")},
    **{rpc: (f"{rpc}Request", f"{rpc}Response") for rpc in ("RepositoryModelLoad", "RepositoryModelUnload")},
    "ModelStreamInfer": ("ModelInferRequest", "ModelStreamInferResponse"),
}
STREAMS: Final = frozenset({"ModelStreamInfer"})


def _described() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name=_NAME, package="inference", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if name in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[name])
        for field in fields.split():
            _add_field(message, *field.split(":"), chosen=name in _ONE_OF)
    return file


def _add_field(message: Any, name: str, number: str, kind: str, *, chosen: bool) -> None:
    field_type = descriptor_pb2.FieldDescriptorProto
    made = message.field.add(name=name, number=int(number), label=field_type.LABEL_OPTIONAL)
    if kind[-1] in "*%":
        made.label = field_type.LABEL_REPEATED
    if kind[-1] == "%":  # a map is a repeated entry of key and value (Protocol Buffers, "Maps", backwards compatibility)
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", "1", "string", chosen=False)
        _add_field(entry, "value", "2", kind[:-1], chosen=False)
        made.type, made.type_name = field_type.TYPE_MESSAGE, f".inference.{message.name}.{entry.name}"
        return
    kind = kind.rstrip("*")
    if kind in _MESSAGES:
        made.type, made.type_name = field_type.TYPE_MESSAGE, f".inference.{kind}"
    else:
        made.type = getattr(field_type, f"TYPE_{kind.upper()}")
    if chosen:
        made.oneof_index = 0


_POOL: Final = descriptor_pool.DescriptorPool()  # of its own: clients in this process may know the same names
_POOL.Add(_described())


def message(name: str) -> Any:
    """The class of a message. It pickles by its name here, for Ray's proxy in Python, which answers while no replica is up."""
    made = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))
    made.__module__ = __name__
    return made


MESSAGES: Final = {name: message(name) for name in _MESSAGES}


def __getattr__(name: str) -> Any:
    """Each message is an attribute of this module."""
    if name not in _MESSAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return MESSAGES[name]


def add_to_server(servicer: Any, server: Any) -> None:
    """What Serve's `grpc_servicer_functions` names: registers the RPCs, which Serve leads to the application's methods."""
    import grpc

    handlers = {}
    for rpc, (request, _) in RPCS.items():
        make = grpc.stream_stream_rpc_method_handler if rpc in STREAMS else grpc.unary_unary_rpc_method_handler
        handlers[rpc] = make(
            getattr(servicer, rpc),
            request_deserializer=MESSAGES[request].FromString,
            response_serializer=methodcaller("SerializeToString"),  # an answer may be bytes already: grpc.Serialized
        )
    with refusing(server):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if hasattr(server, "add_registered_method_handlers"):
            server.add_registered_method_handlers(SERVICE, handlers)
