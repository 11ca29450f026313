"""Runs a program and measures its whole process tree: wall time, CPU seconds, peak memory.

    Popen -> a look at the tree ten times a second -> Usage

The program says in its result file when its work began and ended (`peers/task.py`): what comes before is start-up. A process
that ends between two looks takes the CPU time since the last look with it, at most a tenth of a second's worth.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

EVERY = 0.1  # seconds
# Processes that hold no rows: Ray's daemons, its own actors and idle workers.
HELPERS = ("gcs_server", "raylet", "ray/_private", "ray/dashboard", "ray::IDLE", "ray::_", "ray::DashboardAgent")
HELPERS += ("ray::RuntimeEnvAgent", "ray::ActorLocationTracker", "ray::JobSupervisor", "ray::AutoscalingRequester")


class Look(NamedTuple):
    """One look at the tree. Memory in bytes; `cpu` in seconds since the start, of all processes there ever were."""

    at: float
    cpu: float
    scoring: int  # resident memory of the processes that hold rows
    largest: int  # of the largest of these
    total: int


class Usage(NamedTuple):
    """`cpu` is from `begin` to `end`, and so is `seconds` where the program does not tell it; `wall` and `cpu_total` are of the
    whole program; memory in bytes, peaks.
    """

    seconds: float
    wall: float
    cpu: float
    cpu_total: float
    scoring: int
    largest: int
    total: int
    steady: float | None = None  # rows/s without each worker's first file, where the program tells it


class ProgramFailed(RuntimeError):
    """The program ended with an error or took too long; the message has the end of what it wrote."""


def measured(
    command: Sequence[str], result: Path, *, env: dict[str, str], timeout: float = 300.0, driver_scores: bool = False
) -> Usage:
    """Runs the command to its end. `driver_scores`: the started process itself holds rows, not only its children."""
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    looks: list[Look] = []
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        tree = Tree(process.pid, driver_scores)
        try:
            while process.poll() is None:
                looks.append(tree.look())
                if time.time() - started > timeout:
                    raise ProgramFailed(f"{' '.join(command)}: not done after {timeout:.0f} s")
                time.sleep(EVERY)
        finally:
            tree.end()
    wall = time.time() - started
    if process.returncode or not result.exists():
        raise ProgramFailed(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    return _usage(looks, json.loads(result.read_text()), wall)


def _usage(looks: Sequence[Look], told: dict[str, float], wall: float) -> Usage:
    begin, end = told["begin"], told["end"]
    return Usage(
        seconds=told.get("seconds", end - begin),
        wall=wall,
        cpu=_cpu_at(looks, end) - _cpu_at(looks, begin),
        cpu_total=looks[-1].cpu,
        scoring=max(look.scoring for look in looks),
        largest=max(look.largest for look in looks),
        total=max(look.total for look in looks),
        steady=told.get("steady"),
    )


def _cpu_at(looks: Sequence[Look], at: float) -> float:
    """CPU seconds at a moment, between two looks by the straight line."""
    before = [look for look in looks if look.at <= at]
    after = [look for look in looks if look.at > at]
    if not before or not after:
        return (before or after)[-1 if before else 0].cpu
    a, b = before[-1], after[0]
    return a.cpu + (b.cpu - a.cpu) * (at - a.at) / (b.at - a.at)


class Tree:
    """A process and all that came from it."""

    def __init__(self, pid: int, driver_scores: bool) -> None:
        self._root = psutil.Process(pid)
        self._driver_scores = driver_scores
        self._known: dict[psutil.Process, float] = {self._root: 0.0}
        self._scored: set[psutil.Process] = set()

    def look(self) -> Look:
        at, scoring, total = time.time(), [0], 0
        for process in self._living():
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info().rss
                    if self._scores(process):
                        self._scored.add(process)
            except psutil.Error:
                continue
            self._known[process] = times.user + times.system
            total += memory
            if process in self._scored:
                scoring.append(memory)
        return Look(at, sum(self._known.values()), sum(scoring), max(scoring), total)

    def _living(self) -> set[psutil.Process]:
        """Children are asked of every process known: one whose parent has ended is no longer below the root."""
        for process in [self._root, *self._known]:
            try:
                for child in process.children(recursive=process == self._root):
                    self._known.setdefault(child, 0.0)
            except psutil.Error:
                continue
        return {process for process in self._known if process.is_running()}

    def _scores(self, process: psutil.Process) -> bool:
        if process == self._root:
            return self._driver_scores
        line = " ".join(process.cmdline())
        return bool(line) and not any(helper in line for helper in HELPERS)

    def end(self) -> None:
        """Leaves no process of the tree behind."""
        left = [process for process in self._living() if process.is_running()]
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=10)
