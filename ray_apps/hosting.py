"""The composition root of a replica: models loaded and followed, their batchers, the surface in front of them.

Arguments, Settings -> repository -> Models -> Batched (threads) -> InferenceService -> HttpSurface
                                       Live (threads) -> Models
an isolated canary's replica:        Models -> Batched (threads)
                                       Live (threads) -> Models
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ray_apps.arguments import Arguments
from ray_apps.health import Health
from ray_apps.hop import Hop
from ray_apps.live import Live
from triform.access import open_access
from triform.aside import OneByOne
from triform.batched import Batched
from triform.errors import ConfigurationError, PackageError, StoreError, TriformError, VersionNotFound
from triform.following import Follower, Node, tell
from triform.http import HttpSurface
from triform.models import Elsewhere, Models
from triform.predictor import Predictor
from triform.repository import ModelRepository, Ref
from triform.runtime import RuntimeOptions
from triform.service import InferenceService
from triform.settings import Settings
from triform.stores.cache import default_root
from triform.telemetry import Telemetry

log = logging.getLogger(__name__)

MOST_THREADS = 64  # for runs; each model's `slots` say how many it may have at the same time


class Hosted(NamedTuple):
    """What a replica works with. `live.start()` is called on the event loop that answers requests."""

    surface: HttpSurface
    batched: Batched
    executors: tuple[Executor, ...]
    live: Live
    health: Health

    async def drain(self) -> None:
        """Waits for what is in flight, then ends the threads."""
        await self.live.end()
        self.surface.service.models.splits.end()
        await self.batched.drain()
        for executor in self.executors:
            executor.shutdown(wait=False)
        self.health.end()


class Held(NamedTuple):
    """Models, followed and run, whoever asks: of a replica that answers callers, and all that one for canaries has."""

    models: Models
    followers: Sequence[Follower]
    batched: Batched
    threads: Executor
    live: Live
    health: Health


def host(arguments: Arguments, settings: Settings, telemetry: Telemetry, hop: Hop | None = None) -> Hosted:
    """Loads every model, but (`hop`) a canary that others run. Raises `ConfigurationError`, `PackageError`, `StoreError`,
    `NotFound`: the replica must not start."""
    repository = settings.open_repository()
    isolated = None if hop is None else partial(_elsewhere, repository, hop)
    held = _held(arguments, settings, telemetry, repository, isolated=isolated)
    models, batched = held.models, held.batched
    if not held.followers:
        raise ConfigurationError(f"args: there is no model in {repository.location}")
    _start(held.followers, models, all_of_them=bool(arguments.models))
    names = sorted({*models.names(), *models.missing})
    for named in [*arguments.overrides, *([settings.default_model] if settings.default_model else [])]:
        if named not in names:
            raise ConfigurationError(f"args: '{named}' is not among the models here ({', '.join(names[:10])})")
    bodies = ThreadPoolExecutor(1, thread_name_prefix="triform-body")
    access = open_access(settings, asyncio.to_thread, public=False)
    execute = batched if hop is None else hop.beside(batched)
    surface = HttpSurface(InferenceService(models, execute, OneByOne(bodies)), arguments.limits(), access)
    return Hosted(surface, batched, (held.threads, bodies), held.live, held.health)


def host_canaries(arguments: Arguments, settings: Settings, telemetry: Telemetry) -> Held:
    """Loads the canary of each model that has one. One that cannot be loaded keeps nothing from starting: it is told of."""
    held = _held(arguments, settings, telemetry, settings.open_repository(), canary_only=True)
    for follower in held.followers:
        try:
            follower.step()
        except TriformError as error:
            tell(held.models, follower.ref.model, None, None, error)
    return held


def _held(arguments: Arguments, settings: Settings, telemetry: Telemetry, repository: ModelRepository, **kind: Any) -> Held:
    """Nothing is loaded yet. `kind`: of the followers."""
    models = Models(form="serve", default=settings.default_model, telemetry=telemetry)
    node = Node(repository, _node_folder(settings), models, every=arguments.poll_s)
    load = partial(_load, repository, partial(arguments.runtime, settings))

    def follow(ref: Ref) -> Follower:
        return Follower(ref, node, models, load, **kind)

    refs = _refs(arguments)
    followers = [follow(ref) for ref in refs or map(Ref, repository.models())]
    threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="triform-run")
    places = sys.maxsize if kind.get("canary_only") else arguments.max_ongoing_requests  # most models have no canary
    batched = Batched(threads, arguments.overrides, places=places)
    batched.share(len(followers))
    live = Live(followers, node, models, batched, None if refs else follow)
    return Held(models, followers, batched, threads, live, Health(models, seconds=arguments.health_timeout_s))


def _refs(arguments: Arguments) -> list[Ref]:
    refs = [Ref.parse(text) for text in arguments.models]
    twice = [model for model, times in Counter(ref.model for ref in refs).items() if times > 1]
    if twice:
        raise ConfigurationError(f"args: models: '{twice[0]}' is named twice; a release may name a canary and a shadow beside it")
    return refs


def _node_folder(settings: Settings) -> Path:
    """Where the processes of this node keep what they share."""
    folder = Path(settings.cache) if settings.cache else default_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"TRIFORM_CACHE: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"TRIFORM_CACHE: {folder} cannot be written, and a node keeps there what it knows of releases")
    return folder


def _start(followers: Sequence[Follower], models: Models, *, all_of_them: bool) -> None:
    """Of models that nobody named, one that cannot be served (it is told) keeps no other from being so."""
    errors = []
    for follower in followers:
        try:
            follower.start()
        except TriformError as error:
            if all_of_them or isinstance(error, ConfigurationError | StoreError):  # a store that is away is tried again by Serve
                raise
            if not isinstance(error, PackageError | VersionNotFound):  # of which the follower has told
                tell(models, follower.ref.model, None, None, error)
            models.miss(follower.ref.model, error.code)
            errors.append(error)
    if not models.names():
        raise errors[0]


def _elsewhere(repository: ModelRepository, hop: Hop, model: str, version: int) -> Elsewhere:
    manifest = repository.package(model, version).manifest
    return Elsewhere(manifest, partial(hop.is_ready, manifest.ref))


def _load(repository: ModelRepository, options: Callable[[str], RuntimeOptions], model: str, version: int) -> Predictor:
    started = time.perf_counter()
    package = repository.package(model, version)
    fetched = time.perf_counter() - started
    predictor = Predictor.load(package, options(model), verification="golden")
    predictor.load_seconds = {"fetch": fetched, **predictor.load_seconds}
    return predictor
