"""A model repository in a local folder.

    <root>/<model>/<version>/...            a staged folder, renamed into place when it is finished
    <root>/<model>/releases/000017.json     written beside, then linked: the link fails if the revision is taken
    <root>/<model>/claims/, pruned/         notes, created in the same way

Names that begin with a dot are unfinished work; no reader looks at them, so a crash at any moment leaves a readable
repository.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from triform.errors import StoreError, UnsafePackage, VersionExists, VersionNotFound
from triform.package import MANIFEST, NAME, ModelPackage, named_in
from triform.repository import VERSION, Leftover, Note, Stored, check_name
from triform.stores import durable

P = ParamSpec("P")
R = TypeVar("R")
_REVISION: Final = re.compile(r"([0-9]{6,})\.json")
_PRUNED: Final = re.compile(r"([1-9][0-9]*)\.json")
_STAGING: Final = ".staging-"
_REMOVED: Final = ".removed-"


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
        there = [int(f.name) for f in folder.iterdir() if VERSION.fullmatch(f.name) and (f / MANIFEST).is_file()]
        return sorted(set(there) - set(self.pruned(model)))

    @_storage
    def package(self, model: str, version: int) -> ModelPackage:
        folder = self.root / check_name(model) / str(version)
        if not (folder / MANIFEST).is_file():
            pruned = " any more: it was pruned" if version in self.pruned(model) else ""
            raise VersionNotFound(f"'{model}' has no version {version}{pruned}")
        package = ModelPackage.open(folder)
        if package.manifest.ref != f"{model}/{version}":
            raise UnsafePackage(
                f"what lies in the place of {model}/{version} is {package.manifest.ref}: versions are never moved"
            )
        return package

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        folder = self.root / check_name(model) / f"{_STAGING}{uuid.uuid4().hex}"
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
        self._check_unspent(model, version)
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
        self._check_unspent(model, version)  # if it was pruned since, nobody sees this one, and the next prune removes it

    def _check_unspent(self, model: str, version: int) -> None:
        if version in self.pruned(model):
            raise VersionExists(f"version {version} of '{model}' was pruned, and no number is used twice: publish the next")

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

    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        return self.create_note(model, f"releases/{revision:06d}.json", content)

    @_storage
    def pruned(self, model: str) -> list[int]:
        try:
            names = os.listdir(self.root / check_name(model) / "pruned")
        except FileNotFoundError:
            return []
        return sorted(int(m[1]) for m in map(_PRUNED.fullmatch, names) if m)

    @_storage
    def read_note(self, model: str, name: str) -> Note | None:
        path = self.root / check_name(model) / name
        try:
            return Note(path.read_bytes(), _age(path))
        except FileNotFoundError:
            return None

    @_storage
    def create_note(self, model: str, name: str, content: bytes) -> bool:
        path = self.root / check_name(model) / name
        path.parent.mkdir(exist_ok=True)
        durable.fsync_folder(path.parent.parent)
        return durable.create_exclusively(path, content)

    @_storage
    def stored(self, model: str) -> list[Stored]:
        found = []
        for folder in (self.root / check_name(model)).iterdir():
            if VERSION.fullmatch(folder.name):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile, or none of ours
                    names = named_in((folder / MANIFEST).read_bytes())
                    age = _age(folder / MANIFEST)
                    found.append(Stored(int(folder.name), age, _size(folder), names.digest if names else ""))
        return sorted(found)

    @_storage
    def remove(self, model: str, version: int) -> None:
        folder = self.root / check_name(model) / str(version)
        if folder.is_dir():
            removed = folder.with_name(f"{_REMOVED}{version}-{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):  # another prune was first
                folder.rename(removed)
            durable.fsync_folder(folder.parent)
            _remove_tree(removed)

    @_storage
    def sweep(
        self,
        model: str,
        *,
        older_than: float,
        without: Collection[int] = (),  # noqa: ARG002 - here, versions share no files
        dry_run: bool = False,
    ) -> list[Leftover]:
        found = []
        for folder in sorted((self.root / check_name(model)).iterdir()):
            abandoned = folder.name.startswith(_STAGING) and _age(folder) > older_than
            if folder.name.startswith(_REMOVED) or abandoned:
                found.append(Leftover(folder.name, _size(folder)))
                if not dry_run:
                    _remove_tree(folder)
        return found

    def _releases(self, model: str) -> Path:
        return self.root / check_name(model) / "releases"


def _age(path: Path) -> float:
    """Seconds since the last change of the file, or of anything in the folder."""
    return time.time() - max((seen.st_mtime for seen in _all_of(path)), default=0.0)


def _size(folder: Path) -> int:
    return sum(seen.st_size for seen in _all_of(folder) if not stat.S_ISDIR(seen.st_mode))


def _all_of(path: Path) -> list[os.stat_result]:
    """The file or folder, and all in it; what somebody else removes meanwhile is not there."""
    names = [path, *(Path(at) / name for at, folders, files in os.walk(path) for name in (*folders, *files))]
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found.append(os.lstat(name))
    return found


def _remove_tree(folder: Path) -> None:
    """Of two who remove the same, neither fails."""
    while folder.is_dir():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
