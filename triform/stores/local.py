"""A model repository in a local folder.

    <root>/<model>/<version>/...            a staged folder, renamed into place when it is finished
    <root>/<model>/releases/000017.json     written beside, then linked: the link fails if the revision is taken

Names that begin with a dot are unfinished work; no reader looks at them, so a crash at any moment leaves a readable
repository.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from triform.errors import StoreError, UnsafePackage, VersionExists, VersionNotFound
from triform.package import MANIFEST, NAME, ModelPackage
from triform.repository import VERSION, check_name
from triform.stores import durable

P = ParamSpec("P")
R = TypeVar("R")
_REVISION: Final = re.compile(r"([0-9]{6,})\.json")


def _storage(operation: Callable[P, R]) -> Callable[P, R]:
    """Turns what the file system refuses into `StoreError`; a client is not shown the path."""

    @wraps(operation)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return operation(*args, **kwargs)
        except OSError as error:
            raise StoreError(f"the model repository failed: {error.strerror or error}") from error

    return guarded


class LocalRepository:
    """Implements `ModelRepository` on a folder, which is made with the first model."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location = str(self.root)

    @_storage
    def models(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(f.name for f in self.root.iterdir() if f.is_dir() and NAME.fullmatch(f.name) and self.versions(f.name))

    @_storage
    def versions(self, model: str) -> list[int]:
        folder = self.root / check_name(model)
        if not folder.is_dir():
            return []
        return sorted(int(f.name) for f in folder.iterdir() if VERSION.fullmatch(f.name) and (f / MANIFEST).is_file())

    @_storage
    def package(self, model: str, version: int) -> ModelPackage:
        folder = self.root / check_name(model) / str(version)
        if not (folder / MANIFEST).is_file():
            raise VersionNotFound(f"'{model}' has no version {version}")
        package = ModelPackage.open(folder)
        if package.manifest.ref != f"{model}/{version}":
            raise UnsafePackage(
                f"what lies in the place of {model}/{version} is {package.manifest.ref}: versions are never moved"
            )
        return package

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        folder = self.root / check_name(model) / f".staging-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"cannot write to the model repository {self.location}: {error.strerror}") from error
        try:
            yield folder
        except OSError as error:
            raise StoreError(f"the package could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @_storage
    def publish(self, staged: Path, model: str, version: int) -> None:
        target = self.root / check_name(model) / str(version)
        for at, _, files in os.walk(staged):
            for name in files:
                durable.fsync_file(Path(at) / name)
            durable.fsync_folder(Path(at))
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise VersionExists(
                    f"'{model}' already has a version {version}, and versions never change: publish the next"
                ) from None
            raise
        durable.fsync_folder(target.parent)
        durable.fsync_folder(self.root)

    @_storage
    def latest_revision(self, model: str) -> int:
        folder = self._releases(model)
        if not folder.is_dir():
            return 0
        return max((int(m[1]) for m in map(_REVISION.fullmatch, os.listdir(folder)) if m), default=0)

    @_storage
    def read_release(self, model: str, revision: int) -> bytes | None:
        try:
            return (self._releases(model) / f"{revision:06d}.json").read_bytes()
        except FileNotFoundError:
            return None

    @_storage
    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        folder = self._releases(model)
        folder.mkdir(exist_ok=True)
        durable.fsync_folder(folder.parent)
        return durable.create_exclusively(folder / f"{revision:06d}.json", content)

    def _releases(self, model: str) -> Path:
        return self.root / check_name(model) / "releases"
