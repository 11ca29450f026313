"""The surface as an OpenAPI 3.1 document: generated, so that it cannot tell of another surface than there is.

    routes.ROUTES + the structs that requests are read into + those below (answers) + errors.py -> document() -> GET /openapi.json

Nothing else imports this module: a process that only answers does not pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from triform import __version__, errors
from triform.access import OVERRIDE
from triform.errors import TriformError
from triform.headers import REQUEST_ID
from triform.http import BINARY, FORM, MODEL
from triform.package import NAME
from triform.protocols import invocations, oip, tfs
from triform.protocols.bodies import JSON
from triform.repository import VERSION
from triform.routes import ROUTES, Route

Open = Annotated[Any, msgspec.Meta(description="numbers, text, booleans and null, nested as the tensor is")]
Described = dict[str, Any]


class Error(msgspec.Struct):
    """What went wrong, for people, and its code, for programs."""

    error: str
    code: str


class ServerMetadata(msgspec.Struct):
    name: str
    version: str
    extensions: list[str]


class Tensor(msgspec.Struct):
    """An input or output; a dimension that varies is -1."""

    name: str
    datatype: oip.Datatype
    shape: list[Annotated[int, msgspec.Meta(ge=-1)]]


class ModelMetadata(msgspec.Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Live(msgspec.Struct):
    live: bool


class Ready(msgspec.Struct):
    ready: bool


class ModelReady(msgspec.Struct):
    name: str
    ready: bool


class ResponseOutput(msgspec.Struct, omit_defaults=True):
    """`data` is flat, row-major; where it is not there, `parameters.binary_data_size` bytes follow the JSON."""

    name: str
    shape: list[oip.Size]
    datatype: oip.Datatype
    parameters: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    data: list[str | float | int | bool | None] | msgspec.UnsetType = msgspec.UNSET


class InferResponse(msgspec.Struct):
    model_name: str
    model_version: str
    outputs: list[ResponseOutput]
    id: str | msgspec.UnsetType = msgspec.UNSET


class Predictions(msgspec.Struct):
    """Row by row; a row is an object where the answer has several columns."""

    predictions: Open


class Outputs(msgspec.Struct):
    """Column by column; the column itself where there is only one."""

    outputs: Open


class Condition(msgspec.Struct):
    error_code: str
    error_message: str


class VersionStatus(msgspec.Struct):
    version: str
    state: Literal["AVAILABLE", "END"]
    status: Condition


class ModelStatus(msgspec.Struct):
    model_version_status: list[VersionStatus]


class ModelSpec(msgspec.Struct):
    name: str
    signature_name: str
    version: str


class SignatureMetadata(msgspec.Struct):
    """`metadata.signature_def` is the JSON form of TensorFlow's SignatureDefMap."""

    model_spec: ModelSpec
    metadata: dict[str, Any]


class Nothing(msgspec.Struct):
    """An empty object."""


class Operation(NamedTuple):
    """What the routes of one operation have in common. `answers`: bodies by media type, a struct or None for text or bytes."""

    summary: str
    answers: Mapping[str, Sequence[type] | None]
    requests: Mapping[str, type | None] = {}
    errors: Sequence[type[TriformError]] = ()
    not_ready: bool = False  # whether 503 comes with the usual body, too


_NO_MODEL: Final = (errors.RouteNotFound, errors.ModelNotFound, errors.VersionNotFound, errors.AliasNotFound)
_LOADING: Final = (
    errors.PackageError, errors.UnsupportedModel, errors.UnsafePackage, errors.DigestMismatch, errors.GoldenMismatch,
    errors.ModelCrashed, errors.StoreError, errors.ResourceExhausted, errors.ConfigurationError, errors.ProviderUnavailable,
)  # fmt: skip
_INFERENCE: Final = (
    *_NO_MODEL, *_LOADING, errors.InvalidRequest, errors.InvalidInput, errors.MissingValue, errors.PayloadTooLarge,
    errors.AnswerTooLarge, errors.UnsupportedMediaType, errors.RunFailed, errors.InfiniteOutput, errors.RowsNotKept,
    errors.DeadlineExceeded,
)  # fmt: skip
_LINES: Final = {invocations.CSV: None, invocations.JSON_LINES: None}

