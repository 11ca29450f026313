"""The input files of a job: found, opened at their footers, and checked before anything is scored."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from triform import arrow, dead_letters
from triform.errors import ConfigurationError, InputUnreadable, InvalidInput
from triform.features import Features
from triform.scoring import Layout, fingerprint

READERS: Final = 16
# Extension types that are plain data. Others may run code when they are read (CVE-2023-47248, CVE-2026-41486).
SAFE_EXTENSIONS: Final = frozenset({"arrow.uuid", "arrow.json", "arrow.bool8", "arrow.fixed_shape_tensor", "arrow.opaque"})


class RowGroup(msgspec.Struct, frozen=True, array_like=True):
    rows: int
    size: int  # bytes, uncompressed


class InputFile(msgspec.Struct, frozen=True):
    path: str
    size: int
    fingerprint: str
    row_groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


def find(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders (searched below for *.parquet) and globs name: absolute, links followed, sorted, each once.

    By the custom of Spark and Hive, names that begin with "." are not data, nor those with "_" that hold no "=". Raises
    `InputUnreadable` for a pattern that names nothing, and for a name that is not Unicode, which no plan could hold.
    """
    found: set[Path] = set()
    for pattern in patterns:
        files = [file.resolve() for file in _matches(pattern)]
        if not files:
            raise InputUnreadable(f"input: nothing there: {pattern}")
        found.update(files)
    if odd := [file for file in found if not _is_unicode(file)]:
        raise InputUnreadable(f"input: the name is not Unicode, rename it: {os.fsencode(min(odd))!r}")
    return sorted(found)


def _is_unicode(file: Path) -> bool:
    return str(file).encode(errors="replace").decode() == str(file)


def _matches(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    if path.is_file():
        yield path
        return
    root = path if path.is_dir() else _fixed(path)
    for name in [pattern] if path.is_dir() else glob.glob(pattern, recursive=True):
        for file in sorted(Path(name).rglob("*.parquet")) if Path(name).is_dir() else [Path(name)]:
            if file.is_file() and not any(_hidden(part) for part in file.relative_to(root).parts):
                yield file


def _fixed(pattern: Path) -> Path:
    """The folder that a glob names outright: what is hidden above it was asked for."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parent.parts)
    return Path(*fixed)


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def read_files(paths: Sequence[Path]) -> list[tuple[InputFile, pa.Schema]]:
    """Every file's footer and schema. Raises `InputUnreadable` that names the files that have none."""

    def attempt(path: Path) -> tuple[InputFile, pa.Schema] | str:
        try:
            return read_file(path)
        except InputUnreadable as error:
            return str(error)

    with ThreadPoolExecutor(min(READERS, 4 * (os.cpu_count() or 1))) as pool:
        results = list(pool.map(attempt, paths))
    faults = [r for r in results if isinstance(r, str)]
    if faults:
        shown = "\n  ".join(faults[:10])
        raise InputUnreadable(f"{len(faults)} of {len(paths)} input file(s) cannot be read:\n  {shown}")
    return [r for r in results if not isinstance(r, str)]


def read_file(path: Path) -> tuple[InputFile, pa.Schema]:
    """One file's size, footer digest and row groups, and its schema, which holds no type that runs code."""
    try:
        version = fingerprint(path)
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        size = path.stat().st_size
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputUnreadable(f"{path}: {error}") from error
    for field in schema:
        check_plain(field, path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return InputFile(str(path), size, version, tuple(RowGroup(g.num_rows, g.total_byte_size) for g in groups)), schema


def check_apart(files: Sequence[InputFile], output: Path) -> None:
    """Raises `ConfigurationError` if a file lies in the output: the next run would score what this one wrote."""
    if inside := [file.path for file in files if Path(file.path).is_relative_to(output.resolve())]:
        raise ConfigurationError(f"input: {inside[0]} lies in the output {output}: choose an output outside the input")


def check_plain(field: pa.Field, path: Path) -> None:
    """Raises `InputUnreadable` for an extension type, nested ones too, that is not known to be plain data."""
    kind, name = field.type, (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if isinstance(kind, pa.BaseExtensionType):
        name, kind = kind.extension_name, kind.storage_type
    if name and name not in SAFE_EXTENSIONS:
        raise InputUnreadable(f"{path}: column '{field.name}' has the extension type {name}, which may run code when it is read")
    for i in range(kind.num_fields):
        check_plain(kind.field(i), path)


def check_columns(files: Sequence[tuple[InputFile, pa.Schema]], features: Features, layout: Layout) -> None:
    """Raises `InvalidInput`, naming file and column, unless every file can feed the model and carries the same key and kept
    columns with the same types (they share one output, where they may not be called like an answer)."""
    taken = {c.name for c in features.outputs} | {"_model_version", "_scored_at"}
    if clash := [name for name in layout.carried if name in taken]:
        raise InvalidInput(f"the column '{clash[0]}' cannot be kept: the output has an answer of that name")
    if clash := [name for name in layout.key if name in dead_letters.COLUMNS]:
        raise InvalidInput(f"the column '{clash[0]}' cannot be a key: dead letters have a column of that name; rename it")
    first_file, first = files[0]
    for file, schema in files:
        try:
            arrow.check_schema(features.inputs, schema)
        except InvalidInput as error:
            raise InvalidInput(f"{file.path}: {error}") from error
        for name in layout.carried:
            if schema.names.count(name) != 1:
                raise InvalidInput(f"{file.path}: no column '{name}' to carry over (it has: {', '.join(schema.names)})")
            here, there = schema.field(name).type, first.field(name).type
            if here != there:
                raise InvalidInput(f"{file.path}: column '{name}' is {here}, in {first_file.path} it is {there}")
