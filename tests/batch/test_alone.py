"""A part over which two processes died runs in a child: it is finished there, or told with its file, row groups and signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from batch.actor import Attempted, Outcome, PartScorer
from batch.alone import free_memory, how_it_died
from batch.attempts import IN_ALL, LOADING, Attempt, OneProcess
from tests.batch.poison import fragile_bench, write_poison, x86
from tests.batch.workbench import Workbench, assert_each_row_once, visible
from triform.golden import child_env
from triform.runtime import RuntimeOptions
from triform.scoring import ScoredPart


def score_after(deaths: int, bench: Workbench, part: int) -> Outcome:
    """The outcome of a part over which so many processes have died."""
    attempts = OneProcess()
    for i in range(deaths):
        attempts.begin(part, Attempt(f"died-{i}", "here"))
    folder, _ = bench.begin()
    return PartScorer(str(bench.output), folder.run, RuntimeOptions(), 1000, attempts).score(part)


def children() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended
            if "batch.alone" in process.cmdline():
                found.append(process)
    return found


def test_the_third_attempt_is_a_child_and_its_rows_are_the_part(workbench: Workbench) -> None:
    workbench.write_some(2)
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            seen.extend(p.pid for p in children())

    watcher = threading.Thread(target=look)
    watcher.start()
    outcome = score_after(2, workbench, 1)
    over.set()
    watcher.join()
    assert outcome.scored is not None, outcome
    assert (outcome.scored.rows_in, outcome.attempts) == (100, 3)
    assert len(set(seen)) == 1
    assert_each_row_once(workbench.score_and_run().folder, 200)


def test_the_first_two_attempts_are_not(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    workbench.write_some(1)
    assert score_after(1, workbench, 0).attempts == 2
    assert score_after(1, workbench, 0).scored


@x86
def test_a_part_that_kills_the_child_too_is_told_with_its_place_and_the_others_go_on(tmp_path: Path) -> None:
    bench = fragile_bench(tmp_path).write_some(2)
    poison = write_poison(bench, "poison.parquet", 200)
    outcome = score_after(2, bench, 2)
    assert (outcome.scored, outcome.code, outcome.attempts) == (None, "part_crashed", 3)
    assert f"{poison}, row groups 0 to 2 (rows 0 to 99): 2 actors died" in outcome.error
    assert "process of its own (SIGFPE)" in outcome.error
    assert all(other.scored for other in bench.score(0, 1))
    assert visible(bench.output) == []


def test_a_part_is_not_tried_for_ever(workbench: Workbench) -> None:
    workbench.write_some(1)
    outcome = score_after(IN_ALL, workbench, 0)
    assert (outcome.scored, outcome.code) == (None, "part_crashed")
    assert f"{IN_ALL} processes died" in outcome.error


def test_an_error_in_the_child_keeps_its_kind(workbench: Workbench) -> None:
    path = workbench.write_some(1).input / "0.parquet"
    workbench.begin()
    os.utime(path, ns=(1, 1))
    folder = next(workbench.output.glob("run=*"))
    attempts = OneProcess()
    for i in range(2):
        attempts.begin(0, Attempt(f"died-{i}", "here"))
    run = folder.name.removeprefix("run=")
    outcome = PartScorer(str(workbench.output), run, RuntimeOptions(), 1000, attempts).score(0)
    assert (outcome.code, outcome.attempts) == ("input_changed", 3), outcome.error


def test_a_model_that_kills_whoever_loads_it_is_not_loaded_for_ever(workbench: Workbench) -> None:
    workbench.write_some(1)
    folder, _ = workbench.begin()
    attempts = OneProcess()
    for i in range(LOADING + 1):  # a fresh process of the same actor each time
        attempts.load("here", Attempt(f"died-{i}", "here"))
    attempts.introduce = lambda: ("here", Attempt("now", "here"))  # type: ignore[method-assign]
    outcome = PartScorer(str(workbench.output), folder.run, RuntimeOptions(), 1000, attempts).score(0)
    assert outcome.code == "model_crashed"
    assert "lookup/1: 4 processes died one after another while they loaded the model" in outcome.error


def test_the_child_ends_with_its_parent(workbench: Workbench) -> None:
    """A parent that is killed leaves no child behind that goes on writing."""
    workbench.write("long.parquet", 0, 2_000_000, group=500_000)
    folder, _ = workbench.begin()
    code = f"""
from batch.alone import Work, score_alone
from triform.runtime import RuntimeOptions
score_alone(Work(output={str(workbench.output)!r}, run={folder.run!r}, part=0, options=RuntimeOptions(), max_dead=10**9))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env=child_env())
    while not (born := psutil.Process(parent.pid).children()):
        time.sleep(0.01)
    while not list(Path(folder.where(folder.temporary)).glob("part-*")):
        assert born[0].is_running()
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, left = psutil.wait_procs(born, timeout=10)
    assert left == []
    assert folder.recorded() == set()


def test_a_death_is_told_in_words() -> None:
    assert how_it_died(-9) == "SIGKILL, most likely because memory ran out"
    assert (how_it_died(-11), how_it_died(3), how_it_died(-77)) == ("SIGSEGV", "exit code 3", "signal 77")


def test_free_memory_is_the_least_of_machine_and_cgroup(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(meminfo, tmp_path) == 4000 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(meminfo, tmp_path) == 4000 << 10
    (tmp_path / "memory.max").write_text("3000\n")
    assert free_memory(meminfo, tmp_path) == 2000
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 600\nslab_reclaimable 50\n")  # files that were read
    assert free_memory(meminfo, tmp_path) == 2650
    assert free_memory(tmp_path / "none", tmp_path / "none") is None


def test_a_load_is_told_once(workbench: Workbench) -> None:
    (first,), *others = [outcome.loads for outcome in workbench.write_some().score()]
    assert (first.form, first.model, first.version) == ("batch", "lookup", 1)
    assert first.stages.keys() == {"fetch", "verify", "session", "warmup"}
    assert others
    assert set(others) == {()}


def test_two_threads_score_one_after_the_other_and_each_part_once(workbench: Workbench) -> None:
    """As Ray calls an actor: one thread places what it has scored while the other scores."""
    folder, plan = workbench.write_some(8).begin()
    attempts = OneProcess()
    scorer = PartScorer(folder.files.location, folder.run, RuntimeOptions(), 1000, attempts)
    at_work: list[int] = []
    most = 0
    attempt, place = scorer._attempt, scorer.folder.place

    def counted(number: int) -> Attempted:
        nonlocal most
        at_work.append(number)
        most = max(most, len(at_work))
        try:
            return attempt(number)
        finally:
            at_work.remove(number)

    def watched(name: str, scored: ScoredPart) -> ScoredPart:
        assert attempts.is_open(scored.part)  # a process that dies here has died over this part
        return place(name, scored)

    scorer._attempt = counted  # type: ignore[method-assign]
    scorer.folder.place = watched  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(scorer.score, range(len(plan.parts))))
    assert most == 1
    assert [outcome.code for outcome in outcomes] == [""] * len(plan.parts)
    assert_each_row_once(workbench.run().folder, 800)
