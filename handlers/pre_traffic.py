"""The hook that CodeDeploy calls before it lets a new version have traffic: the version answers its golden samples, or gets none.

    repository -> golden samples -> direct invocations of TRIFORM_TARGET, the new version -> compare (triform/golden.py)
                                                                         -> Succeeded or Failed, whatever happens here

The samples and tolerances are those of the packages in this function's own models layer, which is the new version's, too. They
are sent as columns of tensors, so that what comes back are the tensors that were recorded. Rows that JSON cannot carry, for NaN
or infinity in them, are left out.

IAM: lambda:InvokeFunction on the function's versions, codedeploy:PutLifecycleEventHookExecutionStatus on the deployment group.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import boto3
import msgspec
import numpy as np
from botocore.config import Config

from handlers._boot import Pin, open_pins
from handlers._telemetry import Context, LambdaTelemetry, open_telemetry
from triform import golden
from triform.errors import (
    AnswerTooLarge,
    ConfigurationError,
    DigestMismatch,
    GoldenMismatch,
    InvalidRequest,
    PackageError,
    TriformError,
)
from triform.golden import Golden
from triform.package import Manifest, ModelPackage
from triform.protocols.bodies import plain, write_json
from triform.repository import ModelRepository
from triform.settings import Settings
from triform.signature import Array, cast, rows_of

log = logging.getLogger("triform.handlers")
PAYLOAD_BYTES: Final = 5 << 20  # Lambda allows 6 MB
_QUALIFIED: Final = re.compile(r"(?:arn:[\w-]+:lambda:[\w-]+:\d{12}:function:)?[\w-]{1,140}:(?:\d+|(?!\$LATEST)[A-Za-z0-9_-]+)")
_PATIENT: Final = Config(connect_timeout=5, read_timeout=150, retries={"total_max_attempts": 4, "mode": "standard"})
Status = Literal["Succeeded", "Failed"]


class Hook(msgspec.Struct, frozen=True, rename="pascal"):
    """The event of a lifecycle hook."""

    deployment_id: str
    lifecycle_event_hook_execution_id: str


class Function:
    """One environment's function."""

    def __init__(self, settings: Settings, telemetry: LambdaTelemetry, repository: ModelRepository, pins: list[Pin]) -> None:
        if settings.target is None or not _QUALIFIED.fullmatch(settings.target):
            raise ConfigurationError("TRIFORM_TARGET: expected the ARN (or name) of a function with its version")
        self.target = settings.target
        self.telemetry = telemetry
        self.repository = repository
        self.pins = pins
        self._lambda = boto3.client("lambda", config=_PATIENT)
        self._codedeploy = boto3.client("codedeploy", config=_PATIENT)

    def __call__(self, event: Any, context: Context) -> dict[str, str]:
        """What was reported. Raises only where CodeDeploy cannot be told; it then waits in vain, and rolls back."""
        with self.telemetry.invocation(context):
            try:
                hook = msgspec.convert(event, Hook)
            except ValueError as error:  # msgspec's, or half a surrogate pair in a key
                raise InvalidRequest(f"this is no event of a CodeDeploy hook: {error}") from None
            status: Status = "Failed"
            try:
                self._try_all()
                status = "Succeeded"
            except TriformError as error:
                log.error("the new version fails: %s: %s", error.code, error)  # noqa: TRY400 - its message is all there is to know
            except Exception:
                log.exception("the new version could not be tried")
            self._codedeploy.put_lifecycle_event_hook_execution_status(
                deploymentId=hook.deployment_id,
                lifecycleEventHookExecutionId=hook.lifecycle_event_hook_execution_id,
                status=status,
            )
            return {"status": status}

    def _try_all(self) -> None:
        """Raises `GoldenMismatch` where a model does not answer, or not as it did when it was packaged."""
        for pin in self.pins:
            package = self.repository.package(pin.model, pin.version)
            manifest = package.manifest
            if pin.digest is not None and manifest.digest != pin.digest:
                raise DigestMismatch(f"{manifest.ref} is not the package that was pinned")
            try:
                self._try(manifest, sayable(package))
            except GoldenMismatch as error:
                raise GoldenMismatch(f"{manifest.ref}: {error}") from error

    def _try(self, manifest: Manifest, samples: Golden) -> None:
        """Halves the samples where they, or their answer, are too much for one invocation."""
        rows, payload = rows_of(samples.inputs), payload_of(manifest, samples)
        answered = self._invoke(payload) if len(payload) <= PAYLOAD_BYTES else {"code": AnswerTooLarge.code}
        if answered.get("code") == AnswerTooLarge.code and rows > 1:
            self._try(manifest, _part(samples, slice(rows // 2)))
            self._try(manifest, _part(samples, slice(rows // 2, None)))
            return
        if answered.get("model") != manifest.ref:
            told = str(answered.get("error") or answered.get("code") or answered.get("model"))
            raise GoldenMismatch(f"the version does not answer with it: {told[:300]}")
        tolerances = manifest.tolerances.get("CPUExecutionProvider", {})
        golden.compare(samples.outputs, arrays_of(manifest, answered.get("outputs"), samples.outputs), tolerances)

    def _invoke(self, payload: bytes) -> dict[str, Any]:
        answer = self._lambda.invoke(FunctionName=self.target, InvocationType="RequestResponse", Payload=payload)
        content = answer["Payload"].read()
        if answer.get("FunctionError"):
            raise GoldenMismatch("the function failed; its own log knows why")
        try:
            return msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise GoldenMismatch("the function answered with what is no JSON object") from error


def sayable(package: ModelPackage) -> Golden:
    """The golden rows that JSON can carry there and back. Raises `PackageError` if there is none."""
    samples = package.golden()
    rows = rows_of(samples.inputs)
    said = np.ones(rows, dtype=np.bool_)
    for array in samples.inputs.values():
        said &= _all(np.isfinite(array)) if array.dtype.kind == "f" else True
    for array in samples.outputs.values():
        said &= _all(~np.isinf(array)) if array.dtype.kind == "f" else True
    if not said.any():
        raise PackageError(f"{package.manifest.ref}: no golden sample is free of NaN and infinity, so JSON can carry none")
    return _part(samples, said)


def _all(values: Array) -> Array:
    """Whether all values of a row hold."""
    return np.asarray(values.reshape(len(values), -1).all(axis=1))


def _part(samples: Golden, rows: slice | Array) -> Golden:
    return Golden({n: a[rows] for n, a in samples.inputs.items()}, {n: a[rows] for n, a in samples.outputs.items()})


def payload_of(manifest: Manifest, samples: Golden) -> bytes:
    """The direct invocation that asks for the samples' answers."""
    inputs = {name: plain(array, name) for name, array in samples.inputs.items()}
    return write_json({"model": manifest.name, "version": manifest.version, "inputs": inputs})


def arrays_of(manifest: Manifest, outputs: Any, recorded: Mapping[str, Array]) -> dict[str, Array]:
    """The answer as arrays like the recorded ones. Raises `GoldenMismatch`."""
    tensors = {tensor.name: tensor for tensor in manifest.signature.outputs}
    named = {next(iter(recorded)): outputs} if len(recorded) == 1 else outputs
    if not isinstance(named, dict) or named.keys() != recorded.keys():
        raise GoldenMismatch("the answer does not have the outputs that were recorded")
    arrays = {}
    for name, values in named.items():
        try:
            arrays[name] = cast(_numbers(values) if recorded[name].dtype.kind == "f" else values, tensors[name])
        except (TriformError, ValueError, TypeError) as error:
            raise GoldenMismatch(f"output '{name}' came as what is no {tensors[name]}") from error
    return arrays


def _numbers(values: Any) -> Any:
    """NaN travels as null."""
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return float("nan") if values is None else values


def start(environ: Mapping[str, str]) -> Function:
    """The function of an environment. Raises `ConfigurationError`, `PackageError`, `StoreError`."""
    settings = Settings.from_env(environ)
    telemetry = open_telemetry(settings.telemetry, environ)
    repository, pins = open_pins(settings)
    return Function(settings, telemetry, repository, pins)


function: Final = start(os.environ)


def handler(event: Any, context: Context) -> dict[str, str]:
    """Lambda's entry point: `handlers.pre_traffic.handler`."""
    return function(event, context)
