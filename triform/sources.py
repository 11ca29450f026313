"""Input files wherever they are, a path or an object on S3: told apart, opened as Parquet, and read in batches.

    location -> Sources.identify -> Identity, frozen in the plan -> Sources.open, which refuses any other file -> Source.batches

A local file is known by its Parquet footer and modification time, an object by its ETag, which every read of it carries: bytes of
two versions are never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from triform.errors import ConfigurationError, InputChanged, InputUnreadable

if TYPE_CHECKING:
    from triform.stores.s3 import Bucket
    from triform.stores.s3_file import S3File

AHEAD_BYTES: Final = 64 << 20  # of an object that are fetched before they are asked for
BLOCK_BYTES: Final = (256 << 10, 8 << 20)
# Extension types that are plain data. Others may run code when they are read (CVE-2023-47248, CVE-2026-41486).
SAFE_EXTENSIONS: Final = frozenset({"arrow.uuid", "arrow.json", "arrow.bool8", "arrow.fixed_shape_tensor", "arrow.opaque"})


class Identity(msgspec.Struct, frozen=True):
    """What tells a file from the one that was there before."""

    size: int  # bytes
    fingerprint: str


class Unread(NamedTuple):
    """A row that was refused before it became one of a Parquet file (see converted.py); `raw` is its JSON."""

    code: str
    reason: str
    raw: str


class Source:
    """A Parquet file that is open. `name`: its location, for messages. `unread`: rows that hold nothing, by number."""

    def __init__(
        self, name: str, parquet: pq.ParquetFile, file: S3File | None = None, unread: Mapping[int, Unread] | None = None
    ) -> None:
        self.name = name
        self.parquet = parquet
        self.unread = unread or {}
        self._file = file  # where it is on S3

    @property
    def schema(self) -> pa.Schema:
        return self.parquet.schema_arrow

    def batches(self, rows: int, row_groups: Sequence[int], columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The row groups in batches of up to `rows`, all columns where none are named.

        Raises `InputUnreadable`, with the file's name, for pages that are damaged.
        """
        if self._file is not None:
            self._file.expect(blocks(self.parquet.metadata, row_groups, columns))
        batches = self.parquet.iter_batches(rows, row_groups=row_groups, columns=columns, use_threads=False)
        plain: Any = None
        while True:
            with unreadable(self.name, row_groups):
                batch = next(batches, None)
            if batch is None:
                return
            plain = plain or pa.schema(map(plain_field, batch.schema))
            yield batch if batch.schema.equals(plain, check_metadata=True) else batch.cast(plain)


@contextlib.contextmanager
def unreadable(name: str, row_groups: Sequence[int]) -> Iterator[None]:
    """Raises `InputUnreadable` for what Arrow raises."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputUnreadable(f"{name}: row groups {list(row_groups)}: {error}") from error


def plain_field(field: pa.Field) -> pa.Field:
    """Without metadata; Arrow's text and binary views, of which it can take no rows yet, as plain text and binary."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return field.with_type(plain.get(field.type, field.type)).remove_metadata()


