"""The functions of events behind the real runtime client, as Lambda runs them; what they call is on loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from infra.local.environments import Environments, FunctionConfig
from infra.local.runtime_api import Outcome
from tests.handlers.ray_api import job_api
from tests.handlers.starting import golden_event

Call = Callable[[Any], Outcome]


@pytest.fixture
def call(models: Path) -> Iterator[Callable[..., Call]]:
    """`call("sqs", ...)`: an environment of handlers.sqs with these TRIFORM_* settings, as a call with an event."""
    running: list[Environments] = []

    def make(module: str, **settings: object) -> Call:
        known = {key: value for key, value in os.environ.items() if not key.startswith("TRIFORM_")}
        given = {f"TRIFORM_{key.upper()}": str(value) for key, value in {"repository": models, **settings}.items()}
        config = FunctionConfig(f"handlers.{module}.handler", known | given)
        running.append(Environments(config, report=lambda _: None, line=lambda _: None))
        return lambda event: running[-1].invoke(json.dumps(event).encode())

    yield make
    for environments in running:
        environments.close()


def said(outcome: Outcome) -> Any:
    assert outcome.error is None, outcome
    return json.loads(outcome.payload)


def test_a_queue(call: Callable[..., Call], s3_bucket: str) -> None:
    function = call("sqs", results=f"s3://{s3_bucket}/out")
    event = golden_event("sqs")
    bad = event["Records"][0]
    good = {**bad, "messageId": "good", "body": json.dumps({"model": "linear", "instances": [[1, 2, 3]]})}
    event["Records"].append(good)
    assert said(function(event)) == {"batchItemFailures": [{"itemIdentifier": bad["messageId"]}]}  # there is no model lookup
    answer = boto3.client("s3").get_object(Bucket=s3_bucket, Key="out/good.json")["Body"].read()
    assert json.loads(answer)["predictions"] == [[14.0]]


def test_objects(call: Callable[..., Call], s3_bucket: str) -> None:
    settings = {"watched": f"s3://{s3_bucket}/in/", "output": f"s3://{s3_bucket}/out", "default_model": "words"}
    function, client = call("s3", **settings), boto3.client("s3")
    client.put_object(Bucket=s3_bucket, Key="in/a.csv", Body=b"word,x\na,1\nb,2\n")
    assert said(function(golden_event("s3-put", bucket=s3_bucket, key="in/a.csv"))) == {"batchItemFailures": []}
    names = [found["Key"] for found in client.list_objects_v2(Bucket=s3_bucket, Prefix="out/")["Contents"]]
    assert [name for name in names if name.endswith("/data/_SUCCESS")]
    assert function({"nothing": "known"}).error is not None


def test_a_night(call: Callable[..., Call]) -> None:
    with job_api("SUCCEEDED") as api:
        told = said(call("nightly", ray_address=api.address)(golden_event("nightly-schedule", time="2026-11-21T02:00:00Z")))
        (job,) = api.jobs.values()
    assert (told["status"], told["partition"]) == ("SUCCEEDED", "day=2026-11-20")
    assert job["entrypoint"] == "python -m batch run job.toml --partition day=2026-11-20"


@pytest.mark.parametrize("module", ["sqs", "s3", "nightly", "pre_traffic"])
def test_a_start_without_its_settings_is_an_init_error(module: str, call: Callable[..., Call], s3_bucket: str) -> None:
    outcome = call(module)({})
    assert outcome.error is not None
    assert b"ConfigurationError" in outcome.payload
    assert b"TRIFORM_" in outcome.payload
