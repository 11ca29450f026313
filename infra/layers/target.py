"""What the layers are built for: an architecture and a Python of Lambda's, whatever this machine is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from triform.errors import ConfigurationError

ARCHITECTURES: Final = {"x86_64": "x86_64-manylinux_2_28", "arm64": "aarch64-manylinux_2_28"}  # Lambda's name: uv's platform
PYTHONS: Final = ("3.12", "3.13")  # on Amazon Linux 2023, which has glibc 2.34; 3.11 runs on Amazon Linux 2 with 2.26
HERE: Final = "{}.{}".format(*sys.version_info)
_SAYS_VERSION: Final = "import sys; print('%d.%d' % sys.version_info[:2])"


class Target(msgspec.Struct, frozen=True):
    """`python`: the minor version, "3.13"."""

    arch: str = "x86_64"
    python: str = "3.13"

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ConfigurationError(f"arch: {self.arch[:40]!r}: expected one of {', '.join(ARCHITECTURES)}")
        if not re.fullmatch(r"3\.1[1-3]", self.python):
            raise ConfigurationError(f"python: {self.python[:40]!r}: expected one of {', '.join(PYTHONS)}")

    @property
    def platform(self) -> str:
        return ARCHITECTURES[self.arch]

    @property
    def site_packages(self) -> str:
        """Where modules lie in a layer, so that this Python of Lambda's finds them and no other does."""
        return f"python/lib/python{self.python}/site-packages"

    def warnings(self) -> list[str]:
        """What keeps the layers from Lambda, though they can be built and tried here."""
        if self.python in PYTHONS:
            return []
        return [f"Lambda's python{self.python} has glibc 2.26, and these wheels need 2.28: deploy {' or '.join(PYTHONS)}"]


def find_interpreter(python: str) -> Path | None:
    """A Python of this minor version on this machine, which compiles for every architecture; None where there is none."""
    for command in _candidates(python):
        environ = os.environ | {"PYENV_VERSION": python}  # a pyenv shim asks for it; nobody else looks
        try:
            done = subprocess.run(
                [*command, "-I", "-c", _SAYS_VERSION + "; print(sys.executable)"],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
                env=environ,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        version, _, executable = done.stdout.strip().partition("\n")
        if version == python:
            return Path(executable)
    return None


def _candidates(python: str) -> Iterator[list[str]]:
    if python == HERE:
        yield [sys.executable]
    yield [f"python{python}"]
    try:
        found = subprocess.run(
            [uv(), "python", "find", "--quiet", "--no-python-downloads", python],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return
    yield [found.stdout.strip()]


def uv() -> Path:
    """The `uv` beside this Python, as `make setup` installs it."""
    return Path(sys.executable).with_name("uv")
