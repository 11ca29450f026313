"""Inputs and outputs that are too large for an event, by reference: the way past Lambda's 6 MB.

    x-triform-input: s3://bucket/in/rows.bin    -> the object is the request's body
    x-triform-output: s3://bucket/out/1.bin     -> the answer's body is written there, created exclusively; the answer names it

A function reads and writes with its own role, so callers may name only what lies below TRIFORM_REFERENCE_PREFIXES. A prefix may
also be of https, for presigned URLs: the host is then the configured one, and no redirect is followed. However a store stalls or
trickles, the caller is answered at the deadline. boto3 is imported by the first reference to S3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from triform.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InputChanged,
    NotFound,
    OutputExists,
    PayloadTooLarge,
    ReferenceNotAllowed,
    StoreError,
    TriformError,
)

if TYPE_CHECKING:
    from triform.stores.s3 import Bucket

READ_TIMEOUT: Final = 5.0  # seconds without a byte
LONGEST: Final = 2048  # characters of a reference
SCHEMES: Final = ("s3://", "https://", "http://127.0.0.1:")  # the last one for a store on this machine
NO_DEADLINE: Final = 900.0  # seconds: the longest that a function runs
BUSY: Final = frozenset({408, 409, 425, 429})  # of a store that asks to come again
GONE: Final = frozenset({404, 410})
LATE: Final = "the deadline passed while a reference was read or written"
T = TypeVar("T")


class References:
    """What is allowed, and the connections there are. `prefixes`: where one ends without "/", it is added."""

    def __init__(self, prefixes: Sequence[str], most: int) -> None:
        self.prefixes = tuple(prefix if prefix.endswith("/") else f"{prefix}/" for prefix in prefixes)
        self.most = most
        self._buckets: dict[str, Bucket] = {}
        for prefix in self.prefixes:
            if not prefix.startswith(SCHEMES) or ".." in prefix or "@" in prefix or prefix.count("/") < 3:
                raise ConfigurationError(f"reference_prefixes: {prefix[:200]!r} is neither s3://bucket/ nor https://host/")

    def forget(self) -> None:
        """Drops the connections: those of a snapshot are not this environment's."""
        self._buckets.clear()

    def check(self, location: str) -> None:
        """Raises `ReferenceNotAllowed` for what callers may not name."""
        where = location.partition("?")[0] if location.startswith("http") else location
        plain = location.isprintable() and location.isascii() and len(location) <= LONGEST
        odd = any(part in where for part in ("..", "\\", "@", "#", "%2e", "%2E", "%5c", "%5C")) or " " in location
        if not plain or odd or not any(where.startswith(p) and where != p for p in self.prefixes):
            raise ReferenceNotAllowed("the reference is not below one of TRIFORM_REFERENCE_PREFIXES")

    def read(self, location: str, deadline: float | None) -> bytes:
        """The bytes that it names.

        Raises `ReferenceNotAllowed`, `NotFound`, `PayloadTooLarge`, `DeadlineExceeded`, `StoreError`.
        """
        self.check(location)
        read = self._read_object if location.startswith("s3://") else self._https
        return _in_time(partial(read, location, deadline), deadline)

    def write(self, location: str, content: bytes, deadline: float | None) -> None:
        """Writes them; what stands there already may only be the same. Raises as `read`, and `OutputExists`.

        What was not written by the deadline may still be, or not.
        """
        self.check(location)
        if location.startswith("s3://"):
            _in_time(partial(self._write_object, location, content), deadline)
        else:
            _in_time(partial(self._https, location, deadline, content), deadline)

    def _write_object(self, location: str, content: bytes) -> None:
        bucket, key = self._bucket(location)
        if not bucket.create(key, content):
            found = bucket.find(key)
            if found is None or found.size != len(content) or bucket.get(key, self.most) != content:
                raise OutputExists("another answer stands where this one was to be written")

    def _read_object(self, location: str, deadline: float | None) -> bytes:
        from triform.stores.s3 import RANGE_BYTES, Budget

        bucket, key = self._bucket(location)
        found = bucket.find(key)
        if found is None:
            raise NotFound("the reference names no object")
        self._check_size(found.size)
        budget = Budget(seconds=_left(deadline))

        def part(start: int) -> bytes:
            _left(deadline)
            return bucket.range(key, start, min(start + RANGE_BYTES, found.size), budget, found.etag)

        try:
            return b"".join(bucket.pool.map(part, range(0, found.size, RANGE_BYTES)))
        except InputChanged:
            raise StoreError("the object that the reference names was replaced while it was read") from None

    def _bucket(self, location: str) -> tuple[Bucket, str]:
        try:
            from triform.stores import s3
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"a reference to S3 needs {error.name}: add it to the function") from error
        name, key = s3.split(location)
        if name not in self._buckets:
            self._buckets[name] = s3.Bucket.open(name, read_timeout=READ_TIMEOUT)
        return self._buckets[name], key

    def _https(self, location: str, deadline: float | None, content: bytes | None = None) -> bytes:
        """GET, or PUT of the content; a redirect is refused like any other answer that is none."""
        import http.client
        from urllib.parse import urlsplit

        url = urlsplit(location)
        connect = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = connect(url.netloc, timeout=min(READ_TIMEOUT, _left(deadline)))
        try:
            connection.request("GET" if content is None else "PUT", f"{url.path}?{url.query}", body=content)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise _refusal(answer.status)
            return self._drained(answer, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise StoreError(f"the reference's store does not answer ({type(error).__name__})") from None
        finally:
            connection.close()

    def _drained(self, answer: Any, deadline: float | None) -> bytes:
        parts, size = [], 0
        while chunk := answer.read1(1 << 20):
            size += len(chunk)
            self._check_size(size)
            _left(deadline)
            parts.append(chunk)
        if answer.length:
            raise StoreError(f"the reference's store ended {answer.length} bytes too early")
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self.most:
            raise PayloadTooLarge(f"the reference names {size} bytes or more, {self.most} are allowed")


def _refusal(status: int) -> TriformError:
    """What a store that is asked by URL says, as the caller's error where it is one."""
    if status in GONE:
        return NotFound(f"the reference names nothing that is there ({status})")
    if status == 412:
        return OutputExists("another answer stands where this one was to be written")
    if status in BUSY or status >= 500:
        return StoreError(f"the reference's store answers {status}")
    if status < 400:
        return ReferenceNotAllowed(f"the reference leads elsewhere ({status}), and redirects are not followed")
    return ReferenceNotAllowed(f"the reference's store refuses it ({status}): has the URL expired, or is it for another use?")


def _in_time(work: Callable[[], T], deadline: float | None) -> T:
    """What the work returns. It has its own thread, which is left alone when the time is up: not every wait can be cut short."""
    from concurrent.futures import ThreadPoolExecutor

    left, pool = _left(deadline), ThreadPoolExecutor(1, thread_name_prefix="triform-reference")
    try:
        return pool.submit(work).result(left)
    except TimeoutError:
        raise DeadlineExceeded(LATE) from None
    finally:
        pool.shutdown(wait=False)


def _left(deadline: float | None) -> float:
    """Seconds until the deadline. Raises `DeadlineExceeded` where there are none."""
    left = NO_DEADLINE if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(LATE)
    return left
