"""The arguments of `build_app`: `args` of an application in Serve's configuration, or those of `python -m ray_apps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from ray_apps.asgi import MOST_RECEIVED, Room
from triform.access import check_closed
from triform.batched import BatchOptions
from triform.errors import ConfigurationError
from triform.http import Limits
from triform.nonces import MEMORY
from triform.runtime import RuntimeOptions
from triform.settings import PREFIX, Settings

Provider = Literal["cpu", "cuda", "tensorrt", "auto"]
ProviderOptions = dict[Literal["cuda", "tensorrt"], dict[str, str]]  # in ONNX Runtime's words
Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Duration = Annotated[float, msgspec.Meta(ge=0, le=86_400)]  # in seconds


RUNTIME: Final = ("provider", "required_providers", "threads", "gpu_mem_limit", "provider_options")


class ModelOptions(BatchOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model: its queue and runs, and what it needs other than the rest. None: as for all models."""

    provider: Provider | None = None
    required_providers: tuple[str, ...] | None = None
    threads: Count | None = None
    gpu_mem_limit: Bytes | None = None
    provider_options: ProviderOptions | None = None


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between two numbers of replicas; see autoscaling.py. Times in seconds."""

    max_replicas: Count
    min_replicas: Annotated[int, msgspec.Meta(ge=0)] = 1  # 0: none while nobody asks
    target_ongoing_requests: Annotated[float, msgspec.Meta(gt=0)] = 32.0  # of a replica
    target_queue_s: Seconds = 0.1  # that requests may wait for their model
    upscale_delay_s: Duration = 1.0  # that more must be wanted before there are more
    downscale_delay_s: Duration = 300.0  # and fewer, before there is one less
    to_zero_delay_s: Duration = 900.0  # and none, before there is none


class Isolated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Replicas of their own for canaries."""

    timeout_s: Seconds = 5.0  # of a run, with the way there and back; half of what a request has left is the most
    num_replicas: Count | None = None  # None: one, or as many as autoscaling wants
    autoscaling: Autoscaling | None = None
    # None: as of the replicas that answer callers
    num_cpus: Annotated[float, msgspec.Meta(ge=0)] | None = None
    num_gpus: Annotated[float, msgspec.Meta(ge=0)] | None = None
    accelerator_type: str | None = None
    resources: dict[str, Annotated[float, msgspec.Meta(gt=0)]] | None = None
    provider: Provider | None = None
    required_providers: tuple[str, ...] | None = None
    threads: Count | None = None
    gpu_mem_limit: Bytes | None = None
    max_ongoing_requests: Count | None = None
    max_queued_requests: Count | None = None


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one is None, `TRIFORM_*` in the environment says, else the default of `Settings`. Sizes in bytes."""

    repository: str | None = None
    models: tuple[str, ...] = ()  # references; none: the stable version of each model in the repository
    default_model: str | None = None  # of requests that name none
    provider: Provider | None = None  # None, with a share of a GPU: cuda
    required_providers: tuple[str, ...] | None = None  # each node must run on one of these
    threads: Count | None = None  # ONNX Runtime threads of a run; None: the package's
    gpu_mem_limit: Bytes | None = None  # of each loaded version of a model
    engine_cache: str | None = None  # the folder for TensorRT's engines
    provider_options: ProviderOptions = {}
    overrides: dict[str, ModelOptions] = {}  # by model
    allow_anonymous: bool | None = None  # without it callers need credentials
    api_keys_file: str | None = None  # on each node
    nonces: str | None = None  # of signed requests: memory, or a Redis that all replicas ask
    hosts: tuple[str, ...] | None = None  # the names that browsers may call this by
    origins: tuple[str, ...] | None = None  # the pages that may
    audit: str | None = None  # a file on each node
    request_bytes: Bytes = Limits().request
    received_bytes: Bytes | None = None  # of the bodies in parts that a replica has; None: 1 GiB, or one if that is more
    unpacked_bytes: Bytes = Limits().unpacked
    response_bytes: Bytes = Limits().response
    poll_s: Annotated[float, msgspec.Meta(ge=0.05, le=3600)] = 5.0  # that a node waits between two looks at a release log
    rollout_window_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 10.0  # that replicas count a canary before they report
    timeout_s: Seconds = 60.0  # from a request's arrival to its deadline
    log_requests: Literal["none", "errors", "all"] = "errors"
    num_replicas: Count | None = None  # None: one, or as many as autoscaling wants
    autoscaling: Autoscaling | None = None
    canary: Isolated | None = None  # None: canaries run in the replicas that answer callers
    num_cpus: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # of a replica
    num_gpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # a share of one, or whole ones
    accelerator_type: str | None = None  # the kind of GPU, in Ray's words
    resources: dict[str, Annotated[float, msgspec.Meta(gt=0)]] = {}  # of a node's own, such as a MIG slice
    max_ongoing_requests: Count = 1024  # of a replica
    max_queued_requests: Count = 1024  # that wait to be one of those; beyond them the answer is 429
    health_period_s: Seconds = 2.0  # between two looks of Serve at a replica
    health_timeout_s: Seconds = 10.0  # that all its sessions together have to answer a golden row each
    drain_s: Duration = 60.0  # that a replica which must go has for what is in flight

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Arguments:
        """Raises `ConfigurationError`, which names the key."""
        try:
            made = msgspec.convert(dict(args), cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"args: {str(error).replace('`', chr(39))}") from error
        if made.received_bytes is not None and made.received_bytes < made.request_bytes:
            raise ConfigurationError(f"args: received_bytes {made.received_bytes} is below request_bytes {made.request_bytes}")
        _check_scale("args: ", made)
        if made.canary is not None:
            _check_scale("args: canary: ", made.canary)
        return made

    def isolated(self) -> Arguments | None:
        """Those of the canary's deployment, where it has one."""
        own = self.canary
        if own is None:
            return None
        given = {name: value for name, value in msgspec.structs.asdict(own).items() if value is not None}
        scale = {"num_replicas": own.num_replicas, "autoscaling": own.autoscaling}
        return msgspec.structs.replace(self, canary=None, **{**given, **scale, "timeout_s": self.timeout_s})

    def settings(self, environ: Mapping[str, str]) -> Settings:
        """With the environment where nothing was said. Raises `ConfigurationError`."""
        settings = self.settings_of_models(environ)
        if (isolated := self.isolated()) is not None:
            isolated.settings_of_models(environ, "args: canary: ")
        check_closed(settings)
        most = self.autoscaling.max_replicas if self.autoscaling is not None else self.num_replicas or 1
        if settings.nonces == MEMORY and most > 1:
            raise ConfigurationError(
                "args: 'nonces' in memory are for one replica: several share a Redis, redis://host:port/number"
            )
        return settings

    def settings_of_models(self, environ: Mapping[str, str], args: str = "args: ") -> Settings:
        """The same, as far as a replica needs them that no caller reaches. `args`: how errors begin."""
        named = (
            "repository", "default_model", "provider", "required_providers", "threads", "gpu_mem_limit", "engine_cache",
            "allow_anonymous", "api_keys_file", "nonces", "hosts", "origins", "audit",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in named}
        if self.num_gpus and f"{PREFIX}PROVIDER" not in environ:
            given["provider"] = self.provider or "cuda"
        settings = Settings.from_env(environ, **given)
        if settings.repository is None:
            raise ConfigurationError("args: 'repository' is missing, and TRIFORM_REPOSITORY is not set")
        self._check_gpus(settings, args)
        return settings

    def runtime(self, settings: Settings, model: str) -> RuntimeOptions:
        """How that model is run. Raises `ConfigurationError`."""
        options = msgspec.structs.replace(settings.runtime(), provider_options=self.provider_options)
        own = self.overrides.get(model, ModelOptions())
        return msgspec.structs.replace(options, **{n: v for n in RUNTIME if (v := getattr(own, n)) is not None})

    def ray_actor_options(self) -> dict[str, Any]:
        """What a replica asks Ray for."""
        kind = {} if self.accelerator_type is None else {"accelerator_type": self.accelerator_type}
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": self.resources, **kind}

    def _check_gpus(self, settings: Settings, args: str) -> None:
        """A model on a GPU needs a replica with a share of one, and a share needs a limit: Ray counts, but divides nothing."""
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ConfigurationError(f"{args}num_gpus: expected a share of one GPU or whole ones, got {self.num_gpus:g}")
        for model in ["", *self.overrides]:
            options = self.runtime(settings, model)
            where = f"{args}overrides.{model}: " if model else args
            if options.provider == "cpu":
                continue
            if not self.num_gpus and options.provider != "auto":
                raise ConfigurationError(f"{where}provider {options.provider} needs num_gpus above 0")
            if 0 < self.num_gpus < 1 and options.gpu_mem_limit is None:
                raise ConfigurationError(f"{where}num_gpus below 1 shares a GPU: gpu_mem_limit must say how much of its memory")

    def room(self) -> Room:
        """For bodies."""
        return Room(self.received_bytes or max(MOST_RECEIVED, self.request_bytes))

    def limits(self) -> Limits:
        return Limits(request=self.request_bytes, unpacked=self.unpacked_bytes, response=self.response_bytes)


def _check_scale(args: str, given: Arguments | Isolated) -> None:
    """Raises `ConfigurationError`, which begins with `args`."""
    scaling = given.autoscaling
    if scaling is not None and given.num_replicas is not None:
        raise ConfigurationError(f"{args}num_replicas and autoscaling: give one of them")
    if scaling is not None and scaling.min_replicas > scaling.max_replicas:
        raise ConfigurationError(f"{args}autoscaling: min_replicas {scaling.min_replicas} is above max_replicas")
