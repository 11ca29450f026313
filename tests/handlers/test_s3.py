"""The function that scores objects: golden events, objects on a moto server, held against the batch job's own run of them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.batch.workbench import DEAD_OF_100, RemoteWorkbench, assert_each_row_once, read_rows, x_of
from tests.handlers.ray_api import job_api
from tests.handlers.starting import Handler, Invocation, golden_event, metrics, start
from triform import testing
from triform.errors import ConfigurationError, InputUnreadable, InvalidRequest, PayloadTooLarge, StoreError, TooManyDeadLetters
from triform.runs import commit
from triform.runs.folder import RunFolder
from triform.runs.pointer import current
from triform.stores.files import open_files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("s3")
    testing.repository(root / "models", {"lookup": testing.lookup(root / "lookup.onnx")})
    return root / "models"


@pytest.fixture
def bench(tmp_path: Path, models: Path, s3_bucket: str) -> RemoteWorkbench:
    return RemoteWorkbench(tmp_path, models, s3_bucket)


@pytest.fixture
def serve(models: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Handler]:
    def make(**settings: object) -> Handler:
        given = {
            "repository": models,
            "watched": f"s3://{s3_bucket}/in/",
            "output": f"s3://{s3_bucket}/scored",
            "key": "id",
            "keep": "note",
            "max_dead_letters": 0.5,
        }
        return start("s3", monkeypatch, **given | settings)

    return make


@pytest.fixture
def undone(s3_bucket: str) -> str:
    return str(boto3.client("sqs").create_queue(QueueName=s3_bucket)["QueueUrl"])


def told(queue: str) -> list[dict[str, str]]:
    """What the queue of undone objects has, each once."""
    received = boto3.client("sqs").receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
    return [json.loads(message["Body"]) for message in received]


def put(bucket: str, key: str) -> Any:
    return golden_event("s3-put", bucket=bucket, key=quote_plus(key, safe="/"))


def run_of(bucket: str, key: str) -> RunFolder:
    """The run that the object's output stands for."""
    files = open_files(f"s3://{bucket}/scored/{bucket}/{key}")
    now = current(files)
    assert now is not None
    return RunFolder(files, now.run)


def fetched(bench: RemoteWorkbench, bucket: str, key: str) -> Path:
    return bench.fetch(run_of(bucket, key).location)


