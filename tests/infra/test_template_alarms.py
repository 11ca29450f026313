"""The alarms and the dashboard of the rendered template."""

from __future__ import annotations

import json
import re

from tests.infra.template import PREDICTING, Template, of_type, properties
from triform.errors import TriformError
from triform.telemetry import REQUESTS, VOCABULARY


def test_every_queue_of_dead_letters_has_an_alarm(prod: Template) -> None:
    alarmed = {
        dimension["Value"]["Fn::GetAtt"][0]
        for alarm in of_type(prod, "AWS::CloudWatch::Alarm").values()
        for dimension in alarm["Properties"].get("Dimensions", [])
        if dimension["Name"] == "QueueName"
    }
    assert alarmed == {name for name in of_type(prod, "AWS::SQS::Queue") if name.endswith("Dead")} | {"Undone"}


def test_every_alarm_tells_somebody(prod: Template) -> None:
    alarms = of_type(prod, "AWS::CloudWatch::Alarm")
    assert all(alarm["Properties"]["AlarmActions"] == [{"Ref": "Alarms"}] for alarm in alarms.values())
    watched = {alarm["Properties"].get("MetricName") for alarm in alarms.values()}
    assert {
        "Duration",
        "ProvisionedConcurrencySpilloverInvocations",
        "Throttles",
        "ApproximateNumberOfMessagesVisible",
    } <= watched
    p99 = [alarm["Properties"] for alarm in alarms.values() if alarm["Properties"].get("ExtendedStatistic") == "p99"]
    assert len(p99) == 2 * len(PREDICTING)  # of the alias, of the new version


def test_errors_that_lambda_does_not_see_are_counted(prod: Template) -> None:
    """The handler never raises, so an error of ours is an invocation that went well."""
    counted = f'SUM("{REQUESTS.name}")'
    schema = ", ".join(f'"{name}"' for name in ("Triform/prod", *REQUESTS.labels))
    told = f"SELECT {counted} FROM SCHEMA({schema}) WHERE \"form\" = 'lambda' AND \"code\" = '{TriformError.code}'"  # noqa: S608
    for logical, more in ("Predict", ""), ("FlightDelay", " AND \"model\" = 'flight-delay'"):
        alarm = properties(prod, f"{logical}Internal")
        (metric,) = alarm["Metrics"]
        assert (metric["Expression"], metric["Period"], alarm["Threshold"]) == (told + more, 60, 0)


def test_alarms_on_our_metrics_name_one_with_all_its_labels(prod: Template) -> None:
    labels = {metric.name: metric.labels for metric in VOCABULARY}
    alarms = [alarm["Properties"] for alarm in of_type(prod, "AWS::CloudWatch::Alarm").values()]
    ours = [alarm for alarm in alarms if alarm.get("MetricName") in labels]
    assert len(ours) == 2 + len(PREDICTING)
    for alarm in ours:
        assert alarm["Namespace"] == "Triform/prod"
        assert tuple(dimension["Name"] for dimension in alarm["Dimensions"]) == labels[alarm["MetricName"]]


def test_nights_that_nobody_runs_wake_nobody(prod: Template, dev: Template) -> None:
    for template, state in (prod, "ENABLED"), (dev, "DISABLED"):
        assert properties(template, "Night")["State"] == state
        for alarm in "NightFailed", "NightMissing":
            assert properties(template, alarm)["ActionsEnabled"] is (state == "ENABLED")
        others = {name for name, a in of_type(template, "AWS::CloudWatch::Alarm").items() if "ActionsEnabled" in a["Properties"]}
        assert others == {"NightFailed", "NightMissing"}
    assert properties(prod, "NightlyDeadDepth")["AlarmDescription"] == "The nightly function was not reached, or failed"


def test_the_dashboard_shows_metrics_that_there_are(prod: Template) -> None:
    body = properties(prod, "Dashboard")["DashboardBody"]["Fn::Sub"]
    widgets = json.loads(body)["widgets"]
    assert len(widgets) == 16
    shown = set(re.findall(r'Namespace=\\"Triform/prod\\" MetricName=\\"(\w+)\\"', body))
    assert shown <= {metric.name for metric in VOCABULARY}
    assert {"triform_requests_total", "triform_request_seconds", "triform_stage_seconds", "triform_model_load_seconds"} <= shown
    places = [(w["x"], w["y"]) for w in widgets]
    assert len(set(places)) == len(places)
    assert all(w["x"] + w["width"] <= 24 for w in widgets)
