"""Programs that run beside tests and load tests for as long as a block lasts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ENDS_SECONDS = 10.0  # that a program has after it was asked to


@contextmanager
def background(
    command: Sequence[object], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The program, which has ended when the block is left: it is asked to, and killed where it does not. It writes to `log`."""
    with log.open("wb") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file, env=environ)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(ENDS_SECONDS)
