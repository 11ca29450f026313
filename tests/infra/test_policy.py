"""The role's policy allows what a night asks of S3, from the first request to the last, and nothing that could lose rows."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest

from batch import nightly
from tests.batch.conftest import lookup_repository as lookup_repository  # the fixture
from tests.batch.workbench import RemoteWorkbench
from triform import testing
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.stores import s3
from triform.telemetry import Silent

RAY = Path(__file__).parent.parent.parent / "infra/ray"
STATEMENTS = json.loads((RAY / "policy.json").read_text())["Statement"]
JOB = tomllib.loads((RAY / "job.toml").read_text())
NEEDS = {
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # https://docs.aws.amazon.com/AmazonS3/latest/API/, "Permissions" of each


def allowed(action: str, resource: str) -> bool:
    def some(value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    return any(
        action in some(statement["Action"]) and any(fnmatchcase(resource, pattern) for pattern in some(statement["Resource"]))
        for statement in STATEMENTS
    )


def asked(operation: str, given: dict[str, Any]) -> list[tuple[str, str]]:
    """The permissions that a request needs, with the resources."""
    bucket = f"arn:aws:s3:::{given['Bucket']}"
    if operation.startswith("List"):
        return [(NEEDS[operation], bucket)]
    keys = [entry["Key"] for entry in given["Delete"]["Objects"]] if operation == "DeleteObjects" else [given["Key"]]
    copied = given.get("CopySource")
    found = [(NEEDS[operation], f"{bucket}/{key}") for key in keys]
    return found + ([("s3:GetObject", f"arn:aws:s3:::{copied['Bucket']}/{copied['Key']}")] if copied else [])


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The permissions that S3 would have asked for, as boto3 sends its requests."""
    seen: list[tuple[str, str]] = []
    call = botocore.client.BaseClient._make_api_call

    def watched(self: Any, operation: str, given: dict[str, Any]) -> Any:
        seen.extend(asked(operation, given))
        return call(self, operation, given)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", watched)
    return seen


@pytest.mark.usefixtures("s3_bucket")
def test_a_night_may_do_what_it_does(
    tmp_path: Path, lookup_repository: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(s3, "SINGLE_BYTES", 1000)  # so that data files go in pieces
    lake, models = JOB["input"].split("/")[2], JOB["repository"].split("/")[2]
    client = boto3.client("s3")
    for bucket in lake, models:
        client.create_bucket(Bucket=bucket)
    repository = open_repository(JOB["repository"])
    package_model(testing.lookup(tmp_path / "lookup.onnx"), name="lookup", repository=repository, version=1)
    ReleaseLog(repository, "lookup").set(stable=1)
    bench = RemoteWorkbench(tmp_path, lookup_repository, lake)
    bench.write("a.parquet", 0)
    client.upload_file(str(bench.input / "a.parquet"), lake, "events/day=2026-11-20/a.parquet")
    requests: list[tuple[str, str]] = request.getfixturevalue("requests")
    job = {"repository": JOB["repository"], "model": "lookup@stable", "max_dead_letters": 0.5}
    night = bench.spec(**job, input=(JOB["input"],), output=JOB["output"], partition=("day=2026-11-20",), lease=60.0)
    day = {"input": (f"{JOB['input']}/day=2026-11-20",), "output": f"{JOB['output']}/day=2026-11-20"}
    assert all(outcome.scored for outcome in bench.score(**job, **day))
    (done,) = nightly.run_all(night, bench.console, Silent())
    assert done.error is None
    assert done.summary is not None
    assert {action for action, _ in requests} == set(NEEDS.values()) - {"s3:AbortMultipartUpload"}
    assert {bucket.split(":::")[1].split("/")[0] for _, bucket in requests} == {lake, models}
    assert [one for one in requests if not allowed(*one)] == []


def test_what_readers_read_can_not_be_removed() -> None:
    run = "arn:aws:s3:::example-lake/scored/day=2026-11-20/run=1"
    for name in "data/part-00000.parquet", "dead_letters/part-00000.parquet", "_manifest/000001.json", "_parts/00000.json":
        assert not allowed("s3:DeleteObject", f"{run}/{name}")
        assert allowed("s3:PutObject", f"{run}/{name}")
    assert allowed("s3:DeleteObject", f"{run}/_tmp/x")
    assert not allowed("s3:PutObject", "arn:aws:s3:::example-lake/events/day=2026-11-20/a.parquet")
    assert not allowed("s3:PutObject", "arn:aws:s3:::example-models/models/churn/1/manifest.json")
    assert allowed("s3:AbortMultipartUpload", f"{run}/data/part-00000.parquet")


def test_the_lifecycle_rule_is_one_that_s3_takes(s3_bucket: str) -> None:
    client = boto3.client("s3")
    rules = json.loads((RAY / "lifecycle.json").read_text())
    client.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=rules)
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=s3_bucket)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert JOB["output"].endswith(rule["Filter"]["Prefix"].rstrip("/"))
