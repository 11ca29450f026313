"""Is every key there once? Exact, at bounded memory whatever the number of rows.

    key columns -> 64-bit hashes -> buckets on disk by their bits, split until they fit -> each sorted -> hashes that occur twice
                -> the rows with those hashes, read again -> keys compared as they are

A hash only ever points at rows to compare, so two keys that share one are not taken for duplicates.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from triform.pipeline import ahead

Hashes = NDArray[np.uint64]
T = TypeVar("T")
BUCKET_ROWS: Final = 4_000_000  # 32 MB of hashes: what is sorted at once
SPLIT_BITS: Final = 6  # more rows are split into 64 files, and those again: few files are open at once
AT_ONCE: Final = 4  # files read at a time, a few batches ahead
SUSPECTS: Final = 1_000  # hashes looked at again: enough to name examples
_BYTES: Final = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary,
)  # fmt: skip
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def duplicates(
    files: Sequence[str],
    key: Sequence[str],
    open_file: Callable[[str], BinaryIO],
    *,
    rows: int,
    most: int = 5,
    scratch: Path | None = None,
) -> list[tuple[tuple[Any, ...], int]]:
    """Up to `most` keys that occur more than once over all the Parquet files, each with its count.

    Two nulls are the same key. `rows`: how many there are in all. `scratch`: where the buckets go, 8 bytes a row if there are
    many; None: the system's folder.
    """

    readers = [map(hash_rows, _batches(files[i::AT_ONCE], key, open_file)) for i in range(min(AT_ONCE, len(files)))]
    with (
        tempfile.TemporaryDirectory(prefix="triform-keys-", dir=scratch) as folder,
        closing(_side_by_side(readers)) as hashes,
    ):
        suspects = _suspects(hashes, rows, 64, Path(folder))
    if not suspects.size:
        return []
    seen: Counter[tuple[int | bytes | None, ...]] = Counter()
    for batch in _batches(files, key, open_file):
        rows_at = pa.array(np.flatnonzero(np.isin(hash_rows(batch), suspects)))
        columns = [_comparable(column).take(rows_at).to_pylist() for column in batch.columns]
        seen.update(zip(*columns, strict=True))
    return [(tuple(map(_shown, found)), n) for found, n in seen.most_common(most) if n > 1]


def _side_by_side(readers: Iterable[Iterator[T]]) -> Generator[T, None, None]:
    """What they give, in turn, each read a little ahead in its thread: a store answers slowly, but many questions at once."""
    with ExitStack() as stack:
        waiting = deque(stack.enter_context(closing(ahead(reader))) for reader in readers)
        while waiting:
            reader = waiting.popleft()
            with suppress(StopIteration):
                yield next(reader)
                waiting.append(reader)


def _shown(value: int | bytes | None) -> int | str | None:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _suspects(hashes: Iterable[Hashes], rows: int, bits: int, folder: Path) -> Hashes:
    """Hashes that occur more than once, SUSPECTS at most. Their `bits` low bits are still to be told apart by."""
    if bits < SPLIT_BITS:  # all bits are the same but these few: the hashes are as good as counted
        counts: Counter[np.uint64] = Counter()
        for some in hashes:
            counts.update(dict(zip(*np.unique(some, return_counts=True), strict=True)))
        return np.array([h for h, n in counts.items() if n > 1], dtype=np.uint64)
    if rows <= BUCKET_ROWS:
        ordered = np.sort(np.concatenate([np.empty(0, dtype=np.uint64), *hashes]))
        return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])[:SUSPECTS]
    buckets = [(folder / f"{bits}-{i}").open("w+b") for i in range(1 << SPLIT_BITS)]
    found = np.empty(0, dtype=np.uint64)
    with ExitStack() as stack:
        for bucket in buckets:
            stack.enter_context(bucket)
        for some in hashes:
            for bucket, mine in zip(buckets, _split(some, bits), strict=True):
                mine.tofile(bucket)
        for bucket in buckets:
            size = bucket.tell() // 8
            bucket.seek(0)
            more = _suspects(_stored(bucket), size, bits - SPLIT_BITS, folder)
            bucket.truncate(0)
            found = np.concatenate([found, more])[:SUSPECTS]
    return found


def _stored(file: BinaryIO) -> Iterator[Hashes]:
    while (some := np.fromfile(file, dtype=np.uint64, count=65_536)).size:
        yield some


def _split(hashes: Hashes, bits: int) -> list[Hashes]:
    """The hashes by the highest SPLIT_BITS of their `bits` low bits."""
    number = (hashes >> np.uint64(bits - SPLIT_BITS)) & np.uint64((1 << SPLIT_BITS) - 1)
    order = np.argsort(number, kind="stable")
    edges = np.searchsorted(number[order], np.arange(1, 1 << SPLIT_BITS, dtype=np.uint64))
    return np.split(hashes[order], edges)


def _batches(files: Sequence[str], key: Sequence[str], open_file: Callable[[str], BinaryIO]) -> Iterator[pa.RecordBatch]:
    for name in files:
        with open_file(name) as opened, pq.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(65_536, columns=list(key), use_threads=False):
                yield batch.select(list(key))


def hash_rows(batch: pa.RecordBatch) -> Hashes:
    """A 64-bit hash for each row, over all columns of the batch."""
    total = np.zeros(batch.num_rows, dtype=np.uint64)
    for column in batch.columns:
        total = _mix(total * _GOLDEN ^ _hash(column))
    return total


def _mix(h: Hashes) -> Hashes:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): each bit of the input moves each bit of the output."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _hash(column: pa.Array) -> Hashes:
    column = _comparable(column)
    if pa.types.is_large_binary(column.type):
        hashes = _hash_bytes(column)
    else:
        hashes = _mix(column.fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64) + _GOLDEN)
    if column.null_count:
        hashes = np.where(column.is_null().to_numpy(zero_copy_only=False), np.uint64(1), hashes)
    return hashes


def _comparable(column: pa.Array) -> pa.Int64Array | pa.UInt64Array | pa.LargeBinaryArray:
    """The column so that equal keys are equal integers or bytes: text and binary as they are, dates, floats and decimals as
    Arrow's text (0.0 is -0.0, each NaN the same), lists and structs as Python's."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.cast(pa.uint64() if pa.types.is_uint64(kind) else pa.int64())
    if pa.types.is_nested(kind):
        column = pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())
    elif pa.types.is_floating(kind):
        column = pc.add(column.cast(pa.float64()), 0.0).cast(pa.string())
    elif not any(holds(kind) for holds in _BYTES):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())


def _hash_bytes(values: pa.LargeBinaryArray) -> Hashes:
    """Eight bytes at a time for all rows at once: as many steps as the longest value has words."""
    values = values.fill_null(b"")
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    start, length = offsets[:-1], np.diff(offsets)
    data = np.frombuffer(values.buffers()[2] or b"", dtype=np.uint8)
    words = np.lib.stride_tricks.sliding_window_view(np.concatenate([data, np.zeros(8, np.uint8)]), 8)
    hashes = _mix(length.astype(np.uint64) + _GOLDEN)
    active = np.flatnonzero(length > 0)
    at = 0
    while active.size:
        word = np.ascontiguousarray(words[start[active] + at]).view(np.uint64).ravel()
        left = np.minimum(length[active] - at, 8).astype(np.uint64)
        word &= np.uint64(0xFFFFFFFFFFFFFFFF) >> (
            (np.uint64(8) - left) * np.uint64(8)
        )  # the bytes past the end are a neighbour's
        hashes[active] = _mix(hashes[active] * _GOLDEN ^ word)
        at += 8
        active = active[length[active] > at]
    return hashes
