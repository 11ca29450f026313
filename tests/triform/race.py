"""`python race.py release|package REPOSITORY RACERS`: so many processes do the same to one repository at once.

Each racer prints one line of JSON: [its name, what came of it].
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from triform.errors import ReleaseConflict
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository

REVISIONS = 5


def release(root: Path, name: str) -> dict[int, str | None]:
    """Tries to write revisions 2, 3, ...; by the revision looked at: None where it won, else what it was told."""
    log = ReleaseLog(open_repository(root), "linear")
    told: dict[int, str | None] = {}
    for revision in range(1, REVISIONS + 1):
        try:
            log.set(stable=2, changed_by=name, expect=revision)
            told[revision] = None
        except ReleaseConflict as error:
            told[revision] = str(error)
        time.sleep(0.02)  # so that the next revision is not written by this one alone
    return told


def package(root: Path, _: str) -> str:
    return package_model(root / "linear.onnx", name="linear", repository=open_repository(root)).ref


def main() -> None:
    run, root, racers = {"release": release, "package": package}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    gate, open_gate = os.pipe()
    for name in (f"racer-{i}" for i in range(racers)):
        if os.fork() == 0:
            os.close(open_gate)
            os.read(gate, 1)  # until the parent closes its end
            os.write(1, f"{json.dumps([name, run(root, name)])}\n".encode())
            os._exit(0)
    os.close(open_gate)
    for _ in range(racers):
        os.wait()


if __name__ == "__main__":
    main()
