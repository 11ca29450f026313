"""Settings, read once where the process starts and then passed along.

Order: explicit argument, then `TRIFORM_*` in the environment, then the package's model.toml, then the default here. A bad
value stops the start and names its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from triform.errors import ConfigurationError
from triform.repository import ModelRepository, open_repository
from triform.runtime import RuntimeOptions

PREFIX = "TRIFORM_"
POSITIVE = (
    "reference_bytes", "idempotency_seconds", "object_bytes", "ray_seconds", "nightly_seconds", "nightly_attempts",
)  # fmt: skip


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Each field `x` is `TRIFORM_X` in the environment; a list is separated by commas."""

    repository: str | None = None  # the model repository's location
    cache: str | None = None  # the folder for packages of a remote repository; None: as the XDG specification says
    cache_bytes: int | None = None  # how much it may hold; None: 20 GiB
    default_model: str | None = None  # the model of requests that name none
    provider: str = "cpu"  # cpu, cuda, tensorrt or auto
    required_providers: tuple[str, ...] = ()  # each node must run on one of these
    threads: int | None = None  # ONNX Runtime threads; None: the package's
    gpu_mem_limit: int | None = None  # bytes
    engine_cache: str | None = None  # the folder for TensorRT's engines
    models: tuple[str, ...] = ()  # what a function serves: references; none: all of the repository
    telemetry: Literal["emf", "none"] = "emf"  # of a function: logs and metrics through Powertools, or neither
    deadline_margin: float = 0.25  # seconds before a function's end at which a run is ended
    reference_prefixes: tuple[str, ...] = ()  # below these, inputs and outputs may be given by reference
    reference_bytes: int = 256 << 20  # the most that is read by reference
    results: str | None = None  # where handlers.sqs puts answers: s3://bucket/prefix, a queue's URL, or events:BUS
    idempotency_table: str | None = None  # of DynamoDB: the messages that handlers.sqs has answered
    idempotency_seconds: int = 14 * 86_400  # how long one is remembered there
    output: str | None = None  # where handlers.s3 writes its runs
    watched: tuple[str, ...] = ()  # the prefixes whose events handlers.s3 is sent
    key: tuple[str, ...] = ()  # columns whose values tell rows apart
    keep: tuple[str, ...] = ()  # columns to carry over
    max_dead_letters: float = 0.01  # the share of an object's rows that may be refused
    object_bytes: int = 128 << 20  # a larger object is handed to a batch run
    batch_command: str = "python -m batch run"  # what scores it, on Ray
    batch_repository: str | None = None  # where that finds the models; None: as here, if that is on S3
    undone: str | None = None  # a queue's URL: the objects that were not scored, each with the reason
    ray_address: str | None = None  # https://host:8265, where Ray's job API is
    ray_token_secret: str | None = None  # the secret of Secrets Manager that holds its token
    ray_ca: str | None = None  # a file with the certificates to trust; None: the system's
    ray_runtime_env: str | None = None  # of a job, as JSON
    ray_seconds: float = 10.0  # that one request to the job API may take
    nightly_entrypoint: str = "python -m batch run job.toml --partition {partition}"
    nightly_partition: str = "day=%Y-%m-%d"  # of the day before, by strftime
    nightly_seconds: float = 4 * 3600.0  # after the schedule's time; a night that is not done by then is late
    nightly_attempts: int = 3  # a job that failed is begun again
    allow_anonymous: bool = False  # whether callers without credentials may infer
    api_keys_file: str | None = None  # the file with the API keys' hashes; read again when it changes
    api_keys: str | None = None  # the same as JSON, where a file cannot be had
    nonces: str | None = None  # where those of signed requests are remembered: memory, or a Redis; None: none are taken
    operators: tuple[str, ...] = ()  # who of an authorizer's callers may operate: patterns such as iam:arn:aws:iam::*:role/ops
    hosts: tuple[str, ...] = ()  # the names that this host is called by
    origins: tuple[str, ...] = ()  # the origins whose pages may ask
    audit: str | None = None  # the file of the audit log; None: the process's own log
    target: str | None = None  # the version that handlers.pre_traffic tries: an ARN with a version

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **explicit: Any) -> Settings:
        """Settings from the environment, overridden by explicit arguments that are not None.

        Raises `ConfigurationError` for an unknown `TRIFORM_*` name, or a value that is not of its type.
        """
        kinds = {f.name: f.type for f in msgspec.structs.fields(cls)}
        values: dict[str, Any] = {}
        for key in sorted(k for k in environ if k.startswith(PREFIX)):
            name = key.removeprefix(PREFIX).lower()
            if name not in kinds:
                raise ConfigurationError(f"{key}: no such setting; there are {', '.join(PREFIX + k.upper() for k in kinds)}")
            text = environ[key]
            listed = kinds[name] == tuple[str, ...]
            values[name] = _parse(key, [t.strip() for t in text.split(",") if t.strip()] if listed else text, kinds[name])
        settings = cls(**values | {k: v for k, v in explicit.items() if v is not None})
        if not 0.0 <= settings.deadline_margin <= 900.0:
            raise ConfigurationError(f"TRIFORM_DEADLINE_MARGIN: expected seconds, 0 to 900, got {settings.deadline_margin}")
        if settings.reference_bytes < 1:
            raise ConfigurationError(f"TRIFORM_REFERENCE_BYTES: expected a positive number, got {settings.reference_bytes}")
        if settings.api_keys is not None and settings.api_keys_file is not None:
            raise ConfigurationError("TRIFORM_API_KEYS: TRIFORM_API_KEYS_FILE is set, too: give one of them")
        try:
            settings.runtime()
            settings.check()
        except ConfigurationError as error:
            name, _, told = str(error).partition(": ")
            raise ConfigurationError(f"{PREFIX + name.upper() if explicit.get(name) is None else name}: {told}") from error
        return settings

    def open_repository(self) -> ModelRepository:
        """The repository. Raises `ConfigurationError` where none is named."""
        if self.repository is None:
            raise ConfigurationError("no model repository: give --repository (--to when packaging), or set TRIFORM_REPOSITORY")
        return open_repository(self.repository, cache=Path(self.cache) if self.cache else None, cache_bytes=self.cache_bytes)

    def runtime(self) -> RuntimeOptions:
        return RuntimeOptions(
            provider=self.provider,
            required_providers=self.required_providers,
            threads=self.threads,
            gpu_mem_limit=self.gpu_mem_limit,
            engine_cache=self.engine_cache,
        )

    def check(self) -> None:
        """Raises `ConfigurationError` that begins with the name of a setting whose value makes no sense."""
        for name in POSITIVE:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name}: expected more than 0, got {value}")
        if not 0.0 <= self.max_dead_letters <= 1.0:
            raise ConfigurationError(f"max_dead_letters: expected a share from 0 to 1, got {self.max_dead_letters}")


def _parse(key: str, text: str | list[str], kind: Any) -> Any:
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{key}: {str(error).replace('`', chr(39)).lower()}, got {text!r}") from error
