"""The models layer: packages of a repository, pinned.

    name@stable -> resolve -> verify in full -> /opt/models/<model>/<version>/..., the release beside them -> pinned.json

`/opt/models` is itself a model repository with the releases that were in force. `pinned.json` says what is to be served:

    {"format": 1, "models": {"flight-delay": {"revision": 3, "aliases": {"stable": 2, "canary": 3}, "digests": {"2": "..."}}}}

A bare name takes every version of the release in force, name@alias that one. name/3 is `stable` whatever the log says; its
revision is 0, as is that of a model that was never released.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from triform.errors import InvalidRequest
from triform.package import MANIFEST, ModelPackage
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, Ref, resolve

PINNED: Final = "pinned.json"
ALIASES: Final = ("stable", "canary", "shadow")


class PinnedModel(msgspec.Struct, frozen=True):
    """`revision`: of the release log, 0 where it does not decide; `digests`: of each version's package."""

    revision: int
    aliases: dict[str, int]
    digests: dict[str, str]


class Pinned(msgspec.Struct, frozen=True):
    models: dict[str, PinnedModel]
    format: Literal[1] = 1


def pin(repository: ModelRepository, refs: Sequence[str]) -> dict[str, tuple[int, dict[str, int]]]:
    """By model: the revision and the versions by alias. Raises what `resolve` raises, `InvalidRequest` for refs that disagree."""
    pinned: dict[str, tuple[int, dict[str, int]]] = {}
    for ref in map(Ref.parse, refs):
        revision, aliases = _meant(repository, ref)
        before, known = pinned.setdefault(ref.model, (revision, {}))
        if before != revision or any(known.get(alias, version) != version for alias, version in aliases.items()):
            raise InvalidRequest(f"model: {ref} disagrees with another reference to '{ref.model}' about what is served")
        known.update(aliases)
    return pinned


def _meant(repository: ModelRepository, ref: Ref) -> tuple[int, dict[str, int]]:
    _, version = resolve(repository, ref)
    release = ReleaseLog(repository, ref.model).current() if ref.version is None else None
    if release is None:
        return 0, {"stable": version}
    wanted = [ref.alias] if ref.alias else ALIASES
    return release.revision, {alias: found for alias in wanted if (found := release.version_of(alias)) is not None}


def place(repository: ModelRepository, refs: Sequence[str], folder: Path) -> Pinned:
    """Fills `folder` (the layer's `models/`) with the packages and `pinned.json`.

    Raises what `pin` and `ModelPackage.verify` raise: nothing is placed that would not pass at `full`.
    """
    models = {}
    for model, (revision, aliases) in sorted(pin(repository, refs).items()):
        digests = {}
        for version in sorted(set(aliases.values())):
            package = repository.package(model, version)
            package.verify("full")
            digests[str(version)] = _copy(package, folder / model / str(version))
        models[model] = PinnedModel(revision, {alias: aliases[alias] for alias in ALIASES if alias in aliases}, digests)
        if revision:
            _copy_release(repository, model, models[model], folder)
    pinned = Pinned(models)
    write(pinned, folder)
    return pinned


def write(pinned: Pinned, folder: Path) -> None:
    """`pinned.json`, the same bytes for the same content."""
    (folder / PINNED).write_bytes(msgspec.json.format(msgspec.json.encode(pinned), indent=2) + b"\n")


def _copy(package: ModelPackage, target: Path) -> str:
    """Copies the files that the manifest lists, and checks the copies; the package's digest."""
    for name in (MANIFEST, *package.manifest.files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.folder / name, target / name)
    copied = ModelPackage.open(target)
    copied.verify("golden")
    return copied.manifest.digest


def _copy_release(repository: ModelRepository, model: str, pinned: PinnedModel, folder: Path) -> None:
    """The release as it stands in the log, if all that it names is here."""
    log = ReleaseLog(repository, model)
    content = repository.read_release(model, pinned.revision)
    if content is not None and log.read(pinned.revision).versions() <= set(pinned.aliases.values()):
        target = folder / model / "releases" / f"{pinned.revision:06d}.json"
        target.parent.mkdir()
        target.write_bytes(content)
