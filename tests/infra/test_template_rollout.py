"""How a new version comes into traffic in the rendered template, and how many environments there are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import serverless
from tests.infra.template import PREDICTING, Template, alias_of, of_type, properties, references, stand_ins
from triform.telemetry import FAULTS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("logical", PREDICTING)
def test_a_new_version_gets_traffic_step_by_step(prod: Template, logical: str) -> None:
    alias = alias_of(prod, logical)
    assert alias["UpdatePolicy"] == {
        "CodeDeployLambdaAliasUpdate": {
            "ApplicationName": {"Ref": "Rollouts"},
            "DeploymentGroupName": {"Ref": f"{logical}Rollout"},
            "BeforeAllowTrafficHook": {"Ref": f"{logical}HookLambdaFunction"},
        }
    }
    hook = properties(prod, f"{logical}HookLambdaFunction")
    assert hook["Handler"] == "handlers.pre_traffic.handler"
    version = alias["Properties"]["FunctionVersion"]["Fn::GetAtt"][0]
    assert hook["Environment"]["Variables"]["TRIFORM_TARGET"] == {"Ref": version}
    assert hook["Layers"] == properties(prod, f"{logical}LambdaFunction")["Layers"]


@pytest.mark.parametrize("logical", PREDICTING)
def test_an_alarm_takes_it_back(prod: Template, logical: str) -> None:
    group = properties(prod, f"{logical}Rollout")
    assert group["DeploymentConfigName"] == "CodeDeployDefault.LambdaCanary10Percent5Minutes"
    assert group["DeploymentStyle"] == {"DeploymentType": "BLUE_GREEN", "DeploymentOption": "WITH_TRAFFIC_CONTROL"}
    assert group["AutoRollbackConfiguration"] == {
        "Enabled": True,
        "Events": ["DEPLOYMENT_FAILURE", "DEPLOYMENT_STOP_ON_ALARM", "DEPLOYMENT_STOP_ON_REQUEST"],
    }
    alarms = [alarm["Name"]["Ref"] for alarm in group["AlarmConfiguration"]["Alarms"]]
    on_alias, on_version = ["Errors", "P99", "Throttles"], ["CanaryErrors", "CanaryP99", "CanaryFaults"]
    assert alarms == [f"{logical}{what}" for what in (*on_alias, *on_version)] + ["ApiFailures"]
    assert group["AlarmConfiguration"]["Enabled"] is True
    assert group["AlarmConfiguration"]["IgnorePollAlarmFailure"] is False
    version = alias_of(prod, logical)["Properties"]["FunctionVersion"]["Fn::GetAtt"][0]
    for what in on_alias:
        assert set(references(properties(prod, f"{logical}{what}"))) == {f"{logical}LambdaFunction", "Alarms"}
    for what in on_version:
        assert set(references(properties(prod, f"{logical}{what}"))) == {f"{logical}LambdaFunction", version, "Alarms"}


@pytest.mark.parametrize("logical", PREDICTING)
def test_a_canary_is_not_judged_by_the_share_that_the_old_version_answers(prod: Template, logical: str) -> None:
    version = alias_of(prod, logical)["Properties"]["FunctionVersion"]["Fn::GetAtt"][0]
    dimensions = [
        {"Name": "FunctionName", "Value": {"Ref": f"{logical}LambdaFunction"}},
        {"Name": "Resource", "Value": {"Fn::Sub": f"${{{logical}LambdaFunction}}:provisioned"}},
        {"Name": "ExecutedVersion", "Value": {"Fn::GetAtt": [version, "Version"]}},
    ]
    rate = [query["MetricStat"]["Metric"] for query in properties(prod, f"{logical}CanaryErrors")["Metrics"][1:]]
    assert [(metric["MetricName"], metric["Dimensions"]) for metric in rate] == [
        ("Errors", dimensions),
        ("Invocations", dimensions),
    ]
    p99 = properties(prod, f"{logical}CanaryP99")
    assert (p99["MetricName"], p99["ExtendedStatistic"], p99["Dimensions"]) == ("Duration", "p99", dimensions)
    faults = properties(prod, f"{logical}CanaryFaults")
    assert (faults["MetricName"], faults["Statistic"], faults["Threshold"]) == (FAULTS.name, "Sum", 0)
    assert faults["Dimensions"] == [
        {"Name": "form", "Value": "lambda"},
        {"Name": "function", "Value": {"Ref": f"{logical}LambdaFunction"}},
        {"Name": "function_version", "Value": {"Fn::GetAtt": [version, "Version"]}},
    ]
    canary = {f"{logical}Canary{what}" for what in ("Errors", "P99", "Faults")}
    assert canary <= set(alias_of(prod, logical)["DependsOn"])


@pytest.mark.slow
def test_a_model_release_is_a_new_version_of_its_functions_alone(tmp_path: Path) -> None:
    def versions(folder: str, **content: str) -> dict[str, str]:
        layers = stand_ins(tmp_path / folder / "layers", **content)
        template = json.loads(serverless.render("prod", layers, tmp_path / folder / "out").read_text())
        return {logical: alias_of(template, logical)["Properties"]["FunctionVersion"]["Fn::GetAtt"][0] for logical in PREDICTING}

    before, after = versions("before"), versions("after", models="release 2")
    assert before["Predict"] != after["Predict"]
    assert before["FlightDelay"] == after["FlightDelay"]
    assert versions("again") == before


@pytest.mark.parametrize("stage", ["dev", "prod", pytest.param("staging", marks=pytest.mark.slow)])
def test_no_function_takes_the_accounts_concurrency(rendered: Callable[[str], Template], stage: str) -> None:
    template = rendered(stage)
    for function in of_type(template, "AWS::Lambda::Function").values():
        assert function["Properties"]["ReservedConcurrentExecutions"] <= 50
    for logical in PREDICTING:
        target = properties(template, f"{logical}Target")
        reserved = properties(template, f"{logical}LambdaFunction")["ReservedConcurrentExecutions"]
        assert 2 * target["MaxCapacity"] <= reserved, "while it is rolled out, two versions are provisioned"
        assert int(target["MinCapacity"]) <= int(target["MaxCapacity"])


@pytest.mark.parametrize("stage", ["dev", "prod", pytest.param("staging", marks=pytest.mark.slow)])
def test_the_quota_that_a_stage_needs_is_told(rendered: Callable[[str], Template], stage: str) -> None:
    functions = of_type(rendered(stage), "AWS::Lambda::Function").values()
    reserved = sum(function["Properties"]["ReservedConcurrentExecutions"] for function in functions)
    told = (ROOT / "docs/lambda.md").read_text()
    numbers = dict(
        re.findall(r"`(dev|staging|prod)` (\d+)", told[told.index("all functions together reserve") :].partition(".")[0])
    )
    assert int(numbers[stage]) == reserved


@pytest.mark.parametrize("logical", PREDICTING)
def test_provisioned_environments_follow_the_clock_and_the_use(prod: Template, logical: str) -> None:
    target = prod["Resources"][f"{logical}Target"]
    assert target["Properties"]["ResourceId"] == {"Fn::Sub": f"function:${{{logical}LambdaFunction}}:provisioned"}
    assert target["DependsOn"] == [f"{logical}ProvConcLambdaAlias"]
    actions = {action["ScheduledActionName"]: action for action in target["Properties"]["ScheduledActions"]}
    least = {name: action["ScalableTargetAction"]["MinCapacity"] for name, action in actions.items()}
    assert {name: int(number) for name, number in least.items()} == {"day": 2, "night": 1}
    tracking = properties(prod, f"{logical}Tracking")["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 0.7
    assert tracking["PredefinedMetricSpecification"] == {"PredefinedMetricType": "LambdaProvisionedConcurrencyUtilization"}
    assert properties(prod, f"{logical}Tracking")["ScalingTargetId"] == {"Ref": f"{logical}Target"}
