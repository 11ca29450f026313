"""The composition root of every function: settings, models, telemetry, put together once while the environment starts.

    environ -> Settings -> repository (layer, image, S3) -> Models -> InferenceService -> HttpSurface
                                                     pinned.json, or the release log, says what aliases mean, and
                                                     the release shares the keys between stable and canary

How much is loaded at once is a matter of who waits: provisioned environments and snapshots load every pinned model, one that is
started on demand only the default model, and each other model when it is first asked for. What raises here fails the start of the
environment, which is what a platform should see of a package that must not be served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from handlers._telemetry import ON_DEMAND, LambdaTelemetry, open_telemetry
from triform.access import open_access
from triform.errors import ConfigurationError, DigestMismatch
from triform.http import HttpSurface, Limits
from triform.models import Models
from triform.package import Verification
from triform.predictor import Predictor
from triform.releases import Release, ReleaseLog
from triform.repository import ModelRepository, Ref, resolve
from triform.service import InferenceService
from triform.settings import Settings

LAYER: Final = "/opt/models"
TMP_CACHE: Final = "/tmp/triform"  # noqa: S108 - the one folder that a function may write to, and nobody else has
PINNED: Final = "pinned.json"
MB_PER_VCPU: Final = 1769  # Lambda, "Configure Lambda function memory": at 1,769 MB a function has one vCPU


class Booted(NamedTuple):
    """What a handler works with."""

    service: InferenceService
    surface: HttpSurface
    settings: Settings
    telemetry: LambdaTelemetry


class PinnedModel(msgspec.Struct, frozen=True):
    """What a model's aliases mean in this layer, the release revision that said so, and the packages' digests by version."""

    aliases: dict[str, int]
    revision: int = 0
    digests: dict[str, str] = {}


class Pinned(msgspec.Struct, frozen=True):
    """`pinned.json` of a models layer; infra/layers writes it."""

    models: dict[str, PinnedModel]
    format: Literal[1] = 1


class Pin(NamedTuple):
    """A version that is served, the aliases that mean it and, where it is pinned, its package's digest. `release`: that has both
    it and a canary."""

    model: str
    version: int
    aliases: tuple[str, ...]
    digest: str | None = None
    release: Release | None = None


def boot(environ: Mapping[str, str]) -> Booted:
    """Everything that a function needs. Raises `ConfigurationError`, `PackageError`, `StoreError`: the start has failed."""
    settings = Settings.from_env(environ)
    telemetry = open_telemetry(settings.telemetry, environ)
    repository, pins = open_pins(settings)
    models = Models(form="lambda", default=settings.default_model, telemetry=telemetry)
    remote = repository.location.startswith("s3://")
    eager = _eager(pins, settings, telemetry.initialization)
    for pin in pins:
        load = _loader(repository, pin, settings, environ, "golden" if remote else "sealed")
        models.add(pin.model, pin.version, load, aliases=pin.aliases, now=pin in eager)
    for pin in pins:
        if pin.release is not None and "stable" in pin.aliases:
            models.share(pin.model, pin.release)
    limits = Limits(request=settings.reference_bytes, unpacked=_unpacked(environ))
    service = InferenceService(models)
    return Booted(service, HttpSurface(service, limits, open_access(settings, public=True)), settings, telemetry)


def open_pins(settings: Settings) -> tuple[ModelRepository, list[Pin]]:
    """The repository, and what is served of it."""
    repository = _open(settings)
    return repository, list(_pins(repository, settings, remote=repository.location.startswith("s3://")))


def _unpacked(environ: Mapping[str, str]) -> int:
    """How far a packed body may unpack, in bytes: JSON takes up to 40 times its size as Python's objects."""
    memory = int(environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "0") or 0) << 20
    return min(Limits().unpacked, max(6 << 20, memory // 64)) if memory else Limits().unpacked


def _open(settings: Settings) -> ModelRepository:
    """The layer's folder, unless TRIFORM_REPOSITORY says another; packages from S3 go to /tmp."""
    location = settings.repository or LAYER
    if settings.repository is None and not Path(LAYER).is_dir():
        raise ConfigurationError(f"repository: TRIFORM_REPOSITORY is not set, and there is no models layer at {LAYER}")
    return msgspec.structs.replace(settings, repository=location, cache=settings.cache or TMP_CACHE).open_repository()


def _pins(repository: ModelRepository, settings: Settings, *, remote: bool) -> Iterator[Pin]:
    """What is served: the models of `pinned.json`, or of the repository; of these TRIFORM_MODELS, where it is set."""
    pinned = {} if remote else read_pinned(Path(repository.location))
    refs = [Ref.parse(text) for text in settings.models]
    refs = refs or [Ref(name) for name in (sorted(pinned) if pinned else repository.models())]
    if not refs:
        raise ConfigurationError(f"repository: there is no model in {repository.location}")
    for ref in refs:
        if ref.version is not None or ref.alias is not None or ref.model not in pinned:
            yield from _released(repository, ref)
        else:
            content = pinned[ref.model]
            yield from _grouped(ref.model, content.aliases, _pinned_release(repository, ref.model, content), content.digests)


def read_pinned(root: Path) -> dict[str, PinnedModel]:
    """The models of a layer's `pinned.json`; none where there is no such file."""
    try:
        content = (root / PINNED).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return msgspec.json.decode(content, type=Pinned).models
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{PINNED} of the models layer is damaged: {error}") from error


def _released(repository: ModelRepository, ref: Ref) -> Iterator[Pin]:
    """By the release log; without one the highest version is the stable one."""
    if ref.version is None and ref.alias is None and (release := ReleaseLog(repository, ref.model).current()) is not None:
        yield from _grouped(ref.model, release.aliases(), release)
    else:
        yield Pin(*resolve(repository, ref), ("stable",))


def _pinned_release(repository: ModelRepository, model: str, pinned: PinnedModel) -> Release | None:
    """The release that a layer was built from, which is beside its packages where all that it names is."""
    if "canary" not in pinned.aliases or repository.read_release(model, pinned.revision) is None:
        return None
    release = ReleaseLog(repository, model).read(pinned.revision)
    return release if release.aliases() == pinned.aliases else None


def _grouped(
    model: str, aliases: Mapping[str, int], release: Release | None = None, digests: Mapping[str, str] | None = None
) -> Iterator[Pin]:
    for version in sorted(set(aliases.values())):
        named = sorted((alias for alias, v in aliases.items() if v == version), key=lambda alias: alias != "stable")
        yield Pin(model, version, tuple(named), (digests or {}).get(str(version)), release)


def _eager(pins: list[Pin], settings: Settings, initialization: str) -> list[Pin]:
    """What is loaded now."""
    names = {pin.model for pin in pins}
    if settings.default_model is not None and settings.default_model not in names:
        known = ", ".join(sorted(names)[:10])
        raise ConfigurationError(f"TRIFORM_DEFAULT_MODEL: '{settings.default_model}' is not among the models here ({known})")
    if initialization != ON_DEMAND:
        return pins
    default = settings.default_model or (names.pop() if len(names) == 1 else None)
    return [pin for pin in pins if pin.model == default and "stable" in pin.aliases]


def _loader(
    repository: ModelRepository, pin: Pin, settings: Settings, environ: Mapping[str, str], verification: Verification
) -> Callable[[], Predictor]:
    most = max(1, int(environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "0") or 0) // MB_PER_VCPU)
    capped = "AWS_LAMBDA_FUNCTION_MEMORY_SIZE" in environ

    def load() -> Predictor:
        started = time.perf_counter()
        package = repository.package(pin.model, pin.version)
        fetched = time.perf_counter() - started
        if pin.digest is not None and package.manifest.digest != pin.digest:
            raise DigestMismatch(f"{package.manifest.ref} is not the package that {PINNED} pins")
        threads = settings.threads or package.manifest.config.runtime.threads
        options = msgspec.structs.replace(settings.runtime(), threads=min(threads, most) if capped else threads)
        predictor = Predictor.load(package, options, verification=verification)
        predictor.load_seconds = {"fetch": fetched, **predictor.load_seconds}
        return predictor

    return load
