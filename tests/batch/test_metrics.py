"""What a run counted reaches a real Pushgateway and CloudWatch (moto), and a run never fails because nobody listened."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import boto3
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.batch.workbench import Cli, Workbench, options, read_rows
from triform.telemetry import VOCABULARY

NAMES = {metric.name for metric in VOCABULARY}


def scraped(pushgateway: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Triform's samples as Prometheus would scrape them, by name."""
    with urllib.request.urlopen(f"{pushgateway}/metrics", timeout=10) as answer:  # noqa: S310 - loopback
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("triform_")]
    return {
        name: [(dict(sample.labels), sample.value) for sample in samples if sample.name == name]
        for name in {sample.name for sample in samples}
    }


def test_a_pushgateway_gets_what_a_run_counted(workbench: Workbench, call: Cli, pushgateway: str) -> None:
    summary = workbench.write_some(2).score_and_run()
    assert call("run", *options(workbench), f"--pushgateway={pushgateway}")[0] == 0
    seen = scraped(pushgateway)
    assert {name.removesuffix("_created") for name in seen} <= NAMES
    ((labels, value),) = seen["triform_run_success"]
    assert value == 1
    assert {key: labels[key] for key in ("job", "model", "version", "form")} == {
        "job": "triform-batch", "model": "lookup", "version": "1", "form": "batch",
    }  # fmt: skip
    rows = {labels["outcome"]: value for labels, value in seen["triform_run_rows"]}
    dead = read_rows(f"{summary.folder}/dead_letters").num_rows
    assert rows == {"in": 200, "answered": 200 - dead, "dead": dead}
    assert seen["triform_run_seconds"][0][0]["code"] == "ok"


def test_a_failed_run_leaves_the_time_of_the_last_success(workbench: Workbench, call: Cli, pushgateway: str) -> None:
    workbench.write_some(2).score()
    assert call("run", *options(workbench), f"--pushgateway={pushgateway}")[0] == 0
    before = scraped(pushgateway)["triform_run_success_timestamp_seconds"]
    (workbench.input / "0.parquet").write_bytes(b"torn")
    code, _, err = call("run", *options(workbench), f"--pushgateway={pushgateway}")
    assert (code, "input_unreadable" in err) == (1, True)
    seen = scraped(pushgateway)
    assert [value for _, value in seen["triform_run_success"]] == [0]
    assert seen["triform_run_seconds"][0][0]["code"] == "input_unreadable"
    assert seen["triform_run_success_timestamp_seconds"] == before


def test_nobody_listens(workbench: Workbench, call: Cli) -> None:
    workbench.write_some(1).score()
    code, out, err = call("run", *options(workbench), "--pushgateway=http://127.0.0.1:9")
    assert (code, err.count("warning: the metrics were not published to the Pushgateway http://127.0.0.1:9")) == (0, 1)
    assert "100 in = 86 answered" in out


def published(namespace: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = boto3.client("cloudwatch").list_metrics(Namespace=namespace)["Metrics"]
    return found


@pytest.mark.usefixtures("s3_bucket")  # whose environment leads boto3 to moto
def test_cloudwatch_gets_what_a_run_counted(workbench: Workbench, call: Cli, tmp_path: Path) -> None:
    namespace = f"Triform/{tmp_path.name}"
    workbench.write_some(2).score()
    assert call("run", *options(workbench), f"--cloudwatch={namespace}")[:1] == (0,)
    found = published(namespace)
    assert {metric["MetricName"] for metric in found} <= NAMES
    outcomes = {
        dimension["Value"]
        for metric in found
        if metric["MetricName"] == "triform_run_rows"
        for dimension in metric["Dimensions"]
        if dimension["Name"] == "outcome"
    }
    assert outcomes == {"in", "answered", "dead"}
    assert call("run", *options(workbench), "--input=absent", f"--cloudwatch={namespace}")[0] == 1
    codes = {d["Value"] for m in published(namespace) for d in m["Dimensions"] if d["Name"] == "code"}
    assert codes == {"ok", "input_unreadable"}


@pytest.mark.usefixtures("s3_bucket")
def test_cloudwatch_is_out_of_reach(workbench: Workbench, call: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    workbench.write_some(1).score()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, _, err = call("run", *options(workbench), "--cloudwatch=Triform")
    assert (code, err.count("warning: the metrics were not published to CloudWatch's namespace Triform")) == (0, 1)
