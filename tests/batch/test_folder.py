"""A run's folder: of many attempts, crashes and drivers, each part has exactly one outcome."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from tests.batch.workbench import Workbench, assert_each_row_once, visible
from triform.errors import JobError, NotReconciled
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.runs.folder import RunFolder, open_run
from triform.runs.plan import Plan
from triform.runs.pointer import current
from triform.scoring import ScoredPart, score_part
from triform.stores import durable
from triform.stores.files import open_files


class Attempt(NamedTuple):
    id: str
    scored: ScoredPart
    data: Path
    dead: Path


class Race:
    """Attempts at part 0 of one run, whose dead letters differ: x = 12 is beyond the model's version 1, not beyond 2."""

    def __init__(self, bench: Workbench) -> None:
        bench.write("a.parquet", 0, x=[i % 20 for i in range(100)])
        self.folder, self.plan = bench.begin()
        self.root = Path(self.folder.location)
        repository = open_repository(bench.repository)
        self.predictors = {version: Predictor.load(repository.package("lookup", version)) for version in (1, 2)}

    def attempt(self, version: int) -> Attempt:
        attempt, data, dead = self.folder.attempt_files(0)
        footer = {"run": self.plan.run, "attempt": attempt}
        predictor, layout = self.predictors[version], self.plan.layout
        scored = score_part(self.plan.parts[0], predictor, layout, data=data, dead_letters=dead, footer=footer)
        assert scored.rows_dead == {1: 50, 2: 0}[version]
        return Attempt(attempt, scored, data, dead)

    def link(self, attempt: Attempt) -> None:
        """The first step of `place`, after which a worker may be killed."""
        assert durable.link_exclusively(attempt.data, self.root / "_data" / "part-00000.parquet")

    def assert_counts(self, winner: Attempt) -> None:
        """The winner's data and the winner's dead letters are the part, and nobody else's."""
        record = self.folder.record(0)
        assert record is not None
        assert (record.data, record.dead_letters, record.dead) == (
            winner.scored.data, winner.scored.dead_letters, winner.scored.dead,
        )  # fmt: skip
        letters = self.root / "_dead_letters" / "part-00000.parquet"
        assert letters.exists() == bool(winner.scored.dead)
        ids = pq.read_table(self.root / "_data" / "part-00000.parquet")["id"].to_pylist()
        ids += pq.read_table(letters)["id"].to_pylist() if letters.exists() else []
        assert sorted(ids) == list(range(100))


@pytest.fixture
def race(workbench: Workbench) -> Race:
    return Race(workbench)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (1, 1)])
def test_of_two_attempts_the_first_counts_with_its_own_dead_letters(race: Race, first: int, second: int) -> None:
    winner, zombie = race.attempt(first), race.attempt(second)
    placed = race.folder.place(winner.id, winner.scored)
    assert placed == winner.scored
    assert race.folder.place(zombie.id, zombie.scored) == placed
    race.assert_counts(winner)
    assert list((race.root / "_tmp").iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (1, 1)])
def test_whoever_comes_after_a_crash_completes_the_winners_work(race: Race, first: int, second: int) -> None:
    winner, later = race.attempt(first), race.attempt(second)
    race.link(winner)
    placed = race.folder.place(later.id, later.scored)
    race.assert_counts(winner)
    assert (placed.part, placed.rows_out) == (0, winner.scored.rows_out)
    assert race.folder.place(winner.id, winner.scored) == placed  # it was a zombie, not dead


@pytest.mark.parametrize("version", [1, 2])
def test_a_resume_adopts_an_orphan_and_its_zombie_changes_nothing(race: Race, version: int) -> None:
    assert race.folder.adopt(0) is None
    orphan = race.attempt(version)
    assert race.folder.adopt(0) is None
    race.link(orphan)
    adopted = race.folder.adopt(0)
    race.assert_counts(orphan)
    assert race.folder.adopt(0) == adopted == race.folder.place(orphan.id, orphan.scored)
    assert race.folder.recorded() == {0}


