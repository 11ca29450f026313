"""Scaling is suspended while CodeDeploy shifts: the state machine of the template, run by moto."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.codedeploy.models import codedeploy_backends

from tests.infra.template import PREDICTING, Template, of_type, properties

REGION = "us-east-1"
TARGET = {"ServiceNamespace": "lambda", "ScalableDimension": "lambda:function:ProvisionedConcurrency"}
RESOURCE = "function:triform-prod-predict:provisioned"
ACCOUNT = "123456789012"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY":
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws(config={"stepfunctions": {"execute_state_machine": True}}):
        yield


def suspended() -> set[bool]:
    (target,) = boto3.client("application-autoscaling").describe_scalable_targets(
        ServiceNamespace="lambda", ResourceIds=[RESOURCE]
    )["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 20), "what is not named stays"
    return set(target["SuspendedState"].values())


def as_moto_reads(definition: Any) -> Any:
    """Step Functions writes every service's members with a capital and no hyphen in its name, moto as boto3 has them."""
    told = json.dumps(definition).replace("aws-sdk:applicationautoscaling", "aws-sdk:application-autoscaling")
    for member in "ApplicationName", "DeploymentGroupName", "IncludeOnlyStatuses":
        told = told.replace(f'"{member}', f'"{member[0].lower()}{member[1:]}')
    return json.loads(told.replace("$.under.Deployments", "$.under.deployments"))


def soon(what: Any) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_scaling_is_suspended_as_long_as_a_deployment_is_under_way(prod: Template, aws: None) -> None:
    never = {"DynamicScalingInSuspended": False, "DynamicScalingOutSuspended": False, "ScheduledScalingSuspended": False}
    boto3.client("application-autoscaling").register_scalable_target(
        ResourceId=RESOURCE, MinCapacity=2, MaxCapacity=20, SuspendedState=never, **TARGET
    )
    deploy = boto3.client("codedeploy")
    application = properties(prod, "Rollouts")["ApplicationName"]
    group = properties(prod, "PredictRollout")["DeploymentGroupName"]
    deploy.create_application(applicationName=application, computePlatform="Lambda")
    deploy.create_deployment_group(
        applicationName=application, deploymentGroupName=group, serviceRoleArn=f"arn:aws:iam::{ACCOUNT}:role/r"
    )
    revision = {"revisionType": "String", "string": {"content": "{}", "sha256": "0"}}
    deployment = deploy.create_deployment(applicationName=application, deploymentGroupName=group, revision=revision)

    definition = as_moto_reads(properties(prod, "Shifting")["Definition"])
    definition["States"]["Wait"]["Seconds"] = 1
    steps = boto3.client("stepfunctions")
    machine = steps.create_state_machine(
        name="shifting", definition=json.dumps(definition), roleArn=f"arn:aws:iam::{ACCOUNT}:role/r"
    )
    event = {"source": "aws.codedeploy", "detail": {"state": "START", "application": application, "deploymentGroup": group}}
    running = steps.start_execution(stateMachineArn=machine["stateMachineArn"], input=json.dumps(event))["executionArn"]

    def entered(state: str) -> int:
        history = steps.get_execution_history(executionArn=running, maxResults=1000)["events"]
        return sum(one.get("stateEnteredEventDetails", {}).get("name") == state for one in history)

    soon(lambda: entered("Look") >= 2)
    assert suspended() == {True}
    assert steps.describe_execution(executionArn=running)["status"] == "RUNNING"
    codedeploy_backends[ACCOUNT][REGION].deployments[deployment["deploymentId"]].status = "Failed"
    soon(lambda: steps.describe_execution(executionArn=running)["status"] != "RUNNING")
    assert steps.describe_execution(executionArn=running)["status"] == "SUCCEEDED"
    assert suspended() == {False}


def test_every_deployment_that_starts_is_heard_of(prod: Template, dev: Template) -> None:
    for template in prod, dev:
        (rule,) = (one["Properties"] for one in of_type(template, "AWS::Events::Rule").values())
        assert rule["EventPattern"] == {
            "source": ["aws.codedeploy"],
            "detail-type": ["CodeDeploy Deployment State-change Notification"],
            "detail": {"application": [{"Ref": "Rollouts"}], "state": ["START"]},
        }
        assert [target["Arn"] for target in rule["Targets"]] == [{"Ref": "Shifting"}]
        for logical in PREDICTING:  # the target is named by the group
            group = properties(template, f"{logical}Rollout")["DeploymentGroupName"]
            assert group == properties(template, f"{logical}LambdaFunction")["FunctionName"]
