"""One bucket of S3, or of a store that speaks its protocol. The only module of the core that imports boto3.

Whatever is written for others to see is created exclusively (`If-None-Match: *`): of many writers one wins. A response that was
lost shows as 412 on the retry, so whoever needs to know compares what is there with what was written. Every wait is bounded:
timeouts, and a budget of retries with backoff. Errors say what to do; no key, secret or signature gets into one.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from triform.errors import ConfigurationError, InputChanged, StoreError

P = ParamSpec("P")
R = TypeVar("R")
RANGE_BYTES: Final = 8 << 20
PARALLEL: Final = 8
SINGLE_BYTES: Final = 64 << 20  # larger files are uploaded in pieces
PIECE_BYTES: Final = 16 << 20
DELETE_KEYS: Final = 1000  # of one request
MOST_BYTES: Final = 1 << 30  # of an object that is read whole
MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
DENIED: Final = frozenset({"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
EXISTS: Final = frozenset({"PreconditionFailed", "412"})
AGAIN: Final = frozenset({"ConditionalRequestConflict", "409"})  # S3 asks to try anew
GONE: Final = frozenset({"NoSuchUpload"})
EMPTY: Final = frozenset({"InvalidRange", "416"})
_LOCATION: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", re.DOTALL)


class Budget:
    """Retries that one piece of work may spend in all, with exponential backoff and jitter between them."""

    def __init__(self, retries: int = 8, seconds: float = 120.0, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.retries = retries
        self.deadline = time.monotonic() + seconds
        self._sleep = sleep
        self._spent = 0

    def spend(self, error: Exception) -> None:
        """Waits before the next try; raises `error` itself if there is none left."""
        if isinstance(error, NoCredentialsError):  # waiting brings none
            raise error
        self._spent += 1
        pause = random.uniform(0.5, 1.0) * min(0.1 * 2**self._spent, 5.0)  # noqa: S311 - jitter
        if self._spent > self.retries or time.monotonic() + pause > self.deadline:
            raise error
        self._sleep(pause)


class Found(NamedTuple):
    """An object: `age` is in seconds by the store's own clock."""

    size: int
    etag: str
    age: float


class Tail(NamedTuple):
    """The last bytes of an object, and which object they are of."""

    content: bytes
    size: int
    etag: str


