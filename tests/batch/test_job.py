"""Jobs from end to end. Parts that a test only needs done are scored in this process; `ray_cluster` marks the tests with Ray."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.dataset as ds
import pytest

from batch import job
from tests.batch.workbench import Workbench, assert_each_row_once, read_rows, visible
from triform import testing
from triform.errors import (
    AliasNotFound,
    ConfigurationError,
    DigestMismatch,
    InputUnreadable,
    InvalidInput,
    OutputExists,
    TooManyDeadLetters,
)
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.runs.pointer import current
from triform.stores.files import open_files

COLUMNS = ["id", "note", "y", "_model_version", "_scored_at"]


@pytest.fixture
def own(workbench: Workbench) -> Workbench:
    """A workbench whose repository the test may change."""
    shutil.copytree(workbench.repository, workbench.root / "models")
    workbench.repository = workbench.root / "models"
    return workbench


def release(bench: Workbench, version: int) -> None:
    ReleaseLog(open_repository(bench.repository), "lookup").set(stable=version)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("actors", "said"),
    [
        (9, "room for 4: going on with 4"),
        pytest.param(None, "", marks=pytest.mark.slow),
        pytest.param(4, "", marks=pytest.mark.slow),
        pytest.param("1:2", "", marks=pytest.mark.slow),
    ],
)
def test_a_job_on_ray_scores_each_row_once(workbench: Workbench, actors: str | int | None, said: str) -> None:
    """Also with as many actors as the cluster has CPUs, which a naive pipeline waits for for ever."""
    recording = testing.RecordingTelemetry()
    workbench.write_some(6)
    summary = job.run(workbench.spec(actors=actors), workbench.console, recording)
    assert_each_row_once(summary.folder, 600)
    assert said in workbench.said
    assert "600 rows in 6 file(s), 6 part(s), model lookup/1" in workbench.said
    assert "600 of 600 rows" in workbench.said
    assert (summary.scored, summary.rows_per_second > 0) == (600, True)
    assert sum(record.rows for record in recording.records) == summary.manifest.rows_out
    assert {(r.form, r.model, r.version, r.code) for r in recording.records} == {("batch", "lookup", 1, "ok")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_partial_run_goes_on_with_the_version_that_it_pinned(own: Workbench) -> None:
    own.write_some(4).score(1, 3)
    before = {p: p.read_bytes() for p in own.output.glob("run=*/_parts/*")}
    assert len(before) == 2
    release(own, 2)
    summary = own.run(actors=1)
    assert "going on with run" in own.said
    assert "2 of 4 parts were done before" in own.said
    assert (summary.scored, summary.manifest.pinned.ref) == (200, "lookup/1")
    assert_each_row_once(summary.folder, 400)
    assert set(read_rows(summary.data)["_model_version"].to_pylist()) == {"lookup/1"}
    assert len(read_rows(summary.data)["_scored_at"].unique()) == 1
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.usefixtures("ray_cluster")
def test_what_fails_on_ray_is_one_error_and_finished_parts_are_kept(own: Workbench) -> None:
    own.write_some(2)
    own.write("all-null.parquet", 1000, x=[None] * 100)
    with pytest.raises(TooManyDeadLetters, match=r"all-null\.parquet: 100 dead letters.*missing_value 100.*goes on"):
        own.run(max_dead_letters=0.2, actors=1)
    assert visible(own.output) == []
    summary = own.run(max_dead_letters=0.5, actors=1)
    assert summary.manifest.rows_in == 300
    assert summary.scored < 300


@pytest.mark.usefixtures("ray_cluster")
def test_a_package_that_was_exchanged_does_not_go_on(own: Workbench) -> None:
    own.write_some(2).score(0)
    version = own.repository / "lookup" / "1"
    shutil.rmtree(version)
    other = testing.lookup(own.root / "other.onnx", entries=11)
    package_model(other, name="lookup", repository=open_repository(own.repository), version=1)
    with pytest.raises(DigestMismatch, match="lookup/1 is not the package this run began with"):
        own.run(actors=1)
    assert visible(own.output) == []


def test_a_finished_job_has_nothing_left_to_do(workbench: Workbench) -> None:
    first = workbench.write_some(2).score_and_run()
    again = workbench.run()
    assert (again.scored, again.manifest, again.rows_per_second) == (0, first.manifest, 0.0)
    assert "committed already" in workbench.said


def test_an_output_stands_for_one_run_until_it_is_replaced(own: Workbench) -> None:
    first = own.write_some(2).score_and_run()
    content = {path: (own.output / path).read_bytes() for path in visible(own.output)}
    release(own, 2)
    with pytest.raises(OutputExists, match=f"run {first.manifest.run}.*--if-exists replace"):
        own.run()
    assert {path: (own.output / path).read_bytes() for path in visible(own.output)} == content
    second = own.score_and_run(if_exists="replace")
    assert second.manifest.pinned.ref == "lookup/2"
    now = current(open_files(own.output))
    assert now is not None
    assert (now.run, now.previous) == (second.manifest.run, first.manifest.run)
    assert_each_row_once(first.folder, 200)  # stays readable
    assert_each_row_once(second.folder, 200)


def test_another_job_is_not_mixed_into_an_output(workbench: Workbench) -> None:
    workbench.write_some(3)
    first = workbench.score_and_run(input=(str(workbench.input / "0.parquet"),))
    with pytest.raises(OutputExists):
        workbench.run()
    second = workbench.score_and_run(if_exists="replace")
    assert first.folder != second.folder
    assert_each_row_once(first.folder, 100)
    assert_each_row_once(second.folder, 300)


def test_a_replacing_run_shows_nothing_before_its_commit(workbench: Workbench) -> None:
    workbench.write_some(3)
    workbench.score_and_run(input=(str(workbench.input / "0.parquet"),))
    before, now = visible(workbench.output), current(open_files(workbench.output))
    workbench.score(0, 1, if_exists="replace")
    assert (visible(workbench.output), current(open_files(workbench.output))) == (before, now)


def test_a_run_folder_that_was_moved_away_is_begun_anew(workbench: Workbench) -> None:
    workbench.write_some(2).score(0)
    (run,) = workbench.output.glob("run=*")
    run.rename(workbench.root / "away")
    assert_each_row_once(workbench.score_and_run().folder, 200)


@pytest.mark.parametrize("folder", ["day=2013-01-01/carrier=a%2Fb", "x=..", "_x=1", "x=", "month=[1] *", "x=ü 'quoted\" y"])
def test_partitions_with_odd_names_are_inputs(workbench: Workbench, folder: str) -> None:
    workbench.write(f"{folder}/part-0.parquet", 0)
    summary = workbench.score_and_run()
    assert_each_row_once(summary.folder, 100)
    assert set(read_rows(Path(summary.folder) / "dead_letters")["source_file"].to_pylist()) == {
        str(workbench.input / folder / "part-0.parquet")
    }


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"input": ("absent-*.parquet",)}, InputUnreadable, "absent"),
        ({"key": ("nope",)}, InvalidInput, "nope"),
        ({"keep": ("y",)}, InvalidInput, "'y'"),
        ({"model": "lookup@canary"}, AliasNotFound, "canary"),
        ({"repository": "gs://bucket/models"}, ConfigurationError, "gs"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    workbench: Workbench, changes: dict[str, Any], error: type[Exception], names: str
) -> None:
    workbench.write_some(1)
    with pytest.raises(error, match=names):
        workbench.run(**changes)
    assert not workbench.output.exists()


@pytest.mark.parametrize("output", ["input", "input/scored"])
def test_an_output_is_not_read_as_input_again(workbench: Workbench, output: str) -> None:
    workbench.write_some(1)
    if output == "input":
        with pytest.raises(ConfigurationError, match="lies in the output"):
            workbench.run(output=str(workbench.root / output))
        return
    workbench.output = workbench.root / output
    workbench.score_and_run()
    with pytest.raises(ConfigurationError, match="lies in the output"):
        workbench.run()


def test_rows_that_depend_on_one_another_are_announced(workbench: Workbench) -> None:
    model = testing.centred(workbench.root / "centred.onnx")
    config = {"centred": '[inputs.x]\ncolumns = ["id", "x"]\n'}
    testing.repository(workbench.root / "others", {"centred": model}, config=config)
    workbench.repository = workbench.root / "others"
    workbench.write("a.parquet", 0)
    summary = workbench.score_and_run(model="centred")
    assert "one by one, slowly" in workbench.said
    assert read_rows(summary.data)["y"].to_pylist() == [[0.0, 0.0]] * 90


def test_output_is_a_plain_folder_of_parquet(workbench: Workbench) -> None:
    """To pyarrow, DuckDB and pandas. Spark and Hive see the same names and types: none begins with a dot or is a half float."""
    summary = workbench.write_some(2).score_and_run()
    table = ds.dataset(summary.data, format="parquet").to_table()
    assert table.column_names == COLUMNS
    assert list(map(str, table.schema.types)) == ["int64", "string", "float", "string", "timestamp[us, tz=UTC]"]
    frame = pd.read_parquet(summary.data)
    assert list(frame.columns) == COLUMNS
    assert (frame["y"] == frame["id"] % 10 * 10).all()
    query = f"SELECT count(*), sum(y), min(_model_version), count(DISTINCT _scored_at) FROM '{summary.data}/*.parquet'"  # noqa: S608
    assert duckdb.sql(query).fetchall() == [(len(frame), math.fsum(frame["y"]), "lookup/1", 1)]
    letters = ds.dataset(Path(summary.folder) / "dead_letters", format="parquet").to_table()
    assert letters.column_names == ["id", "source_file", "row_number", "code", "reason", "raw_row"]
    assert {path.suffix for path in visible(workbench.output)} == {".parquet"}


def test_the_same_job_elsewhere_is_the_same_run(new_workbench: Callable[[str], Workbench]) -> None:
    bench = new_workbench("a").write_some(1)
    jobs: list[dict[str, Any]] = [
        {}, {"actors": 2}, {"max_dead_letters": 0.9}, {"output": str(bench.root / "b")}, {"address": "there"},
        {"model": "lookup/1"},
    ]  # fmt: skip
    output = open_files(bench.output)
    runs = {job.prepare(bench.spec(**changes), bench.console, output).run for changes in jobs}
    assert len(runs) == 1
    assert job.prepare(bench.spec(key=()), bench.console, output).run not in runs
    assert not Path(bench.root / "b").exists()


def test_the_model_may_come_from_s3(workbench: Workbench, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned from the bucket, scored by what an actor does with the plan; the package is fetched into the node's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workbench.root / "cache"))
    location = f"s3://{s3_bucket}/models"
    package_model(testing.lookup(workbench.root / "lookup.onnx", entries=10), name="lookup", repository=open_repository(location))
    summary = workbench.write_some(2).score_and_run(repository=location, model="lookup/1")
    assert_each_row_once(summary.folder, 200)
    assert [f.name for f in (workbench.root / "cache/triform").iterdir() if not f.name.startswith(".")] == [
        summary.manifest.pinned.digest
    ]
