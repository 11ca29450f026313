"""`python -m batch run`, killed with kill -9 at any moment: the same command finishes, each row exactly once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.batch.killing import family, started
from tests.batch.workbench import Workbench, assert_each_row_once, read_rows, visible
from triform.golden import child_env
from triform.releases import Canary, ReleaseLog
from triform.repository import open_repository
from triform.splitting import KeyRule, TrafficSplit

FILES, ROWS = 20, 2000  # some seconds of work


def recorded(bench: Workbench) -> int:
    return len(list(bench.output.glob("run=*/_parts/[0-9]*.json")))


def has_recorded(bench: Workbench, parts: int) -> bool:
    return recorded(bench) >= parts


@contextmanager
def driver(bench: Workbench, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own. Whatever descends from it has ended afterwards."""
    command = [
        sys.executable, "-m", "batch", "run", "--repository", bench.repository, "--model", "lookup@stable",
        "--input", bench.input, "--output", bench.output, "--key", "id",
        "--keep", "note", "--max-dead-letters", "0.5", "--actors", "1", *args,
    ]  # fmt: skip
    with started(*command) as process:
        yield process


def left_after(seconds: float, processes: list[psutil.Process]) -> list[str]:
    """What still runs then. A process that nobody reaped (a zombie) has ended. Ray's agents, which score nothing, may take a
    minute to notice, and are ended here."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it ended between the two
            return False

    def is_agent(process: psutil.Process) -> bool:
        """By its name or, before it has renamed itself, by what it was started with."""
        try:
            return any("agent" in word.lower() for word in (process.name(), *process.cmdline()))
        except psutil.Error:
            return False

    def working() -> list[psutil.Process]:
        return [p for p in processes if runs(p) and not is_agent(p)]

    deadline = time.monotonic() + seconds
    while (left := working()) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process in left:
                names.append(f"{process.pid} {process.name()}")
            process.kill()
    return names


def kill_when(bench: Workbench, moment: Callable[[], bool], *args: str) -> bool:
    """Starts the command and kills its driver, and only that, as soon as `moment()` holds; False if it ended before.

    The Ray that it started ends by itself.
    """
    with driver(bench, *args) as process:
        while not moment():
            if process.poll() is not None:
                assert process.returncode == 0, process.stdout.read() if process.stdout else ""
                return False
            time.sleep(0.002)
        started = [p for p in family(process.pid) if p.pid != process.pid]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if not list(bench.output.glob("run=*/_manifest/0*.json")):
            shown = [path for path in visible(bench.output) if path.parts[1] == "data"]
            assert len(shown) in (0, FILES)  # all, if the folders were renamed already
        assert left_after(20, started) == []
    return True


def finish(bench: Workbench, *args: str) -> None:
    with driver(bench, *args) as process:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    (run,) = bench.output.glob("run=*")
    assert_each_row_once(run, FILES * ROWS)
    assert "Traceback" not in said


@pytest.mark.parametrize("own_ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_is_finished_by_the_same_command(workbench: Workbench, ray_cluster: Any, *, own_ray: bool) -> None:
    """In a cluster that outlives the driver, so that its actors may be zombies; at first, perhaps, with a Ray of its own."""
    for i in range(FILES):
        workbench.write(f"{i:02d}.parquet", i * ROWS, ROWS)
    there = "--address", ray_cluster.get_runtime_context().gcs_address
    assert kill_when(workbench, lambda: recorded(workbench) >= 3, *(() if own_ray else there))
    after_first = recorded(workbench)
    assert 3 <= after_first < FILES
    assert kill_when(workbench, lambda: recorded(workbench) >= after_first + 5, *there)
    assert visible(workbench.output) == []
    finish(workbench, *there)


@pytest.mark.slow
def test_a_killed_run_that_a_canary_shares_goes_on_as_it_began(workbench: Workbench, ray_cluster: Any) -> None:
    """Its share has grown and it was taken off in the meantime."""
    workbench.repository = Path(shutil.copytree(workbench.repository, workbench.root / "models"))
    log = ReleaseLog(open_repository(workbench.repository), "lookup")
    split = TrafficSplit.of(log.set(canary=Canary(2, 0.3, KeyRule(column="id"))))
    for i in range(FILES):
        workbench.write(f"{i:02d}.parquet", i * ROWS, ROWS)
    there = "--split", "--address", ray_cluster.get_runtime_context().gcs_address
    for change in partial(log.set, canary=Canary(2, 0.9)), log.rollback:
        wanted = recorded(workbench) + 3
        assert kill_when(workbench, partial(has_recorded, workbench, wanted), *there)
        change()
    finish(workbench, *there)
    (run,) = workbench.output.glob("run=*")
    rows = read_rows(run / "data")
    chosen = [split.choose(str(row).encode()) for row in rows["id"].to_pylist()]
    assert rows["_model_version"].to_pylist() == [f"lookup/{version}" for version in chosen]
    assert set(chosen) == {1, 2}


def at_random(bench: Workbench, chance: random.Random, starting: float) -> Callable[[], bool]:
    """A moment of a driver: while it starts, which takes about that many seconds, some parts later, or while it commits."""
    parts = chance.choice([0, recorded(bench) + 1 + chance.randrange(4), FILES])
    seconds = chance.random() * (starting if parts == 0 else 1.0)
    began = time.monotonic()
    return lambda: recorded(bench) >= parts and time.monotonic() - began >= seconds


@pytest.mark.parametrize(
    ("kills", "own_ray"), [(3, False), *(pytest.param(*full, marks=pytest.mark.slow) for full in [(8, True), (32, False)])]
)
def test_drivers_killed_at_random_moments(
    new_workbench: Callable[[str], Workbench], kills: int, own_ray: bool, ray_cluster: Any
) -> None:
    """Over as many runs as it takes, with a Ray of their own or in a cluster that stays, where their actors may be zombies."""
    chance = random.Random(kills)
    there = () if own_ray else ("--address", ray_cluster.get_runtime_context().gcs_address)
    killed = runs = 0
    while killed < kills:
        runs += 1
        bench = new_workbench(f"run-{runs}")
        for i in range(FILES):
            bench.write(f"{i:02d}.parquet", i * ROWS, ROWS)
        while killed < kills and kill_when(bench, at_random(bench, chance, 10.0 if own_ray else 4.0), *there):
            killed += 1
        finish(bench, *there)
    print(f"{killed} drivers killed in {runs} run(s)")


@pytest.mark.slow
@pytest.mark.parametrize("then", ["replaced", "gone"])
def test_a_node_that_is_lost_costs_no_row_and_counts_against_no_part(workbench: Workbench, then: str) -> None:
    command = [sys.executable, "-m", "tests.batch.lost_node", str(workbench.repository), str(workbench.root), then]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=child_env())
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
