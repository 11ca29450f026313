"""Files on a local disk that appear whole, survive a power cut, and are created by exactly one of many writers."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def create_exclusively(path: Path, content: bytes) -> bool:
    """Creates `path` with the content, whole and durable; False if the name is taken. Its folder must exist."""
    temporary = write_temporary(path, content)
    try:
        return link_exclusively(temporary, path)
    finally:
        temporary.unlink()


def replace(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes `path` so that a reader sees the old content or the new; `mode` as of `open`."""
    temporary = write_temporary(path, content, mode=mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    fsync_folder(path.parent)


def link_exclusively(source: Path, path: Path) -> bool:
    """Gives the finished file a second name, durably; False if that name is taken."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    fsync_folder(path.parent)
    return True


def write_temporary(path: Path, content: bytes, *, mode: int = 0o666) -> Path:
    """The content, durable, under a name of its own beside `path`: it begins with a dot, and no reader looks at it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary
