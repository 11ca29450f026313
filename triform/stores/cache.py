"""Packages from a remote store on this node's disk: content-addressed, bounded, shared by the processes of a node.

    <root>/<package digest>/...      a whole package, renamed into place when its last byte is verified
    <root>/.filling-*                downloads under way; nobody reads them
    <root>/.lock-<digest>            held while that package is filled: one process downloads, the others wait for it

A package that was used a moment ago is never evicted, so that one who was just given a folder can open it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from triform.errors import StoreError
from triform.stores import durable

DEFAULT_BYTES: Final = 20 << 30
RECENT_SECONDS: Final = 900.0  # used so lately: somebody may be opening it
ABANDONED_SECONDS: Final = 6 * 3600.0  # a download that old has lost its process
POLL_SECONDS: Final = 0.05


def default_root() -> Path:
    """Where the XDG base directory specification wants caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triform"


class PackageCache:
    """Holds at most `max_bytes`, but for what is in use. Safe for any number of processes and threads."""

    def __init__(self, root: Path, max_bytes: int = DEFAULT_BYTES, *, wait_seconds: float = 1800.0) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.wait_seconds = wait_seconds  # for another process's download

    def folder(self, digest: str, fill: Callable[[Path], None]) -> Path:
        """The package's folder; `fill` is called with an empty one if it is not there yet, by one process at a time.

        What `fill` raises is passed on and leaves nothing behind. Raises `StoreError` where the disk fails.
        """
        target = self.root / digest
        try:
            if self._touch(target):
                return target
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked(digest):
                if not self._touch(target):
                    self._fill(target, fill)
        except OSError as error:
            raise StoreError(f"the package cache failed: {error.strerror or error}") from error
        return target

    def _touch(self, target: Path) -> bool:
        """Notes a use; False if the package is not there."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    def _fill(self, target: Path, fill: Callable[[Path], None]) -> None:
        staging = self.root / f".filling-{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            fill(staging)
            self._make_room(_size(staging))
            staging.rename(target)
            durable.fsync_folder(self.root)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _make_room(self, needed: int) -> None:
        """Evicts the least recently used packages until `needed` bytes fit, or only recent ones are left."""
        now = time.time()
        entries = []
        for folder in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                used = folder.stat().st_mtime
                if folder.name.startswith(".filling-") and now - used > ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
                elif not folder.name.startswith("."):
                    entries.append((used, _size(folder), folder))
        total = needed + sum(size for _, size, _ in entries)
        for used, size, folder in sorted(entries):
            if total <= self.max_bytes or now - used < RECENT_SECONDS:
                return
            self._evict(folder)
            total -= size

    def _evict(self, folder: Path) -> None:
        """Takes the name away first: nobody sees half a package."""
        gone = self.root / f".filling-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """An advisory lock that ends with its holder, however that ends."""
        deadline = time.monotonic() + self.wait_seconds
        with (self.root / f".lock-{digest}").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreError(
                            f"another process has been downloading this package for {self.wait_seconds:g} s"
                        ) from None
                    time.sleep(POLL_SECONDS)
            yield


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
