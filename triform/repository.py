"""Model repositories: where packages live, and what a reference such as `flight-delay@stable` means.

    open_repository(location) -> resolve(repository, "name@stable") -> repository.package(model, version) -> Predictor.load

`ModelRepository` is the one seam between Triform and storage: few operations, each whole or not at all. What the releases
in it mean is `releases.py`'s business, the same for every store.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from triform.errors import AliasNotFound, ConfigurationError, InvalidReference
from triform.package import NAME, ModelPackage
from triform.releases import ReleaseLog, no_such_model, no_such_version

Alias = Literal["stable", "canary", "shadow"]
VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")
ABANDONED_SECONDS: Final = 24 * 3600.0  # what nothing names for so long has lost its packager


class Note(NamedTuple):
    """A small file about a model: `age` is in seconds, by the storage's own clock."""

    content: bytes
    age: float


class Stored(NamedTuple):
    """What lies in a version's place: `age` as a note's, `size` the bytes that go with it and with nothing else."""

    version: int
    age: float
    size: int
    digest: str  # empty where the manifest cannot be read


class Leftover(NamedTuple):
    """What no version names: `name` is relative to the model's place, `size` in bytes."""

    name: str
    size: int


class ModelRepository(Protocol):
    """What a store must do. Every method may raise `StoreError` where the storage fails.

    From `pruned` on it is what `claims.py` and `retention.py` need to remove versions; they say in which order.
    """

    location: str

    def models(self) -> list[str]:
        """The names of all models, sorted."""

    def versions(self, model: str) -> list[int]:
        """The published versions but those pruned, rising; empty where the model does not exist."""

    def package(self, model: str, version: int) -> ModelPackage:
        """The package on local disk, fetched if it must be; not yet verified. Raises `VersionNotFound`."""

    def staging(self, model: str) -> AbstractContextManager[Path]:
        """An empty folder to build a package in; gone afterwards, published or not."""

    def publish(self, staged: Path, model: str, version: int) -> None:
        """Makes the staged folder that version, whole or not at all. Raises `VersionExists`, also for a pruned number."""

    def latest_revision(self, model: str) -> int:
        """The highest revision of the model's release log; 0 where nothing was released."""

    def read_release(self, model: str, revision: int) -> bytes | None:
        """That revision's content, or None."""

    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        """Creates the revision exclusively and durably; False if it is taken."""

    def pruned(self, model: str) -> list[int]:
        """The numbers with a note `pruned/<version>.json`, rising: spent, whatever still lies in their place."""

    def read_note(self, model: str, name: str) -> Note | None:
        """A note such as `claims/3-000001.json`, or None."""

    def create_note(self, model: str, name: str, content: bytes) -> bool:
        """Creates the note exclusively and durably; False if it is there (perhaps by us, if a response was lost)."""

    def stored(self, model: str) -> list[Stored]:
        """What lies in the place of each version, pruned or not, rising."""

    def remove(self, model: str, version: int) -> None:
        """Takes the version out of every reader's sight at once, then removes it; none there is no error."""

    def sweep(self, model: str, *, older_than: float, without: Collection[int] = (), dry_run: bool = False) -> list[Leftover]:
        """Removes, or tells, what killed packagers and removed versions left and nobody may be using: older than so many
        seconds, and named by no version but those in `without`."""


class Ref(msgspec.Struct, frozen=True):
    """`name`, `name@alias` or `name/version`."""

    model: str
    alias: Alias | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Raises `InvalidReference` for anything else."""
        for mark in "@", "/":
            model, found, rest = text.partition(mark)
            if found and NAME.fullmatch(model):
                if mark == "@" and rest in ("stable", "canary", "shadow"):
                    return cls(model, alias=rest)  # type: ignore[arg-type]  # narrowed by the line above
                if mark == "/" and VERSION.fullmatch(rest):
                    return cls(model, version=int(rest))
        if NAME.fullmatch(text):
            return cls(text)
        raise InvalidReference(
            f"{text[:120]!r} is not a model reference: write name, name@stable (or @canary, @shadow) or name/3; "
            "names are letters, digits, '.', '_' and '-'"
        )

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.model}/{self.version}"
        return f"{self.model}@{self.alias}" if self.alias else self.model


def check_name(model: str) -> str:
    """The name, if it may name a model; else `InvalidReference`."""
    if not NAME.fullmatch(model):
        raise InvalidReference(f"{model[:120]!r} cannot name a model: use letters, digits, '.', '_' and '-', 100 at most")
    return model


def open_repository(location: str | Path, *, cache: Path | None = None, cache_bytes: int | None = None) -> ModelRepository:
    """The repository at a path or at `s3://bucket/prefix`, whose packages are kept in the folder `cache`.

    Raises `ConfigurationError` for a location that no store knows, or a store whose library is not installed.
    """
    if not str(location).startswith("s3://"):
        from triform.stores.local import LocalRepository

        if "://" in str(location):
            raise ConfigurationError(f"repository: {str(location)[:200]!r} is neither a local path nor s3://bucket/prefix")
        return LocalRepository(Path(location))
    try:
        from triform.stores.s3_repository import S3Repository
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"repository: S3 needs {error.name}: install triform[s3]") from error
    from triform.stores.cache import DEFAULT_BYTES, PackageCache, default_root

    return S3Repository.open(str(location), PackageCache(cache or default_root(), cache_bytes or DEFAULT_BYTES))


def resolve(repository: ModelRepository, ref: str | Ref) -> tuple[str, int]:
    """The model and version that a reference means now.

    A bare `name` means the stable release, or the highest version where nothing was released yet. Raises `ModelNotFound`,
    `VersionNotFound`, `AliasNotFound` or `InvalidReference`, each saying what there is.
    """
    ref = Ref.parse(ref) if isinstance(ref, str) else ref
    versions = repository.versions(ref.model)
    if not versions:
        raise no_such_model(repository, ref.model)
    if ref.version is not None:
        if ref.version not in versions:
            raise no_such_version(repository, ref.model, ref.version, versions)
        return ref.model, ref.version
    release = ReleaseLog(repository, ref.model).current()
    if release is None:
        if ref.alias is None:
            return ref.model, versions[-1]
        raise AliasNotFound(f"'{ref.model}' was never released: run `triform release set {ref.model} --stable {versions[-1]}`")
    version = release.version_of(ref.alias or "stable")
    if version is None:
        raise AliasNotFound(f"revision {release.revision} of '{ref.model}' has no {ref.alias}")
    return ref.model, version
