"""Deaths of actors on a real cluster: what is missing is done again, what kills is told, and each row is there once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.batch.killing import kill_actors, kill_the_greedy, meanwhile
from tests.batch.poison import fragile_bench, write_poison, x86
from tests.batch.workbench import Workbench, assert_each_row_once, visible, x_of
from triform.errors import PartCrashed

pytestmark = pytest.mark.usefixtures("ray_cluster")


@x86
def test_a_part_that_kills_ends_as_an_error_and_all_others_are_done(tmp_path: Path) -> None:
    bench = fragile_bench(tmp_path).write_some(5)
    poison = write_poison(bench, "2-poison.parquet", 500)
    with pytest.raises(PartCrashed, match=r"row groups 0 to 2 \(rows 0 to 99\): 2 actors died.*SIGFPE.*goes on") as told:
        bench.run(actors=2)
    assert str(poison) in str(told.value)
    assert len(list(bench.output.glob("run=*/_parts/[0-9]*.json"))) == 5
    assert visible(bench.output) == []
    poison.unlink()
    bench.write("2-mended.parquet", 500)
    assert_each_row_once(bench.score_and_run().folder, 600)


@pytest.mark.parametrize(("kills", "files"), [(4, 24), pytest.param(40, 240, marks=pytest.mark.slow)])
def test_actors_killed_at_random_moments_lose_and_double_no_row(workbench: Workbench, kills: int, files: int) -> None:
    """As many runs as it takes: the file system and Ray are fast on some machines."""
    chance = random.Random(kills)
    for i in range(files):
        workbench.write(f"{i:03d}.parquet", i * 4000, 4000, group=1000)
    killed: list[int] = []
    runs = 0
    while len(killed) < kills:
        runs += 1
        bench = Workbench(workbench.root, workbench.repository, f"output-{runs}")
        with meanwhile(kill_actors(kills, chance, killed)):
            summary = bench.run(actors=2)
        assert summary.scored == files * 4000
        assert_each_row_once(summary.folder, files * 4000)
    print(f"{len(killed)} actors killed in {runs} run(s)")


@pytest.mark.slow
def test_memory_that_runs_out_in_the_actor_suffices_in_the_child(workbench: Workbench, ray_cluster: Any) -> None:
    """The first rows of each row group are small, so that nobody can foresee the others: 16,384 of them are 330 MB."""
    rows = 20_000
    path = workbench.input / "swelling.parquet"
    path.parent.mkdir()
    notes = ["small" if row < 64 else "x" * (20_000 + row % 5) for row in range(rows)]
    columns = {"id": pa.array(range(rows), pa.int64()), "x": pa.array(map(x_of, range(rows)), pa.int64()), "note": notes}
    pq.write_table(pa.table(columns), path, row_group_size=rows, dictionary_pagesize_limit=4 << 20, compression="zstd")
    assert path.stat().st_size < 10 << 20
    killed: list[int] = []
    with meanwhile(kill_the_greedy(path, 480 << 20, killed)):
        summary = workbench.run(actors=1)
    assert len(killed) == 2
    assert "done at attempt 3" in workbench.said
    assert_each_row_once(summary.folder, rows)
