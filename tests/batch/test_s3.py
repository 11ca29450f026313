"""The batch job from S3 to S3, a moto server over HTTP: the same promises as on a local disk, on bad days too."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest

from batch.partitions import jobs
from tests.batch.workbench import DEAD_OF_100, RemoteWorkbench, assert_each_row_once
from tests.faulty_proxy import STALL_SECONDS, Fault, FaultyProxy
from triform.errors import ConfigurationError, InputChanged, InputUnreadable, JobError, NotReconciled, OutputExists, StoreError
from triform.runs import commit, inputs
from triform.runs.folder import RunFolder
from triform.runs.pointer import current
from triform.sources import Sources, blocks
from triform.stores import s3
from triform.stores.files import open_files
from triform.stores.s3_files import S3Files


@pytest.fixture
def bench(
    tmp_path: Path, lookup_repository: Path, s3_bucket: str, s3_server: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> RemoteWorkbench:
    """A job that reaches S3 through the proxy."""
    proxy.fail()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return RemoteWorkbench(tmp_path, lookup_repository, s3_bucket, s3_server)


def folder_of(bench: RemoteWorkbench, run: str) -> RunFolder:
    return RunFolder(f"s3://{bench.bucket}/out", run)


def test_each_row_once_and_the_mark_comes_last(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    bench.write_some(3)
    proxy.seen.clear()
    summary = bench.score_and_run()
    run = summary.manifest.run
    assert summary.folder == f"s3://{bench.bucket}/out/run={run}"
    assert_each_row_once(bench.fetch(summary.folder), 300)
    assert summary.manifest.dead == {code: 3 * rows for code, rows in DEAD_OF_100.items()}
    order = [unquote(line).rpartition("/out/")[2] for line in proxy.seen if line.startswith("PUT") and "_tmp" not in line]
    assert order.index(f"run={run}/_manifest/000001.json") < order.index(f"run={run}/data/_SUCCESS")
    assert all("/data/part-" not in name for name in order[order.index(f"run={run}/_manifest/000001.json") :])
    assert [key for key in bench.listed() if "_tmp" in key or "_open" in key] == []
    assert commit.verify(folder_of(bench, run))[0] == "counts: 300 rows in = 258 answered + 42 dead letters"
    now = current(open_files(f"s3://{bench.bucket}/out"))
    assert now is not None
    assert now.run == run


def test_what_is_done_is_not_done_again_and_nothing_of_the_past_is_listed(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    bench.write_some(2)
    bench.score(0)
    proxy.seen.clear()
    summary = bench.score_and_run()
    assert [line for line in proxy.seen if "PUT" in line and "data/part-00000" in line] == []
    listing = [unquote(line) for line in proxy.seen if "list-type=2" in line or "?uploads" in line]
    listed = {line.partition("prefix=")[2].partition("&")[0] for line in listing}
    ours = f"out/{summary.folder.rpartition('/')[2]}"
    assert listed <= {"in/", ours + "/", *(f"{ours}/{folder}/" for folder in ("_parts", "_tmp", "data", "dead_letters"))}
    again = bench.run()
    assert (again.scored, again.manifest) == (0, summary.manifest)


@pytest.mark.parametrize("pattern", ["in", "in/", "in/*.parquet", "in/**/*.parquet", "in/*", "in/[ab]?parquet", "**"])
def test_folders_and_globs_find_objects(bench: RemoteWorkbench, pattern: str) -> None:
    for name in "a.parquet", "b.parquet", "_SUCCESS", "_tmp/c.parquet", ".d.parquet", "month=1/e.parquet":
        bench.client.put_object(Bucket=bench.bucket, Key=f"in/{name}", Body=b"")
    found = [name.removeprefix(f"s3://{bench.bucket}/in/") for name in inputs.find([f"s3://{bench.bucket}/{pattern}"], Sources())]
    below = [] if pattern in ("in/*.parquet", "in/[ab]?parquet") else ["month=1/e.parquet"]
    assert found == ["a.parquet", "b.parquet", *below]


@pytest.mark.parametrize("pattern", ["in/absent.parquet", "absent/", "in/*.csv"])
def test_a_pattern_that_names_no_object_is_named(bench: RemoteWorkbench, pattern: str) -> None:
    bench.write_some(1)
    with pytest.raises(InputUnreadable, match=re.escape(f"nothing there: s3://{bench.bucket}/{pattern}")):
        inputs.find([f"s3://{bench.bucket}/{pattern}"], Sources())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not Parquet at all", b"PAR1" + b"\0" * 100_000 + b"PAR1"])
def test_an_object_that_is_no_parquet_is_named(bench: RemoteWorkbench, content: bytes) -> None:
    bench.write_some(1)
    bench.client.put_object(Bucket=bench.bucket, Key="in/odd.parquet", Body=content)
    with pytest.raises(InputUnreadable, match=r"1 of 2 input file\(s\) cannot be read:\n  s3://.*odd\.parquet"):
        bench.begin()


def test_an_output_inside_the_input_is_refused(bench: RemoteWorkbench) -> None:
    bench.write_some(1)
    with pytest.raises(ConfigurationError, match="lies in the output"):
        bench.begin(output=f"s3://{bench.bucket}/in")
    with pytest.raises(ConfigurationError, match="neither a local path nor"):
        bench.begin(output="gs://bucket/out")


def test_an_input_that_changes_fails_before_the_commit(bench: RemoteWorkbench) -> None:
    bench.write_some(2)
    bench.score()
    folder, plan = bench.begin()
    bench.write("1.parquet", 100, note=["other"] * 100)
    with pytest.raises(InputChanged, match=r"1 input file.*in/1\.parquet"):
        commit.commit(folder, plan, max_dead_letters=0.5)
    assert not [key for key in bench.listed() if "_manifest" in key or "_SUCCESS" in key]


def test_an_input_that_changes_while_a_part_is_read_is_not_mixed(bench: RemoteWorkbench) -> None:
    rows = 200_000
    bench.write("big.parquet", 0, rows, group=rows, pad=random.Random(1).choices(range(10**9), k=rows))
    location = f"s3://{bench.bucket}/in/big.parquet"
    sources = Sources()
    with sources.open(location) as source:
        batches = source.batches(1000, [0], ["pad"])
        next(batches)
        bench.write("big.parquet", 1, rows, group=rows, pad=range(rows))
        with pytest.raises(InputChanged, match="big"):
            source.parquet.read()
    with pytest.raises(InputChanged), sources.open(location, sources.identify(location).__class__(5, '"other"')):
        pass


def test_columns_are_fetched_in_blocks_ahead_of_their_use(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    """The answer is what pyarrow reads by itself, however the columns are cut into blocks and row groups."""
    table = {f"c{i}": random.Random(i).choices(range(10**9), k=30_000) for i in range(3)}
    path = bench.write("wide.parquet", 0, 30_000, group=7_000, **table)
    with Sources().open(f"s3://{bench.bucket}/in/wide.parquet") as source:
        proxy.seen.clear()
        batches = list(source.batches(4_096, [1, 2, 4], ["id", "c1", "note"]))
        requests = proxy.requests
        groups = pq.ParquetFile(path).read_row_groups([1, 2, 4], columns=["id", "c1", "note"])
        assert sum(batch.num_rows for batch in batches) == groups.num_rows
        for name in "id", "c1", "note":
            assert [v for batch in batches for v in batch[name].to_pylist()] == groups[name].to_pylist()
        assert requests <= sum(map(len, blocks(source.parquet.metadata, [1, 2, 4], ["id", "c1", "note"])))


def test_stray_files_and_lost_ones_are_named(bench: RemoteWorkbench) -> None:
    bench.write_some(2).score()  # type: ignore[attr-defined]  # a RemoteWorkbench
    folder, plan = bench.begin()
    stray = f"out/{folder.name}/data/stray.parquet"
    bench.client.put_object(Bucket=bench.bucket, Key=stray, Body=b"")
    with pytest.raises(NotReconciled, match=r"data holds files of no part: stray\.parquet"):
        commit.commit(folder, plan, max_dead_letters=0.5)
    bench.client.delete_object(Bucket=bench.bucket, Key=stray)
    bench.client.delete_object(Bucket=bench.bucket, Key=f"out/{folder.name}/data/part-00001.parquet")
    with pytest.raises(NotReconciled, match=r"part 1 .*in/1\.parquet"):
        commit.commit(folder, plan, max_dead_letters=0.5)


def test_another_run_is_not_mixed_in(bench: RemoteWorkbench) -> None:
    bench.write_some(2)
    first = bench.score_and_run(input=(f"s3://{bench.bucket}/in/0.parquet",))
    with pytest.raises(OutputExists, match=first.manifest.run):
        bench.run()
    second = bench.score(if_exists="replace")
    assert all(outcome.scored for outcome in second)
    summary = bench.run(if_exists="replace")
    assert_each_row_once(bench.fetch(summary.folder), 200)
    assert_each_row_once(bench.fetch(first.folder), 100)


def crashed(*args: str) -> str:
    command = [sys.executable, "-m", "tests.batch.crashes_s3", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_crash_before_any_request_loses_and_doubles_nothing(
    bench: RemoteWorkbench, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    bench.write_some(2)
    assert int(crashed("crash", str(bench.repository), str(bench.root), bench.bucket)) > 15  # else the hook has missed some


def test_drivers_at_once_make_one_set_of_rows(bench: RemoteWorkbench, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    bench.write_some(2)
    crashed("race", str(bench.repository), str(bench.root), bench.bucket)


FAULTS: list[Fault] = ["503", "reset", "cut", "late", "503", "stall"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_rows_are_neither_lost_nor_doubled_through_faults(bench: RemoteWorkbench, proxy: FaultyProxy, seed: int) -> None:
    """Faults at random requests, until they run out; where the store fails for too long, the same command goes on."""
    chance = random.Random(seed)
    bench.write_some(3)
    proxy.fail(*(chance.choice(FAULTS) if chance.random() < 0.25 else "late" for _ in range(80)))
    for _ in range(5):
        try:
            if all(outcome.scored for outcome in bench.score()):
                break
        except (StoreError, JobError):
            continue
    summary = bench.run()
    assert len(proxy.taken) > 40
    assert_each_row_once(bench.fetch(summary.folder), 300)
    commit.verify(folder_of(bench, summary.manifest.run))


@pytest.mark.parametrize(
    "name", ["/data/part-00000", "/_parts/00000", "/_manifest/000001", "/_run.json", "/dead_letters/part-00000"]
)
def test_a_write_whose_response_was_lost_is_known_as_ones_own(bench: RemoteWorkbench, proxy: FaultyProxy, name: str) -> None:
    bench.write_some(1)
    proxy.fail("cut", where=name, method="PUT")
    proxy.seen.clear()
    summary = bench.score_and_run()
    assert proxy.taken == ["cut"]
    puts = sum(request.startswith("PUT") and name in request for request in proxy.seen)
    assert puts == (3 if name == "/_run.json" else 2)  # one met what the lost one had made; the plan is written by each command
    assert_each_row_once(bench.fetch(summary.folder), 100)
    assert summary.manifest.parts[0].seconds  # it is this attempt's, not an orphan's


@pytest.mark.slow
def test_a_store_that_stalls_beyond_the_timeout_loses_and_doubles_nothing(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    """Longer than a connection waits for a byte (20 s), on reads and on writes that have taken effect."""
    bench.write_some(1)
    proxy.stall_seconds = 25.0
    try:
        for method, where in ("GET", "/in/"), ("PUT", "/data/part-00000"), ("PUT", "/_parts/00000"):
            proxy.fail("stall", where=where, method=method)
            assert all(outcome.scored for outcome in bench.score())
            assert proxy.taken == ["stall"] or method == "PUT"  # the second round finds the first's part
    finally:
        proxy.stall_seconds = STALL_SECONDS
    assert_each_row_once(bench.fetch(bench.run().folder), 100)


def test_what_is_denied_is_told(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    bench.write_some(1)
    proxy.fail(*["403"] * 9, where="/_tmp/")  # type: ignore[arg-type]  # a list of literals
    (outcome,) = bench.score(0)
    assert (outcome.code, "secret" in outcome.error) == ("store_unavailable", False)
    assert "denies PutObject" in outcome.error


def test_a_role_that_may_not_delete_commits_too(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    bench.write_some(1)
    assert all(outcome.scored for outcome in bench.score())
    proxy.fail(*["403"] * 9, where="?delete")  # type: ignore[arg-type]
    summary = bench.run()
    assert_each_row_once(bench.fetch(summary.folder), 100)
    proxy.fail()
    assert bench.run().scored == 0


def test_a_role_that_may_not_list_uploads_begins_and_commits_too(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    bench.write_some(1)
    proxy.fail(*["403"] * 9, where="?uploads")  # type: ignore[arg-type]
    assert all(outcome.scored for outcome in bench.score())
    assert_each_row_once(bench.fetch(bench.run().folder), 100)
    assert len(proxy.taken) == 3  # of two beginnings and a commit


def test_finding_what_is_done_takes_no_request_a_part(bench: RemoteWorkbench, proxy: FaultyProxy) -> None:
    for i in range(12):
        bench.write(f"{i:02}.parquet", i * 10, 10)
    folder, plan = bench.begin()
    proxy.seen.clear()
    assert (folder.recorded(), folder.placed()) == (set(), set())
    assert proxy.requests == 2
    assert len(plan.parts) == 12


def test_names_that_mean_something_to_a_glob_are_found(bench: RemoteWorkbench) -> None:
    for key in "in/a[1].parquet", "in/k=[x]/b.parquet":
        bench.client.put_object(Bucket=bench.bucket, Key=key, Body=b"")
    root = f"s3://{bench.bucket}/in"
    assert inputs.find([f"{root}/a[1].parquet"], Sources()) == [f"{root}/a[1].parquet"]
    ((_, job),) = jobs(bench.spec(partition=("k=[x]",)), Sources())
    assert inputs.find(job.input, Sources()) == [f"{root}/k=[x]/b.parquet"]


def test_an_upload_in_pieces_that_meets_a_conflict_is_made_anew(
    bench: RemoteWorkbench, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "SINGLE_BYTES", 10)
    monkeypatch.setattr(s3, "AGAIN", frozenset({"AccessDenied"}))  # as the proxy's answer stands for S3's 409
    (tmp_path / "file").write_bytes(b"content" * 10)
    proxy.fail("403", where="POST /" + bench.bucket + "/x/name?uploadId")
    files = S3Files.at(f"s3://{bench.bucket}/x")
    assert files.place(tmp_path / "file", "name")
    assert proxy.taken == ["403"]
    assert files.read("name") == b"content" * 10
    assert "Uploads" not in bench.client.list_multipart_uploads(Bucket=bench.bucket)


def test_large_files_are_placed_in_pieces_once_and_orphans_are_aborted(
    bench: RemoteWorkbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "SINGLE_BYTES", 1000)
    bench.write_some(1).score()  # type: ignore[attr-defined]
    folder, _ = bench.begin()
    key = f"out/{folder.name}/data/part-00000.parquet"
    assert "-" in bench.client.head_object(Bucket=bench.bucket, Key=key)["ETag"]  # the ETag of an upload in pieces
    orphan = bench.client.create_multipart_upload(Bucket=bench.bucket, Key=f"out/{folder.name}/data/part-00001.parquet")
    assert orphan["UploadId"]
    bench.run()
    assert "Uploads" not in bench.client.list_multipart_uploads(Bucket=bench.bucket)


def test_of_two_uploads_in_pieces_one_wins(bench: RemoteWorkbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3, "SINGLE_BYTES", 10)
    files = S3Files.at(f"s3://{bench.bucket}/x")
    monkeypatch.setattr(s3.Bucket, "find", lambda *_: None)  # both see no object and begin
    for content, wins in (b"first" * 10, True), (b"other" * 10, False):
        (tmp_path / "file").write_bytes(content)
        assert files.place(tmp_path / "file", "name") is wins
    assert files.read("name") == b"first" * 10
    assert "Uploads" not in bench.client.list_multipart_uploads(Bucket=bench.bucket)
