"""A model repository on S3. The only module of the core that imports boto3.

    <prefix>/<model>/blobs/<sha256>            every file of every version, once
    <prefix>/<model>/<version>/manifest.json   names the blobs; created last and exclusively: with it the version is there
    <prefix>/<model>/releases/000017.json      created exclusively

    manifest -> blobs in parallel ranges, hashed while they stream in -> cache.py -> ModelPackage

Exclusive means `If-None-Match: *`. A response that was lost shows as 412 on the retry, so whoever needs to know compares
what is there with what was written. Every wait is bounded: timeouts, and a budget of retries for a whole package.
"""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import boto3
import msgspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from triform.errors import ConfigurationError, DigestMismatch, PackageError, StoreError, VersionExists, VersionNotFound
from triform.package import FILE, MANIFEST, MAX_MANIFEST_BYTES, NAME, FileEntry, Manifest, ModelPackage
from triform.repository import VERSION, check_name
from triform.stores.cache import PackageCache

P = ParamSpec("P")
R = TypeVar("R")
RANGE_BYTES: Final = 8 << 20
PARALLEL: Final = 8
MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
DENIED: Final = frozenset({"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
EXISTS: Final = frozenset({"PreconditionFailed", "412"})
AGAIN: Final = frozenset({"ConditionalRequestConflict", "409"})  # S3 asks to try anew
_LOCATION: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9!_.*'()/-]*))?")


class Budget:
    """Retries that the fetch of one package may spend in all, with exponential backoff and jitter between them."""

    def __init__(self, retries: int = 8, seconds: float = 120.0, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.retries = retries
        self.deadline = time.monotonic() + seconds
        self._sleep = sleep
        self._spent = 0

    def spend(self, error: Exception) -> None:
        """Waits before the next try; raises `error` itself if there is none left."""
        self._spent += 1
        pause = random.uniform(0.5, 1.0) * min(0.1 * 2**self._spent, 5.0)  # noqa: S311 - jitter
        if self._spent > self.retries or time.monotonic() + pause > self.deadline:
            raise error
        self._sleep(pause)


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _storage(operation: Callable[P, R]) -> Callable[P, R]:
    """Turns what boto3 raises into `StoreError` that says what to do; no key, secret or signature gets into it."""

    @wraps(operation)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return operation(*args, **kwargs)
        except ClientError as error:
            raise _explained(error) from error
        except NoCredentialsError as error:
            raise StoreError("S3: no credentials; give the process a role, or set AWS_ACCESS_KEY_ID or AWS_PROFILE") from error
        except BotoCoreError as error:  # connections, timeouts, cut bodies
            raise StoreError(f"S3 does not answer ({type(error).__name__}); tried several times") from error

    return guarded


def _explained(error: ClientError) -> StoreError:
    code, action = error_code(error), error.operation_name
    if code in DENIED:
        return StoreError(
            f"S3 denies {action} ({code}): the repository needs s3:GetObject and s3:ListBucket on the prefix, publishing and "
            "releasing also s3:PutObject"
        )
    if code == "NoSuchBucket":
        return StoreError("S3: there is no such bucket; check the repository's location and the region")
    return StoreError(f"S3: {action} failed ({code or 'no code'})")


class S3Repository:
    """Implements `ModelRepository` on a prefix of a bucket. Use `S3Repository.open`."""

    def __init__(self, client: Any, bucket: str, prefix: str, cache: PackageCache) -> None:
        self.client = client
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.cache = cache
        self.location = f"s3://{bucket}/{self.prefix}".rstrip("/")

    @classmethod
    def open(
        cls, location: str, cache: PackageCache, *, endpoint_url: str | None = None, read_timeout: float = 20.0
    ) -> S3Repository:
        """The repository at `s3://bucket/prefix`.

        Credentials, region and (where `endpoint_url` is None) AWS_ENDPOINT_URL come from boto3's usual chain. `read_timeout`:
        seconds without a byte after which a request is given up and tried again.
        """
        found = _LOCATION.fullmatch(location)
        if not found or ".." in location:
            raise ConfigurationError(f"repository: {location[:200]!r} is not s3://bucket/prefix")
        config = Config(
            connect_timeout=5,
            read_timeout=read_timeout,
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=PARALLEL * 2,
        )
        client = boto3.Session().client("s3", config=config, endpoint_url=endpoint_url)
        return cls(client, found[1], found[2] or "", cache)

    @_storage
    def models(self) -> list[str]:
        names = (p.removeprefix(self.prefix).rstrip("/") for p in self._folders(self.prefix))
        return sorted(name for name in names if NAME.fullmatch(name) and self.versions(name))

    @_storage
    def versions(self, model: str) -> list[int]:
        folder = self._key(model, "")
        names = (p.removeprefix(folder).rstrip("/") for p in self._folders(folder))
        return sorted(int(name) for name in names if VERSION.fullmatch(name))

    @_storage
    def package(self, model: str, version: int) -> ModelPackage:
        content = self._get(self._key(model, f"{version}/{MANIFEST}"), MAX_MANIFEST_BYTES)
        if content is None:
            raise VersionNotFound(f"'{model}' has no version {version}")
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

    @_storage
    def publish(self, staged: Path, model: str, version: int) -> None:
        content = (staged / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
        for name, entry in manifest.files.items():
            self._upload(staged / name, self._blob(model, entry), entry)
        key = self._key(model, f"{version}/{MANIFEST}")
        if not self._create(key, content) and self._get(key, MAX_MANIFEST_BYTES) != content:
            raise VersionExists(f"'{model}' already has a version {version}, and versions never change: publish the next")

    @_storage
    def latest_revision(self, model: str) -> int:
        """Revisions have no gaps, so a search by doubling finds the last in few requests, however long the log is."""
        low, high = 0, 1
        while self._exists(self._release(model, high)):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(self._release(model, middle)) else (low, middle)
        return low

    @_storage
    def read_release(self, model: str, revision: int) -> bytes | None:
        return self._get(self._release(model, revision), MAX_MANIFEST_BYTES)

    @_storage
    def create_release(self, model: str, revision: int, content: bytes) -> bool:
        return self._create(self._release(model, revision), content)

    def _key(self, model: str, rest: str) -> str:
        return f"{self.prefix}{check_name(model)}/{rest}"

    def _blob(self, model: str, entry: FileEntry) -> str:
        return self._key(model, f"blobs/{entry.sha256}")

    def _release(self, model: str, revision: int) -> str:
        return self._key(model, f"releases/{revision:06d}.json")

    def _folders(self, prefix: str) -> Iterator[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            yield from (found["Prefix"] for found in page.get("CommonPrefixes", ()))

    def _exists(self, key: str) -> bool:
        try:
            self.client.head_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if error_code(error) in MISSING:
                return False
            raise
        return True

    def _get(self, key: str, most: int) -> bytes | None:
        """A small object, or None where there is none."""
        budget = Budget()
        while True:
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=key)
                if answer["ContentLength"] > most:
                    raise PackageError(f"{key.rsplit('/', 1)[-1]} is larger than {most >> 20} MB")
                content: bytes = answer["Body"].read()
                return content
            except ClientError as error:
                if error_code(error) in MISSING:
                    return None
                raise
            except BotoCoreError as error:  # the body was cut: botocore has retried only what comes before it
                budget.spend(error)

    def _create(self, key: str, content: bytes) -> bool:
        """Creates the object exclusively; False if the key is taken (perhaps by us, if a response was lost)."""
        budget = Budget()
        while True:
            try:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=content, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) in EXISTS:
                    return False
                if error_code(error) not in AGAIN:
                    raise
                budget.spend(error)
            else:
                return True

    def _upload(self, file: Path, key: str, entry: FileEntry) -> None:
        """A blob; its name is its content, so one that is there with the right size needs no second upload."""
        try:
            if self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"] == entry.size:
                return
        except ClientError as error:
            if error_code(error) not in MISSING:
                raise
        self.client.upload_file(str(file), self.bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"})

    def _download(self, model: str, manifest: Manifest, content: bytes, staging: Path) -> None:
        """All files of a version into the folder, each hashed while it streams in."""
        budget = Budget()
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="triform-s3") as pool:
            for name, entry in manifest.files.items():
                if not all(FILE.fullmatch(part) for part in name.split("/")):
                    raise DigestMismatch(f"{manifest.ref} lists a file with an unsafe name: {name[:100]!r}")
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                self._download_file(pool, self._blob(model, entry), staging / name, entry, budget)
        (staging / MANIFEST).write_bytes(content)

    def _download_file(self, pool: ThreadPoolExecutor, key: str, target: Path, entry: FileEntry, budget: Budget) -> None:
        while True:
            digest = hashlib.sha256()
            with target.open("wb") as file:
                for chunk in self._ranges(pool, key, entry.size, budget):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() == entry.sha256:
                return
            budget.spend(DigestMismatch(f"{target.name} came with another sha256 than the manifest's, again and again"))

    def _ranges(self, pool: ThreadPoolExecutor, key: str, size: int, budget: Budget) -> Iterator[bytes]:
        """The object's bytes in order, fetched PARALLEL ranges ahead."""
        starts = deque(range(0, size, RANGE_BYTES))
        pending: deque[Future[bytes]] = deque()
        while starts or pending:
            while starts and len(pending) < PARALLEL:
                start = starts.popleft()
                pending.append(pool.submit(self._range, key, start, min(start + RANGE_BYTES, size), budget))
            yield pending.popleft().result()

    def _range(self, key: str, start: int, stop: int, budget: Budget) -> bytes:
        while True:
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
                content: bytes = answer["Body"].read()
                if len(content) == stop - start:
                    return content
                raise StoreError(f"S3 gave {len(content)} of {stop - start} bytes")
            except ClientError as error:
                if error_code(error) in MISSING | DENIED:
                    raise
                budget.spend(error)
            except (BotoCoreError, StoreError) as error:
                budget.spend(error)