def test_an_object_is_scored_as_the_batch_job_scores_it(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.write("a.parquet", 0)
    assert serve()(put(s3_bucket, "in/a.parquet"), Invocation()) == {"batchItemFailures": []}
    (dead,) = metrics(capfd.readouterr().out, "triform_rows_total")
    assert dead["triform_rows_total"] == [86.0]
    mine = run_of(s3_bucket, "in/a.parquet")
    here = bench.fetch(mine.location)
    assert_each_row_once(here, 100)
    assert commit.verify(mine)
    summary = bench.score_and_run(model="lookup/1", input=(f"s3://{s3_bucket}/in/a.parquet",))
    batch = bench.fetch(summary.folder)
    assert summary.manifest.run == mine.run
    for kind in "data", "dead_letters":
        theirs, ours = read_rows(batch / kind), read_rows(here / kind)
        assert ours.schema.equals(theirs.schema)
        assert ours.drop_columns([c for c in ours.column_names if c == "_scored_at"]).equals(
            theirs.drop_columns([c for c in theirs.column_names if c == "_scored_at"])
        )
    done = commit.manifest(mine)
    assert done is not None
    assert (done.rows_in, done.rows_out, done.dead) == (100, 86, summary.manifest.dead)
    assert sorted(p.relative_to(here) for p in here.rglob("*.*")) == sorted(p.relative_to(batch) for p in batch.rglob("*.*"))


def as_csv(rows: range) -> bytes:
    return ("id,x,note\n" + "".join(f"{i},{'' if (x := x_of(i)) is None else x},n{i}\n" for i in rows)).encode()


def as_json_lines(rows: range) -> bytes:
    return "".join(json.dumps({"id": i, "x": x_of(i), "note": f"n{i}"}) + "\n" for i in rows).encode()


@pytest.mark.parametrize(("name", "content"), [("a.csv", as_csv), ("a.jsonl", as_json_lines), ("A.NDJSON", as_json_lines)])
def test_csv_and_json_lines_give_what_parquet_gives(
    name: str, content: Callable[[range], bytes], serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    handler = serve()
    bench.write("a.parquet", 0)
    bench.client.put_object(Bucket=s3_bucket, Key=f"in/{name}", Body=content(range(100)))
    for key in "in/a.parquet", f"in/{name}":
        assert handler(put(s3_bucket, key), Invocation()) == {"batchItemFailures": []}
    parquet, mine = fetched(bench, s3_bucket, "in/a.parquet"), fetched(bench, s3_bucket, f"in/{name}")
    assert_each_row_once(mine, 100)
    theirs, ours = read_rows(parquet / "data"), read_rows(mine / "data")
    assert ours.drop_columns(["_scored_at"]).equals(theirs.drop_columns(["_scored_at"]))
    theirs, ours = read_rows(parquet / "dead_letters"), read_rows(mine / "dead_letters")
    assert ours["source_file"].to_pylist() == [f"s3://{s3_bucket}/in/{name}"] * sum(DEAD_OF_100.values())
    assert ours.drop_columns(["source_file"]).equals(theirs.drop_columns(["source_file"]))
    assert commit.verify(run_of(s3_bucket, f"in/{name}"))


BAD_LINES = {
    "csv": b'id,x,note\n0,1,a\n1,two,b\n2,3\n3,4,d\n4,5.5,e\n5,"6",f,g\n6,,h\n7,"7 ",NA\n',
    "jsonl": b'\xef\xbb\xbf{"id": 0, "x": 1, "note": "a"}\n{"id": 1, "x": "two", "note": "b"}\n{"id": 2, "x": 3\n\n'
    b'{"id": 3, "x": 4, "note": "d"}\n{"id": 4, "x": 5.5, "note": "e"}\n[5]\n{"id": 6, "note": "h"}\n'
    b'{"id": 7, "x": 7, "note": "NA"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_one_bad_line_is_a_dead_letter_with_its_line_and_the_others_are_scored(
    kind: str, serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    bench.client.put_object(Bucket=s3_bucket, Key=f"in/bad.{kind}", Body=BAD_LINES[kind])
    assert serve(key="", max_dead_letters=1.0)(put(s3_bucket, f"in/bad.{kind}"), Invocation()) == {"batchItemFailures": []}
    run = fetched(bench, s3_bucket, f"in/bad.{kind}")
    data, dead = read_rows(run / "data"), read_rows(run / "dead_letters")
    assert (data["note"].to_pylist(), data["y"].to_pylist()) == (["a", "d", "NA"], [10.0, 40.0, 70.0])
    assert dead["row_number"].to_pylist() == [1, 2, 4, 5, 6]
    assert dead["code"].to_pylist() == ["invalid_input"] * 4 + ["missing_value"]
    raw = [json.loads(row) for row in dead["raw_row"].to_pylist()]
    assert raw[0] == ({"id": 1, "x": "two", "note": "b"})
    assert raw[1] == ("2,3" if kind == "csv" else '{"id": 2, "x": 3')
    assert raw[3] == ('5,"6",f,g' if kind == "csv" else [5])
    assert raw[4]["note"] == "h"
    assert "two" in dead["reason"][0].as_py()


def test_the_same_event_twice_also_at_once_is_one_run(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    bench.client.put_bucket_versioning(Bucket=s3_bucket, VersioningConfiguration={"Status": "Enabled"})
    bench.write("a.parquet", 0)
    handler, event = serve(), put(s3_bucket, "in/a.parquet")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: handler(event, Invocation()), range(3)))
    assert answers == [{"batchItemFailures": []}] * 3
    first = run_of(s3_bucket, "in/a.parquet")
    assert handler(event, Invocation()) == {"batchItemFailures": []}
    assert run_of(s3_bucket, "in/a.parquet").run == first.run
    versions = bench.client.list_object_versions(Bucket=s3_bucket, Prefix="scored/")["Versions"]
    data = [v["Key"] for v in versions if "/data/part" in v["Key"] or "/_manifest/" in v["Key"]]
    assert len(data) == len(set(data)) == 2
    assert commit.verify(first)


def test_an_object_that_is_replaced_takes_the_old_ones_place(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    handler = serve()
    for first in 0, 100:
        bench.write("a.parquet", first)
        handler(put(s3_bucket, "in/a.parquet"), Invocation())
    run = fetched(bench, s3_bucket, "in/a.parquet")
    assert min(read_rows(run / "data")["id"].to_pylist()) == 100
    assert len({key.split("/run=")[1].split("/")[0] for key in bench.listed("scored/") if "/run=" in key}) == 2


def test_a_run_that_was_cut_off_goes_on(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triform.runs.plan.PART_ROWS", 40)
    bench.write("a.parquet", 0)
    handler, event = serve(), put(s3_bucket, "in/a.parquet")
    with pytest.raises(Exception, match="no time was left") as error:
        handler(event, Invocation(seconds=0.0))
    assert getattr(error.value, "retryable", False)
    assert not [key for key in bench.listed("scored/") if key.endswith("_SUCCESS")]
    handler(event, Invocation())
    assert_each_row_once(fetched(bench, s3_bucket, "in/a.parquet"), 100)
    assert len([key for key in bench.listed("scored/") if "/data/part" in key]) == 3


def in_queue(*bodies: Any) -> dict[str, Any]:
    golden = golden_event("sqs")
    (record,) = golden["Records"]
    golden["Records"] = [
        {**record, "messageId": f"m{i}", "body": body if isinstance(body, str) else json.dumps(body)}
        for i, body in enumerate(bodies)
    ]
    return golden  # type: ignore[no-any-return]


@pytest.mark.parametrize("key", ["in/a b+c.parquet", "in/ü/day=2026-11-20/ä%20.parquet", "in/[x]*?.parquet"])
def test_keys_arrive_url_encoded(key: str, serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str) -> None:
    handler, file = serve(), str(bench.write("a.parquet", 0))
    for name, event in (key, put(s3_bucket, key)), (f"{key}.parquet", in_queue(put(s3_bucket, f"{key}.parquet"))):
        bench.client.upload_file(file, s3_bucket, name)
        assert handler(event, Invocation()) == {"batchItemFailures": []}
        assert commit.verify(run_of(s3_bucket, name))


def test_events_through_a_queue_fail_one_by_one(serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str) -> None:
    bench.write("a.parquet", 0)
    bench.client.put_object(Bucket=s3_bucket, Key="in/broken.parquet", Body=b"PAR1 but not really")
    test_event = golden_event("s3-test", bucket=s3_bucket)
    gone, broken, good = (put(s3_bucket, f"in/{name}.parquet") for name in ("gone", "broken", "a"))
    sent = in_queue(test_event, gone, broken, good, "no JSON", {"Records": [{"s3": {}}]}, named("%ff"), {"Records": 7}, 7)
    failed = serve()(sent, Invocation())["batchItemFailures"]
    assert [item["itemIdentifier"] for item in failed] == ["m2", "m4", "m5", "m6", "m7", "m8"]
    assert commit.verify(run_of(s3_bucket, "in/a.parquet"))


def test_what_is_never_scored_is_acknowledged_and_told_with_the_reason(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str, undone: str
) -> None:
    put_object = bench.client.put_object
    put_object(Bucket=s3_bucket, Key="in/broken.parquet", Body=b"PAR1 but not really")
    put_object(Bucket=s3_bucket, Key="in/other.csv", Body=b"id,z,note\n1,2,a\n")
    put_object(Bucket=s3_bucket, Key="in/empty.csv", Body=b"")
    put_object(Bucket=s3_bucket, Key="in/all-bad.jsonl", Body=b'{"id": 1, "note": "a"}\n')
    names = ["gone.parquet", "broken.parquet", "other.csv", "empty.csv", "all-bad.jsonl", "page.html", "../x.csv"]
    handler = serve(undone=undone)
    sent = in_queue(*[put(s3_bucket, f"in/{name}") for name in names])
    assert handler(sent, Invocation()) == {"batchItemFailures": []}
    codes = {one["source"].removeprefix(f"s3://{s3_bucket}/in/"): one["code"] for one in told(undone)}
    assert codes == {
        "gone.parquet": "not_found",
        "broken.parquet": "input_unreadable",
        "other.csv": "invalid_input",
        "empty.csv": "input_unreadable",
        "all-bad.jsonl": "too_many_dead_letters",
        "page.html": "input_unreadable",
        "../x.csv": "invalid_request",
    }
    assert not [key for key in bench.listed("scored/") if "/data/" in key and key.endswith("_SUCCESS")]


@pytest.mark.parametrize(
    ("key", "content", "error"),
    [
        ("in/broken.parquet", b"PAR1 but not really", InputUnreadable),
        ("in/bad.jsonl", b'{"id": 1, "note": "a"}\n', TooManyDeadLetters),
        ("elsewhere/a.parquet", b"", InvalidRequest),
        ("in/a.txt", b"", InputUnreadable),
    ],
)
def test_without_a_queue_for_them_the_platform_is_told(
    key: str, content: bytes, error: type[Exception], serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    bench.client.put_object(Bucket=s3_bucket, Key=key, Body=content)
    with pytest.raises(error):
        serve()(put(s3_bucket, key), Invocation())


def test_events_with_nothing_to_do_are_acknowledged(serve: Callable[..., Handler], s3_bucket: str) -> None:
    removed = put(s3_bucket, "in/a.parquet")
    removed["Records"][0]["eventName"] = "ObjectRemoved:Delete"
    folder, gone = put(s3_bucket, "in/day=1/"), put(s3_bucket, "in/gone.parquet")
    for event in golden_event("s3-test", bucket=s3_bucket), removed, folder, gone, {"Records": []}:
        assert serve()(event, Invocation()) == {"batchItemFailures": []}


def named(key: Any) -> dict[str, Any]:
    return {"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": key}}}]}


@pytest.mark.parametrize(
    "event",
    [
        None, 7, [], {}, {"Records": None}, {"Records": [7]}, {"Records": [{"s3": {"bucket": {"name": "b"}}}]},
        named(7), named("in/%ff.csv"), named("in/%ed%a0%80.csv"), named("in/\ud800.csv"),
    ],
)  # fmt: skip
def test_what_is_no_event_of_s3_is_refused(event: Any, serve: Callable[..., Handler]) -> None:
    with pytest.raises(InvalidRequest):
        serve()(event, Invocation())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"output": "s3://{b}/in"}, "TRIFORM_OUTPUT"),
        ({"output": "s3://{b}/in/scored/"}, "TRIFORM_OUTPUT"),
        ({"output": "s3://{b}/incoming", "watched": "s3://other/x,s3://{b}/in"}, "TRIFORM_OUTPUT"),
        ({"output": "s3://{b}/in", "watched": "s3://{b}"}, "TRIFORM_OUTPUT"),
        ({"output": "s3://{b}", "watched": "s3://{b}/in/"}, "TRIFORM_WATCHED"),
        ({"watched": ""}, "TRIFORM_WATCHED"),
        ({"watched": "in/"}, "TRIFORM_WATCHED"),
        ({"max_dead_letters": "nan"}, "TRIFORM_MAX_DEAD_LETTERS"),
        ({"object_bytes": "0"}, "TRIFORM_OBJECT_BYTES"),
    ],
)
def test_a_start_that_would_call_itself_is_refused(
    settings: dict[str, str], named: str, serve: Callable[..., Handler], s3_bucket: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        serve(**{key: value.replace("{b}", s3_bucket) for key, value in settings.items()})


def test_an_object_beyond_the_limit_is_refused_where_no_ray_is_named(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    bench.write("a.parquet", 0)
    with pytest.raises(PayloadTooLarge, match="TRIFORM_RAY_ADDRESS"):
        serve(object_bytes=100)(put(s3_bucket, "in/a.parquet"), Invocation())


def test_storage_that_fails_comes_again(serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str) -> None:
    bench.write("a.parquet", 0)
    with pytest.raises(StoreError):
        serve(output="s3://no-such-bucket-of-ours/x")(put(s3_bucket, "in/a.parquet"), Invocation())


def test_an_empty_object_is_a_run_without_rows(serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str) -> None:
    bench.client.put_object(Bucket=s3_bucket, Key="in/none.csv", Body=b"id,x,note\n")
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "x": pa.array([], pa.int64()), "note": pa.array([], pa.string())}),
                   bench.root / "none.parquet")  # fmt: skip
    bench.client.upload_file(str(bench.root / "none.parquet"), s3_bucket, "in/none.parquet")
    for name in "none.csv", "none.parquet":
        serve()(put(s3_bucket, f"in/{name}"), Invocation())
        done = commit.manifest(run_of(s3_bucket, f"in/{name}"))
        assert done is not None
        assert done.rows_in == 0


