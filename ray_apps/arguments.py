"""The arguments of `build_app`: `args` of an application in Serve's configuration, or those of `python -m ray_apps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from triform.access import check_closed
from triform.batching import BatchOptions
from triform.errors import ConfigurationError
from triform.http import Limits
from triform.nonces import MEMORY
from triform.settings import Settings

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one is None, `TRIFORM_*` in the environment says, else the default of `Settings`. Sizes in bytes."""

    repository: str | None = None
    models: tuple[str, ...] = ()  # references; none: the stable version of each model in the repository
    default_model: str | None = None  # of requests that name none
    provider: Literal["cpu", "cuda", "tensorrt", "auto"] | None = None
    threads: Count | None = None  # ONNX Runtime threads of a run; None: the package's
    gpu_mem_limit: Bytes | None = None
    allow_anonymous: bool | None = None  # without it callers need credentials
    api_keys_file: str | None = None  # on each node
    nonces: str | None = None  # of signed requests: memory, or a Redis that all replicas ask
    hosts: tuple[str, ...] | None = None  # the names that browsers may call this by
    origins: tuple[str, ...] | None = None  # the pages that may
    audit: str | None = None  # a file on each node
    overrides: dict[str, BatchOptions] = {}  # by model: slots, max_rows, max_queue_rows
    request_bytes: Bytes = Limits().request
    unpacked_bytes: Bytes = Limits().unpacked
    response_bytes: Bytes = Limits().response
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0  # from a request's arrival to its deadline
    log_requests: Literal["none", "errors", "all"] = "errors"
    num_replicas: Count = 1
    num_cpus: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # of a replica
    num_gpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_ongoing_requests: Count = 1024  # of a replica; beyond it and the next
    max_queued_requests: Annotated[int, msgspec.Meta(ge=0)] = 1024  # Serve itself answers 429
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0  # that a replica which must go has for what is in flight

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Arguments:
        """Raises `ConfigurationError`, which names the key."""
        try:
            return msgspec.convert(dict(args), cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"args: {str(error).replace('`', chr(39))}") from error

    def settings(self, environ: Mapping[str, str]) -> Settings:
        """With the environment where nothing was said. Raises `ConfigurationError`."""
        named = (
            "repository", "default_model", "provider", "threads", "gpu_mem_limit",
            "allow_anonymous", "api_keys_file", "nonces", "hosts", "origins", "audit",
        )  # fmt: skip
        settings = Settings.from_env(environ, **{name: getattr(self, name) for name in named})
        if settings.repository is None:
            raise ConfigurationError("args: 'repository' is missing, and TRIFORM_REPOSITORY is not set")
        check_closed(settings)
        if settings.nonces == MEMORY and self.num_replicas > 1:
            raise ConfigurationError(
                "args: 'nonces' in memory are for one replica: several share a Redis, redis://host:port/number"
            )
        return settings

    def limits(self) -> Limits:
        return Limits(request=self.request_bytes, unpacked=self.unpacked_bytes, response=self.response_bytes)
