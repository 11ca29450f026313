"""`python crash.py OPERATION TEMPLATE WORK`: does an operation on copies of a repository, WORK/1, WORK/2, ...

The process that works on copy k dies before its k-th file operation there, as `kill -9` or a power cut would have it; the
last copy's lives to its end. Prints how many copies there are.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triform import retention
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository

OPERATIONS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}


def release(root: Path) -> None:
    ReleaseLog(open_repository(root), "linear").set(stable=2, reason="crash")


def first_release(root: Path) -> None:
    ReleaseLog(open_repository(root), "linear").set(stable=1, reason="crash")


def publish(root: Path) -> None:
    repository = open_repository(root)
    with repository.staging("linear") as folder:
        shutil.copytree(root / "linear/.finished", folder, dirs_exist_ok=True)
        repository.publish(folder, "linear", 9)


def package(root: Path) -> None:
    package_model(root / "linear.onnx", name="linear", version=9, repository=open_repository(root))


def prune(root: Path) -> None:
    retention.prune(open_repository(root), "linear", retention.Policy(), dry_run=False)


def die_before(number: int, root: Path) -> None:
    """Ends this process before its `number`-th file operation below root."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and any(isinstance(a, str | os.PathLike) and str(a).startswith(str(root)) for a in arguments):
            seen += 1
            if seen == number:
                os._exit(9)

    sys.addaudithook(hook)


def survives(operation: Callable[[Path], None], root: Path, number: int) -> bool:
    child = os.fork()
    if child == 0:
        die_before(number, root)
        operation(root)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    operation, template, work = globals()[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    number, done = 0, False
    while not done:
        number += 1
        root = Path(shutil.copytree(template, work / str(number)))
        done = survives(operation, root, number)
    print(number)


main()
