"""Every error Triform raises, in one tree; each class says what went wrong, for whom, and whether trying again can help.

    TriformError                    a fault of ours                                         internal
    ├── InvalidRequest              the caller sent something that cannot be right          invalid_request
    │   ├── InvalidInput            a tensor, record or column does not fit the signature   invalid_input
    │   │   └── MissingValue        a required value is absent or null                      missing_value
    │   ├── InvalidReference        not a model reference                                   invalid_reference
    │   ├── PayloadTooLarge         a body beyond its limit                                 payload_too_large
    │   ├── BodyTimeout             a body that did not come in time                        body_timeout
    │   ├── ReferenceNotAllowed     an input or output that callers may not name            reference_not_allowed
    │   ├── UnsupportedMediaType    a body in a format or encoding nobody here reads        unsupported_media_type
    │   └── NotAcceptable           no format that the caller accepts                       not_acceptable
    ├── Unauthenticated             no credentials, or wrong ones                           unauthenticated
    ├── Forbidden                   the caller is known, and may not do this                forbidden
    ├── NotFound                    nothing of that name                                    not_found
    │   ├── ModelNotFound           no such model in the repository                         model_not_found
    │   ├── VersionNotFound         no such version of the model                            version_not_found
    │   ├── AliasNotFound           no release names that alias                             alias_not_found
    │   ├── RouteNotFound           no such path                                            route_not_found
    │   ├── MethodNotAllowed        the path is there, not for this method                  method_not_allowed
    │   └── UnsupportedMethod       a verb of the protocol that no ONNX model has           unsupported_method
    ├── Conflict                    somebody else was first                                 conflict
    │   ├── VersionExists           a version never changes: publish another                version_exists
    │   ├── ReleaseConflict         the release log moved on meanwhile                      release_conflict
    │   ├── OutputExists            the output already holds another run                    output_exists
    │   └── LeaseHeld               another driver is at work on the output                 lease_held
    ├── DeadlineExceeded            the run was ended because its time was up               deadline_exceeded
    ├── RunFailed                   the model raised on these rows                          run_failed
    │   ├── RowsNotKept             the model gave back another number of rows              rows_not_kept
    │   ├── InfiniteOutput          an answer holds infinity, and JSON has none             infinite_output
    │   └── AnswerTooLarge          an answer beyond the host's limit                       answer_too_large
    ├── ResourceExhausted           memory ran out                                          resource_exhausted
    │   └── Overloaded              the queue is full: come again                           overloaded
    ├── Unavailable                 the process that runs the model is not there            unavailable
    │   └── NotReady                it is to come, or has not loaded this version           not_ready
    ├── PackageError                a model package that must not be served                 package_invalid
    │   ├── UnsupportedModel        this ONNX model cannot be packaged as it is             unsupported_model
    │   ├── UnsafePackage           links, unknown files, paths that lead outside           package_unsafe
    │   ├── DigestMismatch          a file is not the one that was packaged                 digest_mismatch
    │   ├── GoldenMismatch          the golden samples no longer give their answers         golden_mismatch
    │   └── ModelCrashed            the model took its process down, or its limits          model_crashed
    ├── ConfigurationError          the start is refused; the message names the key         configuration
    │   └── ProviderUnavailable     a required execution provider does not run the model    provider_unavailable
    ├── StoreError                  the repository's storage failed                         store_unavailable
    └── JobError                    a batch run cannot go on or cannot be committed         job_failed
        ├── InputUnreadable         an input file is missing, cut or not Parquet            input_unreadable
        ├── InputChanged            an input file changed after it was planned              input_changed
        ├── PartCrashed             a part killed every process that scored it              part_crashed
        ├── TooManyDeadLetters      more dead letters than the job allows                   too_many_dead_letters
        └── NotReconciled           rows in differ from rows out plus dead letters          not_reconciled

`http_status` and `grpc_status` are what a client of an online form sees; in a batch run an `InvalidInput` or `RunFailed` is
the `code` of a dead letter. Messages name the thing, what was expected and what came; they never carry a traceback or secret.
"""

from __future__ import annotations

from typing import ClassVar