def jobs_settings(address: str, bench: RemoteWorkbench, **more: object) -> dict[str, object]:
    return {"object_bytes": 100, "ray_address": address, "batch_repository": bench.repository, **more}


def test_a_larger_object_is_handed_to_a_ray_job_once(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str
) -> None:
    """What Ray's job API does with it is the slow test's matter."""
    bench.client.upload_file(str(bench.write("a.parquet", 0)), s3_bucket, "in/a b.parquet")
    with job_api() as api:
        handler = serve(**jobs_settings(api.address, bench))
        for _ in range(2):
            assert handler(put(s3_bucket, "in/a b.parquet"), Invocation()) == {"batchItemFailures": []}
        (job,) = api.jobs.values()
    words = shlex.split(job["entrypoint"])
    assert words[:4] == ["python", "-m", "batch", "run"]
    assert f"--input=s3://{s3_bucket}/in/a b.parquet" in words
    assert f"--output=s3://{s3_bucket}/scored/{s3_bucket}/in/a b.parquet" in words
    assert {"--model=lookup/1", "--key=id", "--keep=note", "--max-dead-letters=0.5", "--if-exists=replace"} < set(words)


def test_a_larger_object_whose_job_failed_is_told_of(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str, undone: str
) -> None:
    bench.write("a.parquet", 0)
    bench.client.put_object(Bucket=s3_bucket, Key="in/a.csv", Body=as_csv(range(100)))
    with job_api("FAILED") as api:
        handler = serve(**jobs_settings(api.address, bench, undone=undone))
        for key in "in/a.parquet", "in/a.csv":
            assert handler(put(s3_bucket, key), Invocation()) == {"batchItemFailures": []}
    assert {one["code"] for one in told(undone)} == {"job_failed", "payload_too_large"}


