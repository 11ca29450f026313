"""What a job is asked to do: command line or TOML file -> JobSpec, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from triform.config import convert, read_toml
from triform.errors import ConfigurationError
from triform.runtime import RuntimeOptions
from triform.settings import Settings

FROM_SETTINGS: Final = ("repository", "provider", "required_providers", "gpu_mem_limit")


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`input`: files, folders or globs. `actors`: N or "MIN:MAX"; None: as many as fit. `cpus` and `gpus`: what one actor asks
    Ray for."""

    repository: str
    model: str
    input: tuple[str, ...]
    output: str
    key: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    actors: str | int | None = None
    cpus: float | None = None  # None: the model's threads
    gpus: float = 0.0
    max_dead_letters: float = 0.01
    if_exists: Literal["fail", "replace"] = "fail"
    provider: str | None = None  # None: cuda where an actor has GPUs, else cpu
    required_providers: tuple[str, ...] = ()
    gpu_mem_limit: int | None = None  # bytes
    address: str | None = None  # of a Ray cluster; None: one is started here
    partition: tuple[str, ...] = ()  # name=value, outermost first; the last may be a name only, with `first` and `last`
    first: str | None = msgspec.field(name="from", default=None)
    last: str | None = msgspec.field(name="to", default=None)
    lease: float | None = None  # seconds
    pushgateway: str | None = None  # http://host:9091
    cloudwatch: str | None = None  # a namespace
    compare: str | int | None = None  # another version: a number or an alias
    policy: str | None = None  # a rollout.toml, by which the comparison is judged
    split: bool = False  # rows are shared with the canary, by their key, as callers online are

    def __post_init__(self) -> None:
        _require(bool(self.input), "input", "at least one file, folder or glob", "none")
        _require(0.0 <= self.max_dead_letters <= 1.0, "max_dead_letters", "a share from 0 to 1", self.max_dead_letters)
        if self.cpus is not None:
            _require(self.cpus > 0.0 and math.isfinite(self.cpus), "cpus", "more than 0", self.cpus)
        _require(self.gpus >= 0.0 and math.isfinite(self.gpus), "gpus", "0 or more", self.gpus)
        for name, columns in ("key", self.key), ("keep", self.keep):
            _require(all(columns) and len(set(columns)) == len(columns), name, "each column once", ", ".join(columns))
        actor_range(self.actors)
        _require(self.lease is None or 1.0 <= self.lease <= 86_400.0, "lease", "1 to 86,400 seconds", self.lease)
        _require(self.policy is None or self.compare is not None, "policy", "compare beside it", self.policy)
        _require(not (self.split and self.compare is not None), "split", "either it or compare", "both")
        self.runtime()

    def runtime(self) -> RuntimeOptions:
        """How an actor runs the model."""
        return RuntimeOptions(
            provider=self.provider or ("cuda" if self.gpus else "cpu"),
            required_providers=self.required_providers,
            gpu_mem_limit=self.gpu_mem_limit,
        )


def _require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigurationError(f"{key}: expected {expected}, got {got}")


def actor_range(actors: str | int | None) -> tuple[int, int] | None:
    """(MIN, MAX) of "MIN:MAX", (N, N) of N, None of None. Raises `ConfigurationError`."""
    if actors is None:
        return None
    low, colon, high = str(actors).partition(":")
    try:
        found = int(low), int(high if colon else low)
    except ValueError:
        found = (0, 0)
    _require(1 <= found[0] <= found[1], "actors", "N or MIN:MAX with 1 <= MIN <= MAX", actors)
    return found


def read_spec(file: Path | None, options: Mapping[str, Any], settings: Settings | None = None) -> JobSpec:
    """The job of a TOML file, overridden by the options that were given (those that are not None).

    What neither says comes from the settings. Raises `ConfigurationError` naming the key.
    """
    content: dict[str, Any] = {}
    if file is not None:
        content = read_toml(file)
        for name in "input", "key", "keep", "partition":
            if isinstance(content.get(name), str):
                content[name] = [content[name]]
    known = {name: getattr(settings, name) for name in FROM_SETTINGS} if settings else {}
    plain = {name: getattr(Settings(), name) for name in FROM_SETTINGS}
    base = {name: value for name, value in known.items() if value != plain[name]}
    given = {name: value for name, value in options.items() if value not in (None, [])}
    made = base | content | given
    for name in "repository", "model", "input", "output":
        if name not in made:
            also = " or set TRIFORM_REPOSITORY" if name == "repository" else ""
            raise ConfigurationError(f"{name}: missing; give --{name}, name it in a job file{also}")
    return convert(made, JobSpec, str(file) if file else "command line")
