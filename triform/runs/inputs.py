"""The input files of a job: found, opened at their footers, and checked before anything is scored."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa

from triform import arrow, dead_letters
from triform.errors import ConfigurationError, InputUnreadable, InvalidInput
from triform.features import Features
from triform.scoring import Layout
from triform.sources import Identity, Sources, is_remote

READERS: Final = 16


class RowGroup(msgspec.Struct, frozen=True, array_like=True):
    rows: int
    size: int  # bytes, uncompressed


class InputFile(msgspec.Struct, frozen=True):
    path: str  # or s3://bucket/key
    size: int
    fingerprint: str
    row_groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def identity(self) -> Identity:
        return Identity(self.size, self.fingerprint)


def find(patterns: Sequence[str], sources: Sources) -> list[str]:
    """The files that paths, folders (searched below for *.parquet) and globs name, on disk or as s3://bucket/...: absolute, links
    followed, sorted, each once.

    By the custom of Spark and Hive, names that begin with "." are not data, nor those with "_" that hold no "=". Raises
    `InputUnreadable` for a pattern that names nothing, and for a name that is not Unicode, which no plan could hold.
    """
    found: set[str] = set()
    for pattern in patterns:
        files = list(_objects(pattern, sources)) if is_remote(pattern) else [str(file.resolve()) for file in _matches(pattern)]
        if not files:
            raise InputUnreadable(f"input: nothing there: {pattern}")
        found.update(files)
    if odd := [file for file in found if not _is_unicode(file)]:
        raise InputUnreadable(f"input: the name is not Unicode, rename it: {os.fsencode(min(odd))!r}")
    return sorted(found)


def _is_unicode(file: str) -> bool:
    return file.encode(errors="replace").decode() == file


def _objects(pattern: str, sources: Sources) -> Iterator[str]:
    """The same for a bucket: only keys below what the pattern names outright are listed."""
    bucket, key = sources.bucket(pattern)
    if key and not key.endswith("/") and bucket.find(key) is not None:
        yield bucket.url(key)
        return
    wanted = [part for part in key.split("/") if part]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), wanted))
    root = "".join(f"{part}/" for part in fixed)
    for name, _ in bucket.keys(root):
        below = name[len(root) :].split("/")
        if below[-1] and not any(map(_hidden, below)) and _fits(below, wanted[len(fixed) :]):
            yield bucket.url(name)


def _fits(key: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob means the key, both split at "/": `**` is any number of folders, a folder all *.parquet below it."""
    if not pattern:
        return not key or key[-1].endswith(".parquet")
    if pattern[0] == "**":
        return any(_fits(key[i:], pattern[1:]) for i in range(len(key) + 1))
    return bool(key) and fnmatch.fnmatchcase(key[0], pattern[0]) and _fits(key[1:], pattern[1:])


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


def read_files(paths: Sequence[str], sources: Sources) -> list[tuple[InputFile, pa.Schema]]:
    """Every file's footer and schema. Raises `InputUnreadable` that names the files that have none."""

    def attempt(path: str) -> tuple[InputFile, pa.Schema] | str:
        try:
            return read_file(path, sources)
        except InputUnreadable as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(attempt, paths))
    faults = [r for r in results if isinstance(r, str)]
    if faults:
        shown = "\n  ".join(faults[:10])
        raise InputUnreadable(f"{len(faults)} of {len(paths)} input file(s) cannot be read:\n  {shown}")
    return [r for r in results if not isinstance(r, str)]


def read_file(path: str, sources: Sources) -> tuple[InputFile, pa.Schema]:
    """One file's identity and row groups, and its schema, which holds no type that runs code."""
    identity = sources.identify(path)
    with sources.open(path, identity) as source:
        metadata = source.parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        rows = tuple(RowGroup(group.num_rows, group.total_byte_size) for group in groups)
        return InputFile(path, identity.size, identity.fingerprint, rows), source.schema


def check_apart(files: Sequence[InputFile], output: str) -> None:
    """Raises `ConfigurationError` if a file lies in the output: the next run would score what this one wrote."""
    there = output if is_remote(output) else str(Path(output).resolve())
    if inside := [file.path for file in files if file.path.startswith(f"{there.rstrip('/')}/")]:
        raise ConfigurationError(f"input: {inside[0]} lies in the output {output}: choose an output outside the input")


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