OPERATIONS: Final[Mapping[str, Operation]] = {
    "v2_server": Operation("Server metadata", {JSON: [ServerMetadata]}),
    "v2_live": Operation("Whether the server runs", {JSON: [Live]}),
    "v2_ready": Operation("Whether every model can answer", {JSON: [Ready]}, not_ready=True),
    "v2_model": Operation("A model's signature and versions", {JSON: [ModelMetadata]}, errors=(*_NO_MODEL, *_LOADING)),
    "v2_model_ready": Operation("Whether a model can answer", {JSON: [ModelReady]}, errors=_NO_MODEL, not_ready=True),
    "v2_infer": Operation(
        "Infer: tensors, or columns that model.toml maps, in JSON or with binary tensor data",
        {JSON: [InferResponse], BINARY: None},
        {JSON: oip.InferRequest, BINARY: None, FORM: None},
        _INFERENCE,
    ),
    "v1_predict": Operation(
        "Predict: rows (instances) or columns (inputs)",
        {JSON: [Predictions, Outputs]},
        {JSON: tfs.PredictRequest, FORM: None},
        _INFERENCE,
    ),
    "v1_status": Operation("The state of a model's versions", {JSON: [ModelStatus]}, errors=_NO_MODEL),
    "v1_metadata": Operation("A model's signature", {JSON: [SignatureMetadata]}, errors=(*_NO_MODEL, *_LOADING)),
    "v1_classify": Operation("Not offered", {}, errors=(errors.RouteNotFound, errors.UnsupportedMethod)),
    "v1_regress": Operation("Not offered", {}, errors=(errors.RouteNotFound, errors.UnsupportedMethod)),
    "ping": Operation("Whether every model can answer", {JSON: [Nothing]}, not_ready=True),
    "invocations": Operation(
        "Predict by the default model: JSON, CSV or JSON Lines",
        {JSON: [Predictions], **_LINES},
        {JSON: invocations.Invocation, **_LINES},
        (*_INFERENCE, errors.NotAcceptable),
    ),
    "openapi": Operation("This document", {JSON: [Nothing]}),
}
_MEANINGS: Final = {
    200: "The answer", 400: "The request cannot be right", 401: "No credentials, or wrong ones",
    403: "Not for this caller", 404: "Nothing of that name", 405: "Not for this path",
    406: "No format that the caller accepts", 413: "Too large", 415: "A format or encoding that nobody here reads",
    422: "The model cannot answer these rows", 500: "A fault of the server", 503: "Not now", 504: "Time was up",
}  # fmt: skip
_PARAMETERS: Final[Mapping[str, Described]] = {
    "model": {"pattern": f"^{NAME.pattern}$"},
    "version": {"pattern": f"^{VERSION.pattern}$"},
    "alias": {"examples": ["stable", "canary"]},
}
_HEADER_LENGTH: Final[Described] = {
    "name": oip.HEADER_LENGTH,
    "in": "header",
    "description": "The bytes of JSON before the tensors' bytes; 0: the body is the only input's bytes",
    "schema": {"type": "integer", "minimum": 0},
}
_OVERRIDE: Final[Described] = {
    "name": OVERRIDE,
    "in": "header",
    "description": "The version that is to answer, where the path names none; needs the role `operate`",
    "schema": {"type": "string", "pattern": f"^{VERSION.pattern}$"},
}
_TELLING: Final = {401: "www-authenticate", 405: "allow"}  # headers by status


def document() -> Described:
    """The surface's OpenAPI document."""
    bodies = [some for operation in OPERATIONS.values() for some in (*operation.answers.values(), operation.requests.values())]
    structs = {struct for some in bodies for struct in some or () if struct is not None} | {Error}
    ordered = sorted(structs, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, Described] = {}
    for route in ROUTES:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, OPERATIONS[route.operation])
    answers = {name: _responses(operation) for name, operation in OPERATIONS.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Triform",
            "version": __version__,
            "description": "ONNX models by the Open Inference Protocol, TensorFlow Serving's REST API and /invocations.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "security": [{"key": []}, {}],
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key, unless the host says less"}
            },
            "schemas": {**schemas, **_one_of(schemas)},
            "responses": {f"{name}_{status}": told for name, some in answers.items() for status, told in some.items()},
        },
    }


