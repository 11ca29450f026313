"""A prefix of a bucket as a place to write: `FileStore` on S3. See s3.py for what exclusive means."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, TextIO, cast

from triform.package import FileEntry
from triform.stores.s3 import RANGE_BYTES, Bucket, split
from triform.stores.s3_file import S3File

_SCRATCH: Final = "triform-scratch-"


class S3Files:
    """Implements `FileStore`. Use `S3Files.at`."""

    renames = False

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.location = bucket.url(self.prefix).rstrip("/")
        self._scratch: Path | None = None
        self._held: TextIO | None = None

    @classmethod
    def at(cls, location: str, *, endpoint_url: str | None = None, read_timeout: float = 20.0) -> S3Files:
        """The files below `s3://bucket/prefix`; see `Bucket.open`."""
        name, prefix = split(location)
        return cls(Bucket.open(name, endpoint_url=endpoint_url, read_timeout=read_timeout), prefix)

    def create(self, name: str, content: bytes) -> bool:
        return self.bucket.create(self.prefix + name, content)

    def replace(self, name: str, content: bytes) -> None:
        self.bucket.put(self.prefix + name, content)

    def read(self, name: str) -> bytes | None:
        return self.bucket.get(self.prefix + name)

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, S3File(self.bucket, self.prefix + name))

    def exists(self, name: str) -> bool:
        return self.bucket.find(self.prefix + name) is not None

    def age(self, name: str) -> float | None:
        found = self.bucket.find(self.prefix + name)
        return found.age if found else None

    def names(self, folder: str) -> list[str]:
        below = f"{self.prefix}{folder}/"
        found = (key[len(below) :] for key, _ in self.bucket.keys(below))
        return [name for name in found if name and "/" not in name and not name.startswith(("_", "."))]

    def entry(self, name: str) -> FileEntry:
        digest = hashlib.sha256()
        with S3File(self.bucket, self.prefix + name) as file:
            starts = range(0, file.size, RANGE_BYTES)
            file.expect([[(start, min(start + RANGE_BYTES, file.size)) for start in starts]])
            while chunk := file.read(RANGE_BYTES):
                digest.update(chunk)
            return FileEntry(sha256=digest.hexdigest(), size=file.size)

    def make_folder(self, name: str) -> None:
        """Nothing to do: a bucket has no folders."""

    def has_folder(self, name: str) -> bool:
        raise NotImplementedError("a bucket has no folders: ask `renames` first")

    def rename_folder(self, before: str, after: str) -> None:
        raise NotImplementedError("a bucket has no folders: ask `renames` first")

    def scratch(self, folder: str) -> Path:  # noqa: ARG002 - the protocol's
        """A folder in the system's temporary one; those of processes that were killed are removed on the way."""
        if self._scratch is None:
            _remove_abandoned(Path(tempfile.gettempdir()))
            self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
            self._held = (self._scratch / ".held").open("w")
            fcntl.flock(self._held, fcntl.LOCK_EX)  # ends with this process, however that ends
            atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch

    def stage(self, file: Path, name: str) -> None:
        self.bucket.create_from(file, self.prefix + name)

    def place(self, file: Path, name: str) -> bool:
        return self.bucket.create_from(file, self.prefix + name)

    def copy(self, source: str, name: str) -> bool:
        """Through the local disk: S3's own copy is not exclusive."""
        with self.open(source) as there, tempfile.NamedTemporaryFile(dir=self.scratch("")) as here:
            shutil.copyfileobj(there, here, RANGE_BYTES)
            here.flush()
            return self.bucket.create_from(Path(here.name), self.prefix + name)

    def remove(self, name: str) -> None:
        self.bucket.delete([self.prefix + name])

    def remove_folder(self, name: str) -> None:
        below = f"{self.prefix}{name}/"
        self.bucket.delete(key for key, _ in self.bucket.keys(below))

    def abort_uploads(self, folder: str, *, older_than: float = 0.0) -> None:
        self.bucket.abort_uploads(f"{self.prefix}{folder}/", older_than=older_than)


def _remove_abandoned(root: Path) -> None:
    """Those that no process holds any more, wherever it ran."""
    for held in root.glob(f"{_SCRATCH}*/.held"):
        with suppress(OSError), held.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