def split(location: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`. Raises `ConfigurationError` for anything else."""
    found = _LOCATION.fullmatch(location)
    if not found:
        raise ConfigurationError(f"{location[:200]!r} is not s3://bucket/prefix")
    return found[1], found[2] or ""


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _storage(operation: Callable[P, R]) -> Callable[P, R]:
    """Turns what boto3 raises into `StoreError`."""

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
            f"S3 denies {action} ({code}): reading needs s3:GetObject and s3:ListBucket on the prefix, publishing, releasing and "
            "writing a run also s3:PutObject and s3:AbortMultipartUpload, removing s3:DeleteObject"
        )
    if code == "NoSuchBucket":
        return StoreError("S3: there is no such bucket; check the location and the region")
    return StoreError(f"S3: {action} failed ({code or 'no code'})")


class Bucket:
    """The operations that Triform needs; each may raise `StoreError`. Safe to use by any number of threads."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, name: str, *, endpoint_url: str | None = None, read_timeout: float = 20.0) -> Bucket:
        """Credentials, region and (where `endpoint_url` is None) AWS_ENDPOINT_URL come from boto3's usual chain. `read_timeout`:
        seconds without a byte after which a request is given up and tried again."""
        config = Config(
            connect_timeout=5,
            read_timeout=read_timeout,
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=PARALLEL * 2,
        )
        return cls(boto3.Session().client("s3", config=config, endpoint_url=endpoint_url), name)

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads of parallel requests."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(PARALLEL, thread_name_prefix="triform-s3")
        return self._pool

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    @_storage
    def find(self, key: str) -> Found | None:
        try:
            head = self.client.head_object(Bucket=self.name, Key=key)
        except ClientError as error:
            if error_code(error) in MISSING:
                return None
            raise
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"]).replace(tzinfo=UTC)
        return Found(head["ContentLength"], head["ETag"], (now - head["LastModified"]).total_seconds())

    @_storage
    def get(self, key: str, most: int = MOST_BYTES) -> bytes | None:
        """A whole object, or None where there is none."""
        budget = Budget()
        while True:
            try:
                answer = self.client.get_object(Bucket=self.name, Key=key)
                if answer["ContentLength"] > most:
                    raise StoreError(f"{self.url(key)} is larger than {most >> 20} MB")
                content: bytes = answer["Body"].read()
                return content
            except ClientError as error:
                if error_code(error) in MISSING:
                    return None
                raise
            except BotoCoreError as error:  # the body was cut: botocore has retried only what comes before it
                budget.spend(error)

    @_storage
    def range(self, key: str, start: int, stop: int, budget: Budget, etag: str | None = None) -> bytes:
        """Bytes [start, stop). Raises `InputChanged` if the object is no longer the one with that ETag."""
        while True:
            match = {"IfMatch": etag} if etag else {}
            try:
                answer = self.client.get_object(Bucket=self.name, Key=key, Range=f"bytes={start}-{stop - 1}", **match)
                content: bytes = answer["Body"].read()
                if len(content) == stop - start:
                    return content
                raise StoreError(f"S3 gave {len(content)} of {stop - start} bytes")
            except ClientError as error:
                self._check_same(error, key, etag)
                if error_code(error) in MISSING | DENIED:
                    raise
                budget.spend(error)
            except (BotoCoreError, StoreError) as error:
                budget.spend(error)

    @_storage
    def tail(self, key: str, length: int, etag: str | None = None) -> Tail | None:
        """The object's last `length` bytes, or all of it if it is shorter; None if there is none. Raises `InputChanged`."""
        budget = Budget()
        while True:
            match = {"IfMatch": etag} if etag else {}
            try:
                answer = self.client.get_object(Bucket=self.name, Key=key, Range=f"bytes=-{length}", **match)
                size = int(answer.get("ContentRange", "/0").rpartition("/")[2]) or answer["ContentLength"]
                return Tail(answer["Body"].read(), size, answer["ETag"])
            except ClientError as error:
                self._check_same(error, key, etag)
                if error_code(error) in MISSING:
                    return None
                if error_code(error) not in EMPTY:
                    raise
                found = self.find(key)
                return Tail(b"", 0, found.etag if found else "")
            except BotoCoreError as error:
                budget.spend(error)

    def _check_same(self, error: ClientError, key: str, etag: str | None) -> None:
        if etag and error_code(error) in EXISTS | MISSING:
            raise InputChanged(f"{self.url(key)} is not the file that was planned; start the job anew for its present content")

    @_storage
    def create(self, key: str, content: bytes) -> bool:
        """Creates the object exclusively; False if the key is taken (perhaps by us, if a response was lost)."""
        return self._exclusively(lambda: self.client.put_object(Bucket=self.name, Key=key, Body=content, IfNoneMatch="*"))

    @_storage
    def create_from(self, file: Path, key: str) -> bool:
        """The same with a file's content, in pieces where it is large; an upload that fails is aborted."""
        if file.stat().st_size <= SINGLE_BYTES:
            return self._exclusively(lambda: self._put_file(file, key))
        return self._in_pieces(file, key, Budget())

    def _in_pieces(self, file: Path, key: str, budget: Budget) -> bool:
        if self.find(key) is not None:  # the pieces need not travel; who wins is decided at the end
            return False
        upload = self.client.create_multipart_upload(Bucket=self.name, Key=key, ChecksumAlgorithm="CRC32")["UploadId"]
        name = {"Bucket": self.name, "Key": key, "UploadId": upload}
        try:
            pieces = {"Parts": list(self.pool.map(lambda n: self._piece(file, n, name), range(_pieces(file))))}
            self.client.complete_multipart_upload(**name, MultipartUpload=pieces, IfNoneMatch="*")
        except ClientError as error:
            self._abort(name)
            if error_code(error) in EXISTS:
                return False
            if error_code(error) not in AGAIN | GONE:
                raise
            budget.spend(error)  # an upload whose end met a conflict must be made anew; one that is gone may have ended
            return self._in_pieces(file, key, budget)
        except BaseException:
            self._abort(name)
            raise
        return True

    def _put_file(self, file: Path, key: str) -> None:
        with file.open("rb") as body:
            self.client.put_object(Bucket=self.name, Key=key, Body=body, IfNoneMatch="*")

    def _piece(self, file: Path, number: int, name: dict[str, str]) -> dict[str, Any]:
        with file.open("rb") as source:
            source.seek(number * PIECE_BYTES)
            content = source.read(PIECE_BYTES)
        done = self.client.upload_part(**name, PartNumber=number + 1, Body=content, ChecksumAlgorithm="CRC32")
        return {"PartNumber": number + 1, "ETag": done["ETag"]} | {k: v for k, v in done.items() if k == "ChecksumCRC32"}

    def _exclusively(self, write: Callable[[], Any]) -> bool:
        budget = Budget()
        while True:
            try:
                write()
            except ClientError as error:
                if error_code(error) in EXISTS:
                    return False
                if error_code(error) not in AGAIN:
                    raise
                budget.spend(error)
            else:
                return True

    def _abort(self, name: dict[str, str]) -> None:
        try:
            self.client.abort_multipart_upload(**name)
        except (ClientError, BotoCoreError):  # it is gone, or `abort_uploads` finds it later
            return

    @_storage
    def abort_uploads(self, prefix: str, *, older_than: float = 0.0) -> int:
        """Ends the uploads in pieces below the prefix that were begun over `older_than` seconds ago; returns how many."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix)
        before = datetime.now(UTC) - timedelta(seconds=older_than)
        found = [up for page in pages for up in page.get("Uploads", ()) if up["Initiated"] <= before]
        for up in found:
            self._abort({"Bucket": self.name, "Key": up["Key"], "UploadId": up["UploadId"]})
        return len(found)

    @_storage
    def put(self, key: str, content: bytes) -> None:
        """Writes the object, whatever is there."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    @_storage
    def upload(self, file: Path, key: str) -> None:
        """The same with a file's content."""
        self.client.upload_file(str(file), self.name, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"})

    @_storage
    def folders(self, prefix: str) -> list[str]:
        """The names between the prefix, which ends with "/" or is empty, and the next "/"."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix, Delimiter="/")
        return [found["Prefix"][len(prefix) : -1] for page in pages for found in page.get("CommonPrefixes", ())]

    @_storage
    def has_keys(self, prefix: str) -> bool:
        """Whether there is any key below the prefix."""
        return bool(self.client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    @_storage
    def keys(self, prefix: str) -> list[tuple[str, float]]:
        """Every key below the prefix, in order, with its age in seconds."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        found = [some for page in pages for some in page.get("Contents", ())]
        now = datetime.now(UTC)
        return [(some["Key"], (now - some["LastModified"]).total_seconds()) for some in found]

    @_storage
    def delete(self, keys: Iterable[str]) -> None:
        """Removes the objects; a key that names none is no error."""
        names = [{"Key": key} for key in keys]
        for start in range(0, len(names), DELETE_KEYS):
            some = {"Objects": names[start : start + DELETE_KEYS], "Quiet": True}
            if failed := self.client.delete_objects(Bucket=self.name, Delete=some).get("Errors"):
                code = failed[0].get("Code")
                why = "S3 denies it: removing needs s3:DeleteObject on the prefix" if code in DENIED else "tried several times"
                raise StoreError(f"{self.url(failed[0].get('Key', ''))} could not be removed ({code}); {why}")


def _pieces(file: Path) -> int:
    return -(-file.stat().st_size // PIECE_BYTES)
