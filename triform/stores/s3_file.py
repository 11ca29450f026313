"""One object of a bucket as a file that is read at any place: what pyarrow reads Parquet from.

    open -> the last bytes (a Parquet footer is there), and with them the object's ETag
    expect(streams) -> the blocks that will be read, in order, a stream a column -> each fetched before it is asked for

Every request carries the ETag, so that all bytes are of one object: one that is replaced meanwhile is an `InputChanged`.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple

from triform.stores.s3 import Bucket, Budget

TAIL_BYTES: Final = 64 << 10


class Block(NamedTuple):
    """Bytes [start, stop); `after` is the next block of its stream."""

    start: int
    stop: int
    after: int | None


class S3File(io.RawIOBase):
    """The object, read only. `etag`: of the version that is wanted; None: the one that is there.

    Raises `FileNotFoundError`, `InputChanged`, `StoreError`; reading may raise the latter two.
    """

    def __init__(self, bucket: Bucket, key: str, etag: str | None = None) -> None:
        super().__init__()
        self._bucket, self._key = bucket, key
        tail = bucket.tail(key, TAIL_BYTES, etag)
        if tail is None:
            raise FileNotFoundError(f"there is no {bucket.url(key)}")
        self._tail, self.size, self.etag = tail
        self._at = 0
        self._blocks: list[Block] = []
        self._starts: list[int] = []
        self._pending: dict[int, Future[bytes]] = {}

    def expect(self, streams: Iterable[Sequence[tuple[int, int]]]) -> None:
        """What will be read: each stream's blocks as (start, stop) in order. Its first is fetched now, and later always the one
        after the one that is read, so that at most two of a stream are held."""
        self._forget()
        blocks: list[Block] = []
        firsts: list[int] = []
        for stream in streams:
            for (start, stop), after in zip(stream, [*stream[1:], None], strict=False):
                blocks.append(Block(start, stop, after[0] if after else None))
            firsts += [start for start, _ in stream[:1]]
        self._blocks = sorted(blocks)
        self._starts = [block.start for block in self._blocks]
        for start in firsts:
            self._fetch(self._block(start))

    def _block(self, at: int) -> Block | None:
        """The expected block that holds this byte."""
        i = bisect.bisect_right(self._starts, at) - 1
        return self._blocks[i] if i >= 0 and at < self._blocks[i].stop else None

    def _fetch(self, block: Block | None) -> None:
        if block is not None and block.start not in self._pending:
            fetch = self._bucket.pool.submit(self._bucket.range, self._key, block.start, block.stop, Budget(), self.etag)
            self._pending[block.start] = fetch

    def _forget(self) -> None:
        for fetch in self._pending.values():
            fetch.cancel()
        self._pending = {}

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._at + size, self.size)
        pieces = []
        while self._at < stop:
            pieces.append(self._some(self._at, stop))
            self._at += len(pieces[-1])
        return b"".join(pieces) if len(pieces) != 1 else pieces[0]

    def _some(self, start: int, stop: int) -> bytes:
        """At least one byte from `start` on."""
        in_tail = start - (self.size - len(self._tail))
        if in_tail >= 0:
            return self._tail[in_tail : in_tail + stop - start]
        block = self._block(start)
        if block is None:
            return self._bucket.range(self._key, start, stop, Budget(), self.etag)
        self._fetch(block)
        if block.after is not None:
            self._fetch(self._block(block.after))
        content = self._pending[block.start].result()
        if stop >= block.stop:
            del self._pending[block.start]  # read to its end: nobody comes back
        return content[start - block.start : stop - block.start]

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's WriteableBuffer is not importable
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._forget()
        super().close()
