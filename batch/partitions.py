"""Partitions of an input by folders, `month=2013-12/`, and the jobs for some of them.

    JobSpec with a partition (or a range) -> the folders that there are -> one JobSpec a partition, each with an output of its own

Each partition has its own runs, its own pointer and its own lease, below `<output>/month=2013-12/`. So a night can be run again,
or replaced when late data has come, without a look at any other.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import msgspec

from batch.spec import JobSpec
from triform.errors import ConfigurationError, InputUnreadable
from triform.sources import Sources, is_remote

EMPTY: Final = "__HIVE_DEFAULT_PARTITION__"  # Hive's name for a null or an empty text
_ESCAPED: Final = frozenset("\"#%'*/:=?\\{[]^\x7f")  # what Hive and Spark escape, with all control characters


def encode(value: str) -> str:
    """The value as the end of a folder's name: "/", "=", "%" and the like as %2F, %3D, %25; an empty one as Hive calls it."""
    return "".join(f"%{ord(c):02X}" if c in _ESCAPED or c < " " else c for c in value) or EMPTY


def decode(text: str) -> str:
    """The value that a folder's name ends with. Raises `InputUnreadable` for a name that is no text."""
    try:
        value = unquote(text, errors="strict")
        value.encode()
    except UnicodeError:
        raise InputUnreadable(f"input: the partition {text!a} has a name that is not UTF-8: rename its folder") from None
    return "" if text == EMPTY else value


def split(partition: str) -> tuple[str, str | None]:
    """Name and value of `month=2013-12`; None where it is only a name. Raises `ConfigurationError`."""
    name, found, value = partition.partition("=")
    if not name or "/" in name or name.startswith("."):
        raise ConfigurationError(f"partition: {partition!r} is not NAME=VALUE, like month=2013-12")
    return name, value if found else None


def jobs(spec: JobSpec, sources: Sources) -> list[tuple[str, JobSpec]]:
    """The job of each partition that is asked for, in order; the partition is "" where none was asked for.

    Raises `ConfigurationError` for a range that is none, `InputUnreadable` where an input has no such partition.
    """
    if not spec.partition:
        if spec.first is not None or spec.last is not None:
            raise ConfigurationError("--from and --to need --partition NAME: the folders NAME=... to choose from")
        return [("", spec)]
    *outer, last = (split(partition) for partition in spec.partition)
    if any(value is None for _, value in outer):
        raise ConfigurationError("partition: only the last may leave its value to --from and --to")
    folders = _descend(spec.input, [(name, value or "") for name, value in outer], sources)
    name, value = last
    if value is None:
        values = _between((found for folder in folders for found in _values(folder, name, sources)), spec)
        if not values:
            asked = f"from {spec.first or 'the first'} to {spec.last or 'the last'}"
            raise InputUnreadable(f"input: no partition {name}=... {asked} in {', '.join(spec.input)}")
    elif spec.first is not None or spec.last is not None:
        raise ConfigurationError(
            f"partition: --from and --to choose among {name}=..., so give --partition {name} without a value"
        )
    else:
        values = [value]
    return [_job(spec, folders, [*outer, (name, chosen)], sources) for chosen in values]


def _job(
    spec: JobSpec, folders: Sequence[str], partition: Sequence[tuple[str, str | None]], sources: Sources
) -> tuple[str, JobSpec]:
    path = "/".join(f"{name}={encode(value or '')}" for name, value in partition)
    name, value = partition[-1]
    inputs = tuple(map(glob.escape, _descend(folders, [(name, value or "")], sources)))
    output = f"{spec.output.rstrip('/')}/{path}"
    return path, msgspec.structs.replace(spec, input=inputs, output=output, partition=(), first=None, last=None)


def _descend(folders: Sequence[str], partition: Sequence[tuple[str, str]], sources: Sources) -> list[str]:
    """The folders of a partition below those, in whichever of them there is one. Raises `InputUnreadable` where none is."""
    for name, value in partition:
        below = [found for folder in folders for found in _named(folder, name, value, sources)]
        if not below:
            known = sorted({found for folder in folders for found in _values(folder, name, sources)})
            has = f"it has {name}={known[0]} to {known[-1]}" if known else f"it has no folders {name}=..."
            raise InputUnreadable(f"input: no partition {name}={value} in {', '.join(folders)} ({has})")
        folders = below
    return list(folders)


def _named(folder: str, name: str, value: str, sources: Sources) -> Iterator[str]:
    """The folder `name=value`, however its writer has encoded the value."""
    arrow = quote(value, safe="", errors="surrogateescape")
    for text in dict.fromkeys((encode(value), arrow or EMPTY, *([value] if "/" not in value else []))):
        path = f"{folder.rstrip('/')}/{name}={text}"
        if _is_folder(path, sources):
            yield path


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    """A folder of the input that this process may not look into is named as such."""
    try:
        yield
    except OSError as error:
        raise InputUnreadable(f"input: {folder} cannot be read: {error.strerror}") from error


def _is_folder(path: str, sources: Sources) -> bool:
    if not is_remote(path):
        with _readable(path):
            return Path(path).is_dir()
    bucket, key = sources.bucket(path)
    return bucket.has_keys(f"{key}/")


def _values(folder: str, name: str, sources: Sources) -> list[str]:
    if is_remote(folder):
        bucket, key = sources.bucket(folder)
        found = bucket.folders(f"{key.rstrip('/')}/" if key else "")
    else:
        with _readable(folder):
            found = [path.name for path in Path(folder).iterdir() if path.is_dir()] if Path(folder).is_dir() else []
    return [decode(text.removeprefix(f"{name}=")) for text in found if text.startswith(f"{name}=")]


def _between(values: Iterable[str], spec: JobSpec) -> list[str]:
    """Those from `spec.first` to `spec.last`, in order, but the empty one, which has no place in it. Whole numbers by their size
    (9 comes before 10), else as texts, which is right for dates as ISO 8601 writes them.
    """
    some, bounds = sorted(set(values) - {""}), [bound for bound in (spec.first, spec.last) if bound is not None]
    key: Callable[[str], Any] = int if all(v.isascii() and v.isdecimal() for v in [*some, *bounds]) else str
    if len(bounds) == 2 and key(bounds[0]) > key(bounds[1]):
        raise ConfigurationError(f"--from {bounds[0]} comes after --to {bounds[1]}")
    low, high = spec.first, spec.last
    chosen = (v for v in some if (low is None or key(v) >= key(low)) and (high is None or key(v) <= key(high)))
    return sorted(chosen, key=key)