def test_an_adopted_orphan_commits(race: Race, workbench: Workbench) -> None:
    race.link(race.attempt(1))
    summary = workbench.run()
    assert (summary.scored, summary.manifest.rows_out, summary.manifest.dead) == (0, 50, {"run_failed": 50})


def test_a_zombie_that_comes_after_the_commit_changes_nothing(race: Race, workbench: Workbench) -> None:
    winner, zombie, late = race.attempt(1), race.attempt(2), race.attempt(2)
    race.folder.place(winner.id, winner.scored)
    race.folder.swap()
    with pytest.raises(JobError, match="finished by another driver"):
        race.folder.place(zombie.id, zombie.scored)
    workbench.run()
    seen = {path: (workbench.output / path).read_bytes() for path in visible(workbench.output)}
    with pytest.raises((JobError, OSError)):  # the attempts' files are gone
        race.folder.place(late.id, late.scored)
    assert seen == {path: (workbench.output / path).read_bytes() for path in visible(workbench.output)}


def test_dead_letters_that_are_gone_are_not_made_up(race: Race, workbench: Workbench) -> None:
    orphan = race.attempt(1)
    race.link(orphan)
    orphan.dead.unlink()
    with pytest.raises(NotReconciled, match=r"move .* away and run again"):
        race.folder.adopt(0)
    assert race.folder.recorded() == set()
    race.root.rename(workbench.root / "away")  # as the message says
    assert workbench.score_and_run().manifest.rows_in == 100


def test_dead_letters_of_another_attempt_are_not_taken(race: Race) -> None:
    orphan, other = race.attempt(1), race.attempt(1)
    race.link(orphan)
    durable.link_exclusively(other.dead, race.root / "_dead_letters" / "part-00000.parquet")
    with pytest.raises(NotReconciled, match="another attempt"):
        race.folder.adopt(0)


def test_a_file_that_is_not_the_parts_is_named(race: Race) -> None:
    target = race.root / "_data" / "part-00000.parquet"
    target.write_bytes(b"not ours")
    with pytest.raises(NotReconciled, match=r"part-00000\.parquet was not written by this job"):
        race.folder.adopt(0)
    target.unlink()
    scored = race.attempt(2)
    content = {"run": "another", "attempt": scored.id, "part": 0, "rows_in": 1, "rows_out": 1, "dead": {}}
    table = pq.read_table(scored.data).replace_schema_metadata({"triform": json.dumps(content)})
    pq.write_table(table, target)
    with pytest.raises(NotReconciled, match="run another"):
        race.folder.adopt(0)


def test_a_damaged_record_or_plan_is_named(race: Race) -> None:
    (race.root / "_parts" / "00000.json").write_bytes(b'{"part": 0')
    with pytest.raises(JobError, match=r"00000\.json is damaged"):
        race.folder.adopt(0)
    (race.root / "_run.json").write_bytes(b"\xff")
    with pytest.raises(JobError, match=r"_run\.json is damaged"):
        race.folder.plan()


def test_the_first_plan_is_frozen(workbench: Workbench) -> None:
    folder, plan = workbench.write_some(1).begin()
    later = Plan(**{name: getattr(plan, name) for name in plan.__struct_fields__} | {"model": "lookup/1"})
    assert folder.begin(later) == plan == folder.plan() == RunFolder(workbench.output, plan.run).begin(later)
    assert open_run(open_files(workbench.output), plan.job) == plan.run
    assert current(open_files(workbench.output)) is None


def run_crashes(*args: str) -> str:
    command = [sys.executable, "-m", "tests.batch.crashes", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_between_any_two_changes_of_files_loses_and_doubles_nothing(workbench: Workbench, every: int) -> None:
    workbench.write_some(2)
    last = int(run_crashes("crash", str(workbench.repository), str(workbench.root), str(every)))
    assert last > 50  # else the hook has missed some


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_drivers_at_once_make_one_set_of_rows(new_workbench: Callable[[str], Workbench], rounds: int) -> None:
    for i in range(rounds):
        bench = new_workbench(f"race-{i}").write_some(2)
        run_crashes("race", str(bench.repository), str(bench.root))
        (run,) = bench.output.glob("run=*")
        assert_each_row_once(run, 200)
