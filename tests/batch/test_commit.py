"""Nothing is visible before every row is accounted for; afterwards `verify` proves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch.job import Summary
from tests.batch.workbench import DEAD_OF_100, Workbench, assert_each_row_once, visible
from triform.errors import InputChanged, JobError, NotReconciled, OutputExists, TooManyDeadLetters
from triform.package import file_entry
from triform.runs import commit
from triform.runs.folder import RunFolder
from triform.runs.pointer import Current, current, point_at
from triform.stores.files import open_files


def folder_of(summary: Summary) -> RunFolder:
    return RunFolder(Path(summary.folder).parent, summary.manifest.run)


def test_a_commit_counts_every_row(workbench: Workbench) -> None:
    summary = workbench.write_some(3).score_and_run()
    assert_each_row_once(summary.folder, 300)
    done = summary.manifest
    assert done.dead == {code: 3 * rows for code, rows in DEAD_OF_100.items()}
    assert list(done.dead) == ["missing_value", "run_failed"]  # the commonest first
    assert (done.rows_in, done.rows_out, done.rows_dead) == (300, 258, 42)
    assert (done.pinned.ref, done.model, done.key, len(done.parts)) == ("lookup/1", "lookup@stable", ("id",), 3)
    now = current(open_files(workbench.output))
    assert now is not None
    assert (now.run, now.previous) == (done.run, None)
    assert commit.verify(folder_of(summary))[0] == "counts: 300 rows in = 258 answered + 42 dead letters"


def test_no_rows_are_committed_too(workbench: Workbench) -> None:
    workbench.write("empty.parquet", 0, 0)
    summary = workbench.score_and_run()
    assert (summary.manifest.rows_in, summary.manifest.rows_out) == (0, 0)
    empty = duckdb.read_parquet(f"{summary.data}/*.parquet", hive_partitioning=False)
    assert (empty.columns, empty.fetchall()) == (["id", "note", "y", "_model_version", "_scored_at"], [])
    commit.verify(folder_of(summary))


def spoil_input(bench: Workbench) -> None:
    bench.write("1.parquet", 100, note=["other"] * 100)


def remove_input(bench: Workbench) -> None:
    (bench.input / "1.parquet").unlink()


def remove_data(bench: Workbench) -> None:
    next(bench.output.glob("run=*/_data/part-00001.parquet")).unlink()


def remove_letters(bench: Workbench) -> None:
    next(bench.output.glob("run=*/_dead_letters/part-00001.parquet")).unlink()


def shorten_data(bench: Workbench) -> None:
    file = next(bench.output.glob("run=*/_data/part-00001.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)


def stray_data(bench: Workbench) -> None:
    (next(bench.output.glob("run=*/_data")) / "stray.parquet").write_bytes(b"")


def stray_letters(bench: Workbench) -> None:
    (next(bench.output.glob("run=*/_dead_letters")) / "stray.parquet").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (spoil_input, InputChanged, r"1 input file.*1\.parquet"),
        (remove_input, InputChanged, r"1 input file.*1\.parquet"),
        (remove_data, NotReconciled, r"part 1 .*1\.parquet"),
        (remove_letters, NotReconciled, r"part 1 .*1\.parquet"),
        (shorten_data, NotReconciled, "part-00001"),
        (stray_data, NotReconciled, r"_data holds files of no part: stray\.parquet"),
        (stray_letters, NotReconciled, r"_dead_letters holds files of no part: stray\.parquet"),
    ],
)
def test_what_does_not_add_up_is_not_committed(
    workbench: Workbench, spoil: Callable[[Workbench], None], error: type[JobError], names: str
) -> None:
    workbench.write_some(3)
    assert all(outcome.scored for outcome in workbench.score())
    folder, plan = workbench.begin()
    spoil(workbench)
    with pytest.raises(error, match=names):
        commit.commit(folder, plan, max_dead_letters=0.5)
    assert visible(workbench.output) == []
    assert not folder.committed()
    with pytest.raises(JobError, match="is not committed"):
        commit.verify(folder)


def test_a_part_that_is_not_done_is_not_committed(workbench: Workbench) -> None:
    workbench.write_some(3).score(0, 2)
    with pytest.raises(NotReconciled, match="part 1 is not done"):
        commit.commit(*workbench.begin(), max_dead_letters=0.5)
    assert visible(workbench.output) == []


def test_too_many_dead_letters_name_their_reasons_and_a_larger_limit_goes_on(workbench: Workbench) -> None:
    workbench.write_some(3).score()
    records = {p: p.stat().st_mtime_ns for p in workbench.output.glob("run=*/_parts/*")}
    with pytest.raises(TooManyDeadLetters, match=r"42 of 300 rows .*14\.00%.*13\.00%.*missing_value 30, run_failed 12"):
        workbench.run(max_dead_letters=0.13)
    assert visible(workbench.output) == []
    summary = workbench.run(max_dead_letters=0.14)
    assert summary.scored == 0
    assert_each_row_once(summary.folder, 300)
    assert records == {p: p.stat().st_mtime_ns for p in workbench.output.glob("run=*/_parts/*")}


@pytest.mark.parametrize("start", [50, 103], ids=["many", "one answered, one a dead letter"])
def test_keys_that_repeat_are_refused_with_examples(workbench: Workbench, start: int) -> None:
    workbench.write("0.parquet", 0)
    if start == 50:
        workbench.write("1.parquet", start)
        names = r"the key \(id\) is not unique.*\(2 times\); "
    else:
        workbench.write("1.parquet", 100, id=[3, *range(101, 200)])
        names = r"not unique, so nothing is committed: 3 \(2 times\)$"
    workbench.score()
    with pytest.raises(NotReconciled, match=names):
        workbench.run()
    assert visible(workbench.output) == []
    workbench.score(key=(), keep=("id",))
    assert workbench.run(key=(), keep=("id",)).manifest.rows_in == 200  # nobody asked for unique ids


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def repeat_a_key(path: Path) -> None:
    """As if the commit had been made with a broken check: digests and counts agree, the keys do not."""
    table = pq.read_table(path / "data" / "part-00000.parquet")
    ids = pa.array([1, 1, *table["id"].to_pylist()[2:]])
    pq.write_table(table.set_column(0, table.schema.field("id"), ids), path / "data" / "part-00000.parquet")
    manifest = json.loads((path / "_manifest" / "000001.json").read_text())
    entry = file_entry(path / "data" / "part-00000.parquet")
    manifest["parts"][0]["data"] = {"sha256": entry.sha256, "size": entry.size}
    edit(path / "_manifest" / "000001.json", parts=manifest["parts"])


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda run: flip(run / "data" / "part-00001.parquet"), r"part-00001\.parquet is not the file"),
        (lambda run: flip(run / "dead_letters" / "part-00001.parquet"), r"dead_letters/part-00001\.parquet is not the file"),
        (lambda run: (run / "data" / "part-00001.parquet").unlink(), r"part-00001\.parquet cannot be read"),
        (lambda run: (run / "dead_letters").rename(run / "moved"), r"dead_letters/part-00000\.parquet cannot be read"),
        (lambda run: (run / "data").rename(run / "moved"), r"data/part-00000\.parquet cannot be read"),
        (lambda run: (run / "data" / "stray.parquet").write_bytes(b""), "stray.parquet"),
        (lambda run: (run / "dead_letters" / "stray.parquet").write_bytes(b""), "stray.parquet"),
        (lambda run: edit(run / "_manifest" / "000001.json", rows_out=259), "counts 259"),
        (lambda run: edit(run / "_manifest" / "000001.json", dead={}), "counts 258"),
        (lambda run: edit(run / "_manifest" / "000001.json", run="other"), "different runs"),
        (lambda run: edit(run / "_manifest" / "000001.json", parts=[]), "different runs"),
        (lambda run: (run / "_manifest" / "000001.json").write_text("{}"), "damaged"),
        (lambda run: (run / "_run.json").unlink(), "holds no run"),
        (repeat_a_key, r"not unique.*1 \(2 times\)"),
    ],
)  # fmt: skip
def test_verify_finds(workbench: Workbench, spoil: Callable[[Path], Any], names: str) -> None:
    summary = workbench.write_some(3).score_and_run()
    commit.verify(folder_of(summary))
    spoil(Path(summary.folder))
    with pytest.raises(JobError, match=names):
        commit.verify(folder_of(summary))


def test_a_second_commit_is_the_first(workbench: Workbench) -> None:
    summary = workbench.write_some(1).score_and_run()
    folder = folder_of(summary)
    assert commit.commit(folder, folder.plan(), max_dead_letters=0.0) == summary.manifest


def test_of_two_jobs_that_commit_at_once_the_second_is_told(workbench: Workbench) -> None:
    """Both began when the output stood for nothing."""
    workbench.write_some(2)
    one, two = ({"input": (str(workbench.input / f"{i}.parquet"),)} for i in range(2))
    for job_of in one, two:
        assert all(outcome.scored for outcome in workbench.score(**job_of))
    first = workbench.run(**one)
    with pytest.raises(OutputExists, match=first.manifest.run):
        workbench.run(**two)
    now = current(open_files(workbench.output))
    assert now is not None
    assert now.run == first.manifest.run
    assert visible(workbench.output) == [path for path in visible(workbench.output) if Path(first.folder).name in path.parts]


def test_the_pointer_is_a_log_that_each_writer_extends_once(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    point_at(files, "a", "then", "fail")
    point_at(files, "a", "then", "fail")
    with pytest.raises(OutputExists):
        point_at(files, "b", "then", "fail")
    point_at(files, "b", "later", "replace")
    assert current(files) == Current("b", "a", "later")
    assert len(list((tmp_path / "_current").iterdir())) == 2


@pytest.mark.parametrize(("rows", "most", "allowed"), [(100, 0.29, 29), (100, 0.0, 0), (3, 1.0, 3), (1000, 0.0019, 1)])
def test_the_allowed_share_is_not_rounded_away(rows: int, most: float, allowed: int) -> None:
    assert commit.allowed_dead(rows, most) == allowed
