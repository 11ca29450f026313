"""The composition root of a replica: models loaded, their batchers, the surface in front of them.

Arguments, Settings -> repository -> Models -> Batched (threads) -> InferenceService -> HttpSurface
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ray_apps.arguments import Arguments
from triform.access import open_access
from triform.batching import Batched, BatchOptions
from triform.errors import ConfigurationError
from triform.http import HttpSurface
from triform.predictor import Predictor
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, Ref, resolve
from triform.runtime import RuntimeOptions
from triform.service import InferenceService, Models
from triform.settings import Settings
from triform.telemetry import Telemetry

log = logging.getLogger(__name__)

MOST_THREADS = 64


class Hosted(NamedTuple):
    """What a replica works with."""

    surface: HttpSurface
    batched: Batched
    threads: ThreadPoolExecutor

    async def drain(self) -> None:
        """Waits for what is in flight, then ends the threads."""
        await self.batched.drain()
        self.threads.shutdown(wait=False)


def host(arguments: Arguments, settings: Settings, telemetry: Telemetry) -> Hosted:
    """Loads every model. Raises `ConfigurationError`, `PackageError`, `StoreError`, `NotFound`: the replica must not start."""
    repository = settings.open_repository()
    models = Models(form="serve", default=settings.default_model, telemetry=telemetry)
    for model, version, aliases in _versions(repository, arguments):
        models.add(model, version, _loader(repository, model, version, settings.runtime()), aliases=aliases)
    names = models.names()
    for named in [*arguments.overrides, *([settings.default_model] if settings.default_model else [])]:
        if named not in names:
            raise ConfigurationError(f"args: '{named}' is not among the models here ({', '.join(names[:10])})")
    slots = sum(arguments.overrides.get(name, BatchOptions()).slots * len(models.versions(name)) for name in names)
    threads = ThreadPoolExecutor(min(slots, MOST_THREADS), thread_name_prefix="triform-run")
    batched = Batched(threads, arguments.overrides)
    access = open_access(settings, asyncio.to_thread, public=False)
    return Hosted(HttpSurface(InferenceService(models, batched), arguments.limits(), access), batched, threads)


def _versions(repository: ModelRepository, arguments: Arguments) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Model, version, and the aliases that mean it, stable first."""
    refs = [Ref.parse(text) for text in arguments.models] or [Ref(name) for name in repository.models()]
    if not refs:
        raise ConfigurationError(f"args: there is no model in {repository.location}")
    for ref in refs:
        release = ReleaseLog(repository, ref.model).current() if ref.version is None and ref.alias is None else None
        if release is None:
            yield *resolve(repository, ref), ("stable",)
            continue
        meant = {alias: release.version_of(alias) for alias in ("stable", "canary", "shadow")}
        for version in sorted({v for v in meant.values() if v is not None}):
            yield ref.model, version, tuple(alias for alias, v in meant.items() if v == version)


def _loader(repository: ModelRepository, model: str, version: int, options: RuntimeOptions) -> Callable[[], Predictor]:
    def load() -> Predictor:
        started = time.perf_counter()
        package = repository.package(model, version)
        fetched = time.perf_counter() - started
        predictor = Predictor.load(package, options, verification="golden")
        predictor.load_seconds = {"fetch": fetched, **predictor.load_seconds}
        return predictor

    return load