class TriformError(Exception):
    """The root. `str(error)` is fit for the person who caused it; the cause (`__cause__`) is for the log."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


class InvalidRequest(TriformError):
    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidInput(InvalidRequest):
    """A value that does not fit. `input` is the tensor or column at fault; `row` its zero-based row where one is known."""

    code = "invalid_input"

    def __init__(self, message: str, *, input: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.input = input
        self.row = row


class MissingValue(InvalidInput):
    code = "missing_value"


class InvalidReference(InvalidRequest):
    code = "invalid_reference"


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class BodyTimeout(InvalidRequest):
    code = "body_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    retryable = True


class ReferenceNotAllowed(InvalidRequest):
    code = "reference_not_allowed"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    http_status = 415


class NotAcceptable(InvalidRequest):
    code = "not_acceptable"
    http_status = 406


class Unauthenticated(TriformError):
    """The message tells nobody whether a key exists: only who holds its secret learns that it has expired."""

    code = "unauthenticated"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class Forbidden(TriformError):
    code = "forbidden"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class NotFound(TriformError):
    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class ModelNotFound(NotFound):
    code = "model_not_found"


class VersionNotFound(NotFound):
    code = "version_not_found"


class AliasNotFound(NotFound):
    code = "alias_not_found"


class RouteNotFound(NotFound):
    code = "route_not_found"
    grpc_status = "UNIMPLEMENTED"


class MethodNotAllowed(NotFound):
    """`allowed`: the methods that the path has."""

    code = "method_not_allowed"
    http_status = 405
    grpc_status = "UNIMPLEMENTED"

    def __init__(self, message: str, *, allowed: str = "") -> None:
        super().__init__(message)
        self.allowed = allowed


class UnsupportedMethod(NotFound):
    code = "unsupported_method"
    grpc_status = "UNIMPLEMENTED"


class Conflict(TriformError):
    code = "conflict"
    http_status = 409
    grpc_status = "ABORTED"


class VersionExists(Conflict):
    code = "version_exists"
    grpc_status = "ALREADY_EXISTS"


class ReleaseConflict(Conflict):
    code = "release_conflict"
    retryable = True


class OutputExists(Conflict):
    code = "output_exists"
    grpc_status = "ALREADY_EXISTS"


class LeaseHeld(Conflict):
    code = "lease_held"
    retryable = True


class DeadlineExceeded(TriformError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    retryable = True


class RunFailed(TriformError):
    """ONNX Runtime raised while it ran these rows: most often a value out of range, so the rows are at fault (422)."""

    code = "run_failed"
    http_status = 422
    grpc_status = "INVALID_ARGUMENT"


class RowsNotKept(RunFailed):
    code = "rows_not_kept"
    http_status = 500
    grpc_status = "INTERNAL"


class InfiniteOutput(RunFailed):
    """The rows bring the model to infinity; in binary or Parquet the answer can be had."""

    code = "infinite_output"


class AnswerTooLarge(RunFailed):
    """Fewer rows at a time, fewer outputs, or an answer by reference."""

    code = "answer_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class ResourceExhausted(TriformError):
    code = "resource_exhausted"
    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"
    retryable = True


class Overloaded(ResourceExhausted):
    code = "overloaded"
    http_status = 429


class Unavailable(TriformError):
    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    retryable = True


class NotReady(Unavailable):
    code = "not_ready"


class PackageError(TriformError):
    code = "package_invalid"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class UnsupportedModel(PackageError):
    code = "unsupported_model"


class UnsafePackage(PackageError):
    code = "package_unsafe"


class DigestMismatch(PackageError):
    code = "digest_mismatch"


class GoldenMismatch(PackageError):
    code = "golden_mismatch"


class ModelCrashed(PackageError):
    code = "model_crashed"


class ConfigurationError(TriformError):
    code = "configuration"


class ProviderUnavailable(ConfigurationError):
    code = "provider_unavailable"


class StoreError(TriformError):
    code = "store_unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    retryable = True


class JobError(TriformError):
    code = "job_failed"


class InputUnreadable(JobError):
    code = "input_unreadable"


class InputChanged(JobError):
    code = "input_changed"
    retryable = True


class PartCrashed(JobError):
    code = "part_crashed"


class TooManyDeadLetters(JobError):
    code = "too_many_dead_letters"


class NotReconciled(JobError):
    code = "not_reconciled"


def by_code(code: str) -> type[TriformError]:
    """The class with that `code`; `TriformError` for a code this version does not know."""
    pending = [TriformError]
    for kind in pending:
        if kind.code == code:
            return kind
        pending.extend(kind.__subclasses__())
    return TriformError
