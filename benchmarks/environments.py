"""Virtual environments and programs that only a benchmark needs, kept under build/."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(folder: Path, requirements: Sequence[str] | Path) -> str:
    """The Python of an environment with the requirements (or those of a lock), made with uv if it is not there.

    Raises `subprocess.CalledProcessError` where they do not install; its `stderr` says why.
    """
    python = folder / "bin/python"
    stamp = folder / ".installed"
    wanted = requirements.read_text() if isinstance(requirements, Path) else "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        named = requirements.name if isinstance(requirements, Path) else ", ".join(requirements)
        print(f"making {folder}: {named}", flush=True)
        given = ["--require-hashes", "-r", str(requirements)] if isinstance(requirements, Path) else requirements
        uv = str(Path(sys.executable).with_name("uv"))
        run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], timeout=120)
        run([uv, "pip", "install", "--quiet", "--python", str(python), *given], timeout=600)
        stamp.write_text(wanted)
    return str(python)


def debian(*packages: str) -> tuple[Path, dict[str, str]]:
    """The folder with the programs of Debian packages (`infra/debian.sh`), and the environment that they need to run."""
    programs = Path(run([str(ROOT / "infra/debian.sh"), *packages], timeout=300).strip())
    libraries = ":".join(str(folder) for folder in (programs.parent / "lib").glob("*-linux-gnu"))
    return programs, {**os.environ, "LD_LIBRARY_PATH": libraries}


def run(command: Sequence[str], *, timeout: float) -> str:
    return subprocess.run(command, check=True, timeout=timeout, capture_output=True, text=True).stdout