def blocks(metadata: Any, row_groups: Sequence[int], columns: Sequence[str] | None) -> list[list[tuple[int, int]]]:
    """The bytes that reading these columns takes: a list a column, in the order in which they are read."""
    streams: dict[int, list[tuple[int, int]]] = {}
    for group in map(metadata.row_group, row_groups):
        for i in range(group.num_columns):
            chunk = group.column(i)
            if columns is None or chunk.path_in_schema.split(".")[0] in columns:
                start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
                streams.setdefault(i, []).append((start, start + chunk.total_compressed_size))
    smallest, largest = BLOCK_BYTES
    size = min(max(AHEAD_BYTES // max(2 * len(streams), 1), smallest), largest)
    return [
        [(at, min(at + size, stop)) for start, stop in chunks for at in range(start, stop, size)] for chunks in streams.values()
    ]


class Sources:
    """Opens input files; keeps a connection for each bucket. Every method may raise `StoreError` for what is on S3."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def bucket(self, location: str) -> tuple[Bucket, str]:
        """The bucket and the key of `s3://bucket/key`."""
        try:
            from triform.stores import s3
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"{location[:200]!r}: S3 needs {error.name}: install triform[s3]") from error
        name, key = s3.split(location)
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = s3.Bucket.open(name)
            return self._buckets[name], key

    def identify(self, location: str) -> Identity:
        """The file that is there now. Raises `InputUnreadable` where there is none, or no Parquet file."""
        if is_remote(location):
            bucket, key = self.bucket(location)
            found = bucket.find(key)
            if found is None:
                raise InputUnreadable(f"{location}: there is no such object")
            return Identity(found.size, found.etag)
        try:
            return Identity(Path(location).stat().st_size, fingerprint(Path(location)))
        except OSError as error:
            raise InputUnreadable(f"{location}: {error.strerror or error}") from error

    @contextmanager
    def open(self, location: str, expected: Identity | None = None, text: Sequence[str] = ()) -> Iterator[Source]:
        """The file. The columns of `text` that are plain text come as dictionaries, as the file has them, several times faster.

        Raises `InputChanged` if it is not the expected one, `InputUnreadable` if it is no Parquet file or has a column of a type
        that may run code when it is read.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._object(location, expected)) if is_remote(location) else None
                if file is None and expected is not None and self.identify(location) != expected:
                    raise InputChanged(f"{location} is not the file that was planned; start the job anew for its present content")
                opened = partial(
                    pq.ParquetFile, file or location, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
                )
                parquet = stack.enter_context(opened())
                for field in parquet.schema_arrow:
                    check_plain(field, location)
                if coded := [name for name in text if _is_text(parquet.schema_arrow, name)]:
                    parquet = stack.enter_context(opened(metadata=parquet.metadata, read_dictionary=coded))
            except OSError as error:  # ArrowInvalid is a ValueError
                raise InputUnreadable(f"{location}: {error.strerror or error}") from error
            except (ValueError, NotImplementedError) as error:
                raise InputUnreadable(f"{location}: {error}") from error
            yield Source(location, parquet, file)

    def _object(self, location: str, expected: Identity | None) -> S3File:
        from triform.stores.s3_file import S3File

        return S3File(*self.bucket(location), etag=expected.fingerprint if expected else None)


def _is_text(schema: pa.Schema, name: str) -> bool:
    places = schema.get_all_field_indices(name)
    return len(places) == 1 and bool(pa.types.is_string(schema.field(places[0]).type))


def is_remote(location: str) -> bool:
    return location.startswith("s3://")


def fingerprint(path: Path) -> str:
    """What tells a local file from the one that was there before: sha256 of its Parquet footer and modification time.

    The footer alone would not do: it holds each column chunk's place, size and extremes, and a value between them can change
    without a trace. Raises `InputUnreadable` for what is no Parquet file.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 12:
            raise InputUnreadable(f"{path}: {size} bytes are no Parquet file")
        file.seek(-8, os.SEEK_END)
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > size - 12:
            raise InputUnreadable(f"{path}: no Parquet file, or cut off: its last bytes are not a Parquet footer")
        file.seek(-8 - length, os.SEEK_END)
        modified = os.fstat(file.fileno()).st_mtime_ns
        return hashlib.sha256(file.read(length) + modified.to_bytes(16, "little", signed=True)).hexdigest()


def check_plain(field: pa.Field, location: str) -> None:
    """Raises `InputUnreadable` for an extension type, nested ones too, that is not known to be plain data."""
    kind, name = field.type, (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if isinstance(kind, pa.BaseExtensionType):
        name, kind = kind.extension_name, kind.storage_type
    if name and name not in SAFE_EXTENSIONS:
        told = f"column '{field.name}' has the extension type {name}, which may run code when it is read"
        raise InputUnreadable(f"{location}: {told}")
    for i in range(kind.num_fields):
        check_plain(kind.field(i), location)