@pytest.mark.slow
def test_a_ray_job_makes_the_run_of_a_larger_object(
    serve: Callable[..., Handler], bench: RemoteWorkbench, s3_bucket: str, ray_cluster: Any, token_secret: dict[str, str]
) -> None:
    bench.write("a.parquet", 0)
    root = Path(__file__).parents[2]
    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")} | {"PYTHONPATH": str(root)}
    address = ray_cluster.get_runtime_context().gcs_address
    handler = serve(
        **jobs_settings(f"http://{ray_cluster._private.worker._global_node.address_info['webui_url']}", bench),
        **token_secret,
        ray_runtime_env=json.dumps({"env_vars": variables}),
        batch_command=f"cd {root} && {sys.executable} -m batch run --address={address}",
    )
    deadline = time.monotonic() + 240
    while not [key for key in bench.listed("scored/") if key.endswith("_SUCCESS")]:
        assert time.monotonic() < deadline
        with contextlib.suppress(StoreError):  # a cluster that has just begun refuses jobs for some seconds
            assert handler(put(s3_bucket, "in/a.parquet"), Invocation()) == {"batchItemFailures": []}
        time.sleep(0.5)
    assert_each_row_once(fetched(bench, s3_bucket, "in/a.parquet"), 100)
    here = serve()
    assert here(put(s3_bucket, "in/a.parquet"), Invocation()) == {"batchItemFailures": []}
    assert len({key.split("/run=")[1].split("/")[0] for key in bench.listed("scored/") if "/run=" in key}) == 1
