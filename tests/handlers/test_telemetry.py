"""What a function writes: JSON logs and EMF in the core's vocabulary, and never what it was sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from handlers._boot import Booted
from handlers._function import Function
from handlers._telemetry import open_telemetry
from tests.handlers.conftest import context
from tests.handlers.starting import golden_event
from triform.errors import InvalidRequest
from triform.telemetry import VOCABULARY, InferenceRecord, RunRecord

LABELS = {metric.name: set(metric.labels) for metric in VOCABULARY}


def written(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Log records and EMF objects since the last look; every line is JSON."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if "_aws" not in line], [line for line in lines if "_aws" in line]


def metrics(emf: list[dict[str, Any]], name: str) -> list[tuple[dict[str, str], list[float]]]:
    return [({n: e[n] for n in e["_aws"]["CloudWatchMetrics"][0]["Dimensions"][0]}, e[name]) for e in emf if name in e]


def test_a_request_is_one_log_record_and_the_vocabularys_metrics(
    started: Callable[..., Booted], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_X_AMZN_TRACE_ID", "Root=1-6b0167a4-cb56555c05ce461ab8f9d6a7;Parent=1;Sampled=0")
    function = Function(started())
    function(golden_event("http-v2"), context())
    logs, emf = written(capsys)
    (request,) = [line for line in logs if line["message"] == "request"]
    assert request["request_id"] == "golden-1"
    assert request["function_request_id"] == context().aws_request_id
    assert (request["model"], request["version"], request["code"], request["rows"]) == ("linear", 1, "ok", 2)
    assert request["cold_start"] is True
    assert request["xray_trace_id"] == "1-6b0167a4-cb56555c05ce461ab8f9d6a7"
    assert set(request["stages"]) == {"decode", "execute", "encode"}
    for blob in emf:
        (directive,) = blob["_aws"]["CloudWatchMetrics"]
        assert directive["Namespace"] == "Triform"
        for metric in directive["Metrics"]:
            assert LABELS[metric["Name"]] == set(directive["Dimensions"][0])
            assert all(isinstance(value, float) for value in blob[metric["Name"]])
    model = {"model": "linear", "version": "1", "variant": "stable", "form": "lambda"}
    assert metrics(emf, "triform_requests_total") == [(model | {"code": "ok"}, [1.0])]
    assert metrics(emf, "triform_rows_total") == [(model, [2.0])]
    assert {labels["stage"] for labels, _ in metrics(emf, "triform_model_load_seconds")} == {
        "fetch", "verify", "session", "warmup",
    }  # fmt: skip


def test_metrics_go_where_the_stage_says(
    started: Callable[..., Booted], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "Triform/dev")
    Function(started())(golden_event("http-v2"), context())
    _, emf = written(capsys)
    assert {blob["_aws"]["CloudWatchMetrics"][0]["Namespace"] for blob in emf} == {"Triform/dev"}


def test_the_cold_start_is_the_first_invocation_even_if_it_fails(
    started: Callable[..., Booted], capsys: pytest.CaptureFixture[str]
) -> None:
    function = Function(started())
    function(golden_event("http-v2") | {"body": "%", "isBase64Encoded": True}, context())
    logs, emf = written(capsys)
    assert [line["cold_start"] for line in logs if line["message"] == "request"] == [True]
    assert metrics(emf, "triform_cold_starts_total") == [({"form": "lambda", "initialization": "on-demand"}, [1.0])]
    function(golden_event("http-v2"), context())
    logs, emf = written(capsys)
    assert [line["cold_start"] for line in logs] == [False]
    assert metrics(emf, "triform_cold_starts_total") == []
    assert metrics(emf, "triform_model_load_seconds") == []


def test_a_provisioned_environment_is_no_cold_start(started: Callable[..., Booted], capsys: pytest.CaptureFixture[str]) -> None:
    function = Function(started(AWS_LAMBDA_INITIALIZATION_TYPE="provisioned-concurrency"))
    function(golden_event("http-v2"), context())
    logs, emf = written(capsys)
    assert {line["cold_start"] for line in logs} == {False}
    labels = {"form": "lambda", "initialization": "provisioned-concurrency"}
    assert metrics(emf, "triform_cold_starts_total") == [(labels, [1.0])]


@pytest.mark.parametrize(
    ("event", "seconds", "code"),
    [
        ({"body": "{"}, 30, "invalid_request"),
        ({"body": "%%", "isBase64Encoded": True}, 30, "invalid_request"),
        ({}, 0, "deadline_exceeded"),
        ({"rawPath": "/v1/models/nobody:predict", "pathParameters": None}, 30, "model_not_found"),
    ],
)
def test_every_request_is_recorded_once_with_its_code(
    capsys: pytest.CaptureFixture[str], started: Callable[..., Booted], event: dict[str, Any], seconds: float, code: str
) -> None:
    function = Function(started())
    function(golden_event("http-v2") | event, context(seconds))
    logs, emf = written(capsys)
    assert [line["code"] for line in logs if line["message"] == "request"] == [code]
    ((labels, values),) = metrics(emf, "triform_requests_total")
    assert (labels["code"], values) == (code, [1.0])


@pytest.mark.parametrize(
    "change", [{"rawPath": "/hush", "pathParameters": None}, {"requestContext": {"http": {"method": "DELETE"}}}]
)
def test_what_is_no_inference_leaves_one_line_that_shows_nothing_of_it(
    capsys: pytest.CaptureFixture[str], started: Callable[..., Booted], change: dict[str, Any]
) -> None:
    function = Function(started())
    status = function(golden_event("http-v2") | change, context())["statusCode"]
    assert status in (404, 405)
    out = capsys.readouterr().out
    assert "hush" not in out
    told = [line for line in map(json.loads, out.splitlines()) if line.get("message") not in (None, "model loaded")]
    assert len(told) == 1
    assert "golden-1" in json.dumps(told)


@pytest.mark.parametrize("event", [{"hush": 1}, [], {"Records": [{"hush": 1}]}])
def test_an_event_that_no_source_knows_leaves_one_line(
    capsys: pytest.CaptureFixture[str], started: Callable[..., Booted], event: Any
) -> None:
    assert Function(started())(event, context())["status"] == 400
    logs, _ = written(capsys)
    assert [line["code"] for line in logs if line["message"] == "request"] == ["invalid_request"]
    assert "hush" not in json.dumps(logs)


def test_an_invocation_that_raises_leaves_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = open_telemetry("emf", {})
    with pytest.raises(InvalidRequest), telemetry.invocation(context()):
        raise InvalidRequest("hush")
    logs, _ = written(capsys)
    assert [line["message"] for line in logs] == ["the invocation failed: invalid_request"]
    assert logs[0]["function_request_id"] == context().aws_request_id


def test_an_answer_that_could_not_be_given_is_counted_as_what_the_caller_got(
    capsys: pytest.CaptureFixture[str], started: Callable[..., Booted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers._events.HttpApi.limit", 10)
    assert Function(started())(golden_event("http-v2"), context())["statusCode"] == 413
    _, emf = written(capsys)
    assert [labels["code"] for labels, _ in metrics(emf, "triform_requests_total")] == ["answer_too_large"]
    assert metrics(emf, "triform_rows_total") == []


def test_nothing_that_was_sent_is_logged(capsys: pytest.CaptureFixture[str], started: Callable[..., Booted]) -> None:
    secret = {"body": json.dumps({"instances": [["hush-hush", 1, 2]]})}
    event = golden_event("http-v2") | secret
    event["headers"] = event["headers"] | {"authorization": "Bearer hush-hush", "x-request-id": "hush\r\n-hush"}
    assert Function(started())(event, context())["statusCode"] == 400
    out = capsys.readouterr().out
    assert '"code":"invalid_input"' in out
    assert "hush" not in out


def test_the_cores_loggers_write_json_too(capsys: pytest.CaptureFixture[str], started: Callable[..., Booted]) -> None:
    import logging

    with started().telemetry.invocation(context()):
        logging.getLogger("triform.http").warning("two\nlines")
    logs, _ = written(capsys)
    (line,) = [line for line in logs if line["level"] == "WARNING"]
    assert (line["message"], line["function_request_id"]) == ("two\nlines", context().aws_request_id)


def test_many_records_keep_to_the_limits_of_an_emf_object(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = open_telemetry("emf", {})
    with telemetry.invocation(context()):
        for i in range(250):
            ok = i % 2 == 0
            telemetry.record(InferenceRecord(form="lambda", rows=3 * ok, seconds=0.1, code="ok" if ok else "run_failed"))
        telemetry.ran(RunRecord(model="m", version=1, seconds=float("nan"), ended_at=1.0))
    _, emf = written(capsys)
    assert sum(len(values) for _, values in metrics(emf, "triform_request_seconds")) == 250
    assert sum(sum(values) for _, values in metrics(emf, "triform_rows_total")) == 125 * 3
    for blob in emf:
        for metric in blob["_aws"]["CloudWatchMetrics"][0]["Metrics"]:
            assert 1 <= len(blob[metric["Name"]]) <= 100
    assert metrics(emf, "triform_run_seconds") == []


def test_none_writes_nothing(started: Callable[..., Booted], capsys: pytest.CaptureFixture[str]) -> None:
    assert Function(started(TRIFORM_TELEMETRY="none"))(golden_event("http-v2"), context())["statusCode"] == 200
    assert capsys.readouterr().out == ""