@cache
def written() -> bytes:
    """`document()` as JSON."""
    return msgspec.json.encode(document())


def _one_of(schemas: Mapping[str, Any]) -> Described:
    """The bodies of which exactly one part must be there: what a struct's types do not say."""
    parts = {
        "PredictRequest": ("instances", "inputs"),
        "Invocation": ("instances", "inputs", "dataframe_split", "dataframe_records"),
    }
    return {
        name: {**schemas[name], "oneOf": [{"required": [part], "properties": {part: {"not": {"type": "null"}}}} for part in some]}
        for name, some in parts.items()
    }


def _operation(route: Route, operation: Operation) -> Described:
    which = "".join(f"_{word}" for word in ("version", "alias") if f"{{{word}}}" in route.template)
    described: Described = {"operationId": route.operation + which, "summary": operation.summary}
    tags = {"v1": "TensorFlow Serving", "v2": "Open Inference Protocol", "op": "Document"}
    described["tags"] = [tags.get(route.operation[:2], "SageMaker and MLflow")]
    described["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", **schema}}
        for name, schema in _PARAMETERS.items()
        if f"{{{name}}}" in route.template
    ]
    if BINARY in operation.requests:
        described["parameters"].append(_HEADER_LENGTH)
    if operation.requests:
        described["parameters"].append(_OVERRIDE)
        content = {kind: {"schema": _schema(kind, [s] if s else None)} for kind, s in operation.requests.items()}
        described["requestBody"] = {"required": True, "content": content}
    described["responses"] = {
        status: {"$ref": f"#/components/responses/{route.operation}_{status}"} for status in _responses(operation)
    }
    return described


def _responses(operation: Operation) -> dict[str, Described]:
    """By status: the answer, and every error with its codes."""
    asked = () if operation is OPERATIONS["v2_live"] else (errors.Unauthenticated, errors.Forbidden)
    kinds: Sequence[type[TriformError]] = (*operation.errors, *asked, errors.MethodNotAllowed, TriformError)
    codes: dict[int, set[str]] = {}
    for kind in kinds:
        codes.setdefault(kind.http_status, set()).add(kind.code)
    bodies = {status: [_error(some)] for status, some in codes.items()}
    if operation.not_ready:
        bodies.setdefault(503, []).append(_schema(JSON, operation.answers[JSON]))
    responses: dict[str, Described] = {}
    if operation.answers:
        content = {kind: {"schema": _schema(kind, some)} for kind, some in operation.answers.items()}
        responses["200"] = {"description": _MEANINGS[200], "headers": _headers(200, operation), "content": content}
    for status, schemas in sorted(bodies.items()):
        content = {JSON: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
        responses[str(status)] = {"description": _MEANINGS[status], "headers": _headers(status, operation), "content": content}
    return responses


def _error(codes: set[str]) -> Described:
    return {"allOf": [{"$ref": "#/components/schemas/Error"}, {"properties": {"code": {"enum": sorted(codes)}}}]}


def _headers(status: int, operation: Operation) -> Described:
    text = {"schema": {"type": "string"}}
    headers: Described = {REQUEST_ID: {"required": True, **text}}
    if status == 200 and operation.requests:
        headers[MODEL] = {
            "description": "The version that answered, as model/version; both, where each has rows of the request",
            "required": True,
            **text,
        }
        if BINARY in operation.answers:
            headers[oip.HEADER_LENGTH] = {"description": _HEADER_LENGTH["description"], "schema": _HEADER_LENGTH["schema"]}
    if status in _TELLING:
        headers[_TELLING[status]] = {"required": True, **text}
    return headers


def _schema(kind: str, some: Sequence[type] | None) -> Described:
    """Of a body: one of some structs; None for text, or for bytes, which OpenAPI describes by an empty schema."""
    if some is None:
        return {} if kind == BINARY else {"type": "string"} if kind != FORM else {"type": "object"}
    refs = [{"$ref": f"#/components/schemas/{struct.__name__}"} for struct in some]
    return refs[0] if len(refs) == 1 else {"oneOf": refs}
