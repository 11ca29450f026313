"""Where a job writes: a folder on a local disk, or a prefix of a bucket (s3_files.py), behind one seam.

Names are relative, with "/" between their parts. What others may see appears whole, survives a power cut, and is created by
exactly one of many writers. A finished file is written to a scratch folder on the local disk first, then placed.

The two differ in one thing: a local folder can be renamed whole (`renames`), so finished files stay hidden until a commit shows
them all at once; in a bucket they stand under their final names from the start, and a reader looks for the mark of the commit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from triform.errors import ConfigurationError
from triform.package import FileEntry, file_entry
from triform.stores import durable


class FileStore(Protocol):
    """Every method may raise `StoreError` or `OSError` where the storage fails. `location`: as it was opened, absolute."""

    location: str
    renames: bool

    def create(self, name: str, content: bytes) -> bool:
        """Creates the file exclusively and durably; False if the name is taken (perhaps by us, if a response was lost)."""

    def replace(self, name: str, content: bytes) -> None:
        """Writes the file so that a reader sees the old content or the new."""

    def read(self, name: str) -> bytes | None:
        """The content; None if there is no such file."""

    def open(self, name: str) -> BinaryIO:
        """The file, to be read at any place. Raises `FileNotFoundError`."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def age(self, name: str) -> float | None:
        """Seconds since the file was written, by the storage's own clock; None if there is no such file."""

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder but those that begin with "_" or "."; empty where there is no such folder."""

    def entry(self, name: str) -> FileEntry:
        """The file's digest and size. Raises `FileNotFoundError`."""

    def make_folder(self, name: str) -> None:
        """Makes the folder, where folders have to be made."""

    def has_folder(self, name: str) -> bool:
        """Whether there is such a folder. Only where `renames`."""

    def rename_folder(self, before: str, after: str) -> None:
        """Shows a folder's files under another name, all at once. Only where `renames`; raises `FileNotFoundError`."""

    def scratch(self, folder: str) -> Path:
        """A folder on the local disk for files that are to be placed; `folder` is where it is, if the store is a disk."""

    def stage(self, file: Path, name: str) -> None:
        """Makes a finished file durable in the store as `name`, which nobody else uses."""

    def place(self, file: Path, name: str) -> bool:
        """Makes a finished file `name`, exclusively; False if the name is taken (perhaps by us)."""

    def copy(self, source: str, name: str) -> bool:
        """The same with a staged file. Raises `FileNotFoundError` if that is gone."""

    def remove(self, name: str) -> None:
        """Removes the file; none there is no error."""

    def remove_folder(self, name: str) -> None:
        """Removes the folder and all in it, as far as possible."""

    def abort_uploads(self, folder: str, *, older_than: float = 0.0) -> None:
        """Ends what is being placed below the folder since more than `older_than` seconds, where that leaves anything behind."""


def open_files(location: str | Path) -> FileStore:
    """The files at a path or at `s3://bucket/prefix`. Raises `ConfigurationError` for a location that no store knows."""
    text = str(location)
    if not text.startswith("s3://"):
        if "://" in text:
            raise ConfigurationError(f"{text[:200]!r} is neither a local path nor s3://bucket/prefix")
        return LocalFiles(Path(text))
    try:
        from triform.stores.s3_files import S3Files
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{text[:200]!r}: S3 needs {error.name}: install triform[s3]") from error
    return S3Files.at(text)


def last_number(exists: Callable[[int], bool]) -> int:
    """The highest n for which `exists`, of a log 1, 2, 3... without gaps; 0 of an empty one.

    Doubling, then halving: few questions, however long the log is.
    """
    low, high = 0, 1
    while exists(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exists(middle) else (low, middle)
    return low


class LocalFiles:
    """Implements `FileStore` on a folder."""

    renames = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location = str(self.root)

    def create(self, name: str, content: bytes) -> bool:
        return durable.create_exclusively(self.root / name, content)

    def replace(self, name: str, content: bytes) -> None:
        durable.replace(self.root / name, content)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def age(self, name: str) -> float | None:
        try:
            return time.time() - (self.root / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        try:
            return [name for name in os.listdir(self.root / folder) if not name.startswith(("_", "."))]
        except FileNotFoundError:
            return []

    def entry(self, name: str) -> FileEntry:
        return file_entry(self.root / name)

    def make_folder(self, name: str) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def has_folder(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def rename_folder(self, before: str, after: str) -> None:
        (self.root / before).rename(self.root / after)
        durable.fsync_folder((self.root / after).parent)

    def scratch(self, folder: str) -> Path:
        return self.root / folder

    def stage(self, file: Path, name: str) -> None:  # noqa: ARG002 - the protocol's
        """Nothing to do: it was written in its place, and `sink` has synced it."""
        durable.fsync_folder((self.root / name).parent)

    def place(self, file: Path, name: str) -> bool:
        return durable.link_exclusively(file, self.root / name)

    def copy(self, source: str, name: str) -> bool:
        return durable.link_exclusively(self.root / source, self.root / name)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / name).unlink()

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def abort_uploads(self, folder: str, *, older_than: float = 0.0) -> None:
        """Nothing to do: attempts' files lie in their folder, which is removed."""
