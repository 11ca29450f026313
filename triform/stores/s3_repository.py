"""A model repository on S3.

<prefix>/<model>/blobs/<sha256>            every file of every version, once
<prefix>/<model>/<version>/manifest.json   names the blobs; created last and exclusively: with it the version is there
<prefix>/<model>/releases/000017.json      created exclusively
<prefix>/<model>/claims/, pruned/          notes, created exclusively

manifest -> blobs in parallel ranges, hashed while they stream in -> cache.py -> ModelPackage

A blob may be shared by versions and is found by whoever publishes its content again, so one that no manifest names cannot just
be removed. A publisher uploads a blob anew that is half as old as an abandoned one, and looks once more for all of them when
its manifest stands; a prune looks at a blob's age right before it removes it. They can still miss one another if a whole
publication, from this upload to that last look, passes between the prune's look and its removal: then the version's download
fails for want of a blob, and publishing its files as the next version heals both.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from triform.errors import ConfigurationError, DigestMismatch, PackageError, VersionExists, VersionNotFound
from triform.package import FILE, MANIFEST, MAX_MANIFEST_BYTES, NAME, FileEntry, Manifest, ModelPackage, Names, named_in
from triform.repository import ABANDONED_SECONDS, VERSION, Leftover, Note, Stored, check_name
from triform.stores.cache import PackageCache
from triform.stores.files import last_number
from triform.stores.s3 import PARALLEL, RANGE_BYTES, Bucket, Budget, split

LOCATION: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[A-Za-z0-9!_.*'()/-]*)?")


class S3Repository:
    """Implements `ModelRepository` on a prefix of a bucket. Use `S3Repository.open`."""

    def __init__(self, bucket: Bucket, prefix: str, cache: PackageCache) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.cache = cache
        self.location = bucket.url(self.prefix).rstrip("/")

    @classmethod
    def open(
        cls, location: str, cache: PackageCache, *, endpoint_url: str | None = None, read_timeout: float = 20.0
    ) -> S3Repository:
        """The repository at `s3://bucket/prefix`; see `Bucket.open`."""
        if ".." in location or not LOCATION.fullmatch(location):
            raise ConfigurationError(f"repository: {location[:200]!r} is not s3://bucket/prefix")
        name, prefix = split(location)
        return cls(Bucket.open(name, endpoint_url=endpoint_url, read_timeout=read_timeout), prefix, cache)

    def models(self) -> list[str]:
        return sorted(name for name in self.bucket.folders(self.prefix) if NAME.fullmatch(name) and self.versions(name))

    def versions(self, model: str) -> list[int]:
        folders = self.bucket.folders(self._key(model, ""))
        spent = self.pruned(model) if "pruned" in folders else []
        return sorted({int(name) for name in folders if VERSION.fullmatch(name)} - set(spent))

    def package(self, model: str, version: int) -> ModelPackage:
        content = self.bucket.get(self._manifest(model, version), MAX_MANIFEST_BYTES)
        if content is None:
            pruned = " any more: it was pruned" if version in self.pruned(model) else ""
            raise VersionNotFound(f"'{model}' has no version {version}{pruned}")
        try:
            manifest = msgspec.json.decode(content, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PackageError(
                f"{MANIFEST} of {model}/{version} is not a manifest of this version of Triform: {error}"
            ) from error
        if manifest.sealed().digest != manifest.digest or manifest.ref != f"{model}/{version}":
            raise DigestMismatch(
                f"{MANIFEST} of {model}/{version} was altered: its content does not match its digest or its place"
            )
        folder = self.cache.folder(manifest.digest, lambda staging: self._download(model, manifest, content, staging))
        return ModelPackage.open(folder)

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        check_name(model)
        with tempfile.TemporaryDirectory(prefix="triform-staging-") as folder:
            yield Path(folder)

    def publish(self, staged: Path, model: str, version: int) -> None:
        content = (staged / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
        self._check_unspent(model, version)
        for name, entry in manifest.files.items():
            self._upload(staged / name, self._blob(model, entry), entry)
        key = self._manifest(model, version)
        if not self.bucket.create(key, content) and self.bucket.get(key, MAX_MANIFEST_BYTES) != content:
            raise VersionExists(f"'{model}' already has a version {version}, and versions never change: publish the next")
        for name, entry in manifest.files.items():
            self._upload(staged / name, self._blob(model, entry), entry)
        self._check_unspent(model, version)  # if it was pruned since, nobody sees this one, and the next prune removes it

    def _check_unspent(self, model: str, version: int) -> None:
        if version in self.pruned(model):
            raise VersionExists(f"version {version} of '{model}' was pruned, and no number is used twice: publish the next")

    def latest_revision(self, model: str) -> int:
        return last_number(lambda revision: self.bucket.find(self._release(model, revision)) is not None)

    def read_release(self, model: str, revision: int) -> bytes | None:
        return self.bucket.get(self._release(model, revision), MAX_MANIFEST_BYTES)

    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        return self.bucket.create(self._release(model, revision), content)

    def pruned(self, model: str) -> list[int]:
        below = self._key(model, "pruned/")
        numbers = (key[len(below) :].removesuffix(".json") for key, _ in self.bucket.keys(below))
        return sorted(int(number) for number in numbers if VERSION.fullmatch(number))

    def read_note(self, model: str, name: str) -> Note | None:
        found = self.bucket.find(self._key(model, name))
        content = self.bucket.get(self._key(model, name), MAX_MANIFEST_BYTES) if found else None
        return Note(content, found.age) if found and content is not None else None

    def create_note(self, model: str, name: str, content: bytes) -> bool:
        return self.bucket.create(self._key(model, name), content)

    def stored(self, model: str) -> list[Stored]:
        numbers = sorted(int(name) for name in self.bucket.folders(self._key(model, "")) if VERSION.fullmatch(name))
        return [found for found in self.bucket.pool.map(lambda number: self._stored(model, number), numbers) if found]

    def _stored(self, model: str, version: int) -> Stored | None:
        found = self.bucket.find(self._manifest(model, version))
        if found is None:
            return None
        names = self._names(model, version)
        return Stored(version, found.age, found.size, names.digest if names else "")

    def _names(self, model: str, version: int) -> Names | None:
        """What the version's manifest names: nothing where there is none; None where it cannot be read."""
        content = self.bucket.get(self._manifest(model, version), MAX_MANIFEST_BYTES)
        return named_in(content) if content is not None else Names("", {})

    def remove(self, model: str, version: int) -> None:
        """The manifest: with it the version is gone. Its blobs are the next `sweep`'s."""
        self.bucket.delete([self._manifest(model, version)])

    def sweep(self, model: str, *, older_than: float, without: Collection[int] = (), dry_run: bool = False) -> list[Leftover]:
        """Removes no blob at all while some manifest cannot be read: it may name any of them."""
        blobs = [key for key, _ in self.bucket.keys(self._key(model, "blobs/"))]  # before the manifests, which come after blobs
        versions = [int(name) for name in self.bucket.folders(self._key(model, "")) if VERSION.fullmatch(name)]
        named: set[str] = set()
        for names in self.bucket.pool.map(lambda v: self._names(model, v), (v for v in versions if v not in without)):
            if names is None:
                return []
            named |= {self._blob(model, entry) for entry in names.files.values()}
        unnamed = [key for key in blobs if key not in named]
        swept = self.bucket.pool.map(lambda key: self._sweep(key, older_than, dry_run=dry_run), unnamed)
        place = len(self._key(model, ""))
        return [Leftover(key[place:], size) for key, size in zip(unnamed, swept, strict=True) if size is not None]

    def _sweep(self, key: str, older_than: float, *, dry_run: bool) -> int | None:
        """The size of the blob if it is old enough to go."""
        found = self.bucket.find(key)
        if found is None or found.age <= older_than:
            return None
        if not dry_run:
            self.bucket.delete([key])
        return found.size

    def _key(self, model: str, rest: str) -> str:
        return f"{self.prefix}{check_name(model)}/{rest}"

    def _manifest(self, model: str, version: int) -> str:
        return self._key(model, f"{version}/{MANIFEST}")

    def _blob(self, model: str, entry: FileEntry) -> str:
        return self._key(model, f"blobs/{entry.sha256}")

    def _release(self, model: str, revision: int) -> str:
        return self._key(model, f"releases/{revision:06d}.json")

    def _upload(self, file: Path, key: str, entry: FileEntry) -> None:
        """A blob; its name is its content, so one that is there with the right size needs no second upload, but for its age."""
        found = self.bucket.find(key)
        if found is None or found.size != entry.size or found.age > ABANDONED_SECONDS / 2:
            self.bucket.upload(file, key)

    def _download(self, model: str, manifest: Manifest, content: bytes, staging: Path) -> None:
        """All files of a version into the folder, each hashed while it streams in."""
        budget = Budget()
        for name, entry in manifest.files.items():
            if not all(FILE.fullmatch(part) for part in name.split("/")):
                raise DigestMismatch(f"{manifest.ref} lists a file with an unsafe name: {name[:100]!r}")
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            self._download_file(self._blob(model, entry), staging / name, entry, budget)
        (staging / MANIFEST).write_bytes(content)

    def _download_file(self, key: str, target: Path, entry: FileEntry, budget: Budget) -> None:
        while True:
            digest = hashlib.sha256()
            with target.open("wb") as file:
                for chunk in self._ranges(key, entry.size, budget):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() == entry.sha256:
                return
            budget.spend(DigestMismatch(f"{target.name} came with another sha256 than the manifest's, again and again"))

    def _ranges(self, key: str, size: int, budget: Budget) -> Iterator[bytes]:
        """The object's bytes in order, fetched PARALLEL ranges ahead."""
        starts = deque(range(0, size, RANGE_BYTES))
        pending: deque[Future[bytes]] = deque()
        while starts or pending:
            while starts and len(pending) < PARALLEL:
                start = starts.popleft()
                stop = min(start + RANGE_BYTES, size)
                pending.append(self.bucket.pool.submit(self.bucket.range, key, start, stop, budget))
            yield pending.popleft().result()
