"""The locked wheels of a target, unpacked: for a layer that holds other people's packages.

    requirements/lambda.txt -> the entries of a layer -> uv pip install --target, hashes checked -> cached by what went in

Nothing is built and nothing is run: a package without a wheel for the target is an error.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from infra.layers.target import Target, uv
from triform.errors import ConfigurationError, StoreError

_ENTRY: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)
INSTALL_SECONDS: Final = 600.0


def locked(lock: Path, names: Sequence[str]) -> str:
    """The lock's entries of these packages, hashes and markers included. Raises `ConfigurationError` for one it has not."""
    entries: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", lock.read_text().strip()):
        if found := _ENTRY.match(entry):
            entries.setdefault(found[1], []).append(entry)
    if missing := [name for name in names if name not in entries]:
        raise ConfigurationError(f"{lock.name} does not lock {', '.join(missing)}: run `make lock`")
    return "\n".join(entry for name in names for entry in entries[name]) + "\n"


def unpack(lock: Path, names: Sequence[str], target: Target, cache: Path) -> Path:
    """A folder with the packages, which the caller copies and does not change; made once for the same entries and target.

    Raises `ConfigurationError` where the lock lacks one, `StoreError` where they cannot be had.
    """
    wanted = locked(lock, names)
    key = hashlib.sha256(f"{target.platform} {target.python}\n{wanted}".encode()).hexdigest()[:16]
    folder = cache / f"{names[0]}-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    filling = cache / f".filling-{uuid.uuid4().hex}"
    entries = cache / f"{filling.name}.txt"
    entries.write_text(wanted)
    try:
        _install(entries, filling, target)
        filling.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another build was first
            raise
    finally:
        entries.unlink()
        shutil.rmtree(filling, ignore_errors=True)
    return folder


def _install(entries: Path, folder: Path, target: Target) -> None:
    platform = ["--python", sys.executable, "--python-platform", target.platform, "--python-version", target.python]
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--link-mode", "copy"]
    try:
        done = subprocess.run(
            [str(uv()), "pip", "install", *options, *platform, "--target", str(folder), "-r", str(entries)],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"},
        )
    except FileNotFoundError:
        raise ConfigurationError("uv is not installed beside this Python: run `make setup`") from None
    if done.returncode:
        raise StoreError(f"the wheels for {target.arch}, Python {target.python} cannot be had: {done.stderr.strip()[-2000:]}")
