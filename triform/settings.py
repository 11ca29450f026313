"""Settings, read once where the process starts and then passed along.

Order: explicit argument, then `TRIFORM_*` in the environment, then the package's model.toml, then the default here. A bad
value stops the start and names its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from triform.errors import ConfigurationError
from triform.repository import ModelRepository, open_repository
from triform.runtime import RuntimeOptions

PREFIX = "TRIFORM_"


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
    models: tuple[str, ...] = ()  # what a function serves: references; none: all of the repository
    telemetry: Literal["emf", "none"] = "emf"  # of a function: logs and metrics through Powertools, or neither
    deadline_margin: float = 0.25  # seconds before a function's end at which a run is ended
    reference_prefixes: tuple[str, ...] = ()  # below these, inputs and outputs may be given by reference
    reference_bytes: int = 256 << 20  # the most that is read by reference

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
        try:
            settings.runtime()
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
        )


def _parse(key: str, text: str | list[str], kind: Any) -> Any:
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{key}: {str(error).replace('`', chr(39)).lower()}, got {text!r}") from error
