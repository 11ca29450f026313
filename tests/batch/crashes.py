"""Drivers that crash or race, without Ray: python -m tests.batch.crashes crash|race REPOSITORY FOLDER [EVERY].

`crash`: for each k (or each EVERY), one driver is ended (os._exit) just before its k-th change of a file below the output: one
opened for writing, linked, renamed, removed, a folder made. Then the same command runs again. Fails unless each row is there
once.
`race`: three drivers at once do the same run, each all of its parts in an order of its own.
Forks from a process in which no thread was started: that takes milliseconds where a fresh interpreter takes seconds.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pandas  # noqa: F401 - pyarrow imports it when it makes Python values: once here, not in every fork

from tests.batch.workbench import Workbench, assert_each_row_once, visible

Bench = TypeVar("Bench", bound=Workbench)
CRASHED = 9
FILES, ROWS = 2, 200
CHANGES = {"os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def changes(event: str, args: tuple[Any, ...], below: str) -> bool:
    if event == "open":
        return isinstance(args[0], str) and args[0].startswith(below) and bool((args[2] or 0) & WRITING)
    if event not in CHANGES:
        return False
    relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # shutil.rmtree works from an open folder
    return relative or any(str(arg).startswith(below) for arg in args)


def crash_before(k: int, below: Path) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes(event, args, str(below)):
            seen += 1
            if seen == k:
                os._exit(CRASHED)

    sys.addaudithook(hook)


def in_child(work: Callable[[], None]) -> int:
    """The process id of a fork that does the work."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:  # noqa: BLE001 - told by the exit code
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish_and_check(bench: Workbench) -> None:
    summary = bench.score_and_run()
    assert_each_row_once(summary.folder, ROWS)
    assert [path.name for path in bench.output.iterdir() if path.name.startswith("run=")] == [Path(summary.folder).name]
    assert list((bench.output / "_open").glob("[!.]*")) == []
    assert not (Path(summary.folder) / "_tmp").exists()


def crash_everywhere(repository: Path, root: Path, every: int = 1) -> int:
    """The last moment at which a driver was ended."""
    for k in count(1, every):
        bench = Workbench(root, repository, f"output-{k}")

        def work(bench: Workbench = bench, k: int = k) -> None:
            crash_before(k, bench.output)
            bench.score_and_run()

        code = ended(in_child(work))
        if code == 0:
            return k - every
        assert code == CRASHED, f"crash {k}: the driver ended with {code}"
        manifests = list(bench.output.glob("run=*/_manifest/*.json"))
        shown = [path for path in visible(bench.output) if path.parts[1] == "data"]
        assert len(shown) in (0, FILES), f"crash {k}: part of the data is visible: {shown}"
        assert not manifests or len(shown) == FILES, f"crash {k}: committed without data"
        assert ended(in_child(lambda bench=bench: finish_and_check(bench))) == 0, f"crash {k}: the same command did not finish"
    raise AssertionError("it never ends")


def race(repository: Path, root: Path) -> None:
    race_with(lambda: Workbench(root, repository), finish_and_check)


def race_with(make: Callable[[], Bench], check: Callable[[Bench], None]) -> None:
    """Three drivers at once, each with a bench of its own; then the same command once more."""

    def drive(seed: int) -> None:
        bench = make()
        parts = [(seed + i) % FILES for i in range(FILES)]
        outcomes = bench.score(*parts)
        assert all(outcome.scored for outcome in outcomes), outcomes
        bench.run()

    drivers = [in_child(lambda seed=seed: drive(seed)) for seed in range(3)]
    assert [ended(pid) for pid in drivers] == [0, 0, 0]
    assert ended(in_child(lambda: check(make()))) == 0


if __name__ == "__main__":
    mode, repository, folder, *every = sys.argv[1:]
    if mode == "crash":
        print(crash_everywhere(Path(repository), Path(folder), *map(int, every)))
    else:
        race(Path(repository), Path(folder))
