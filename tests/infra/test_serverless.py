"""The template that osls renders, without AWS: what CloudFormation would be given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handlers._events import HttpApi
from infra import serverless
from infra.layers.archive import archive
from triform.errors import ConfigurationError, InvalidRequest, JobError, TriformError
from triform.settings import Settings
from triform.telemetry import FAULTS, REQUESTS, VOCABULARY

ROOT = Path(__file__).parent.parent.parent
Template = dict[str, Any]
PREDICTING = ("Predict", "FlightDelay")
LAYERS = ("runtime", "powertools", "core", "models", "models-flight-delay", "function")


def stand_ins(folder: Path, **content: str) -> Path:
    """Zips in the layers' stead: the template does not depend on what is in them."""
    for name in LAYERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "file.txt").write_text(content.get(name, name))
        archive(folder / name, folder / f"{name}.zip")
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Template]:
    """`rendered(stage)`: each stage once."""
    folder = tmp_path_factory.mktemp("rendered")
    layers, done = stand_ins(folder / "layers"), {}

    def template(stage: str) -> Template:
        if stage not in done:
            done[stage] = json.loads(serverless.render(stage, layers, folder / stage).read_text())
        return done[stage]

    return template


@pytest.fixture(scope="module")
def prod(rendered: Callable[[str], Template]) -> Template:
    return rendered("prod")


@pytest.fixture(scope="module")
def dev(rendered: Callable[[str], Template]) -> Template:
    return rendered("dev")


def of_type(template: Template, kind: str) -> dict[str, Any]:
    return {name: found for name, found in template["Resources"].items() if found["Type"] == kind}


def properties(template: Template, name: str) -> Any:
    return template["Resources"][name]["Properties"]


def references(value: Any) -> Iterator[str]:
    """Logical names that a value mentions."""
    if isinstance(value, list):
        for one in value:
            yield from references(one)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "Ref":
                yield inner
            elif key == "Fn::GetAtt":
                yield inner[0] if isinstance(inner, list) else inner.partition(".")[0]
            elif key == "Fn::Sub":
                text, names = inner if isinstance(inner, list) else (inner, {})
                found = re.findall(r"\$\{([^!}][^}.]*)[^}]*\}", text)
                yield from (name for name in found if name not in names)
                yield from references(list(names.values()))
            elif key == "DependsOn":
                yield from [inner] if isinstance(inner, str) else inner
            else:
                yield from references(inner)


def dangling(template: Template) -> set[str]:
    there = {*template["Resources"], *template.get("Parameters", {})}
    return {name for name in references(template) if not name.startswith("AWS::")} - there


@pytest.mark.parametrize("stage", ["dev", "prod", pytest.param("staging", marks=pytest.mark.slow)])
def test_no_reference_dangles_and_no_variable_is_left(rendered: Callable[[str], Template], stage: str) -> None:
    template = rendered(stage)
    assert dangling(template) == set()
    assert not re.search(r"\$\{(self|param|sls|opt|aws|file):", json.dumps(template))
    assert len(list(references(template))) > 100


@pytest.mark.parametrize(
    "value",
    [
        {"Ref": "Gone"},
        {"Fn::GetAtt": ["Gone", "Arn"]},
        {"Fn::GetAtt": "Gone.Arn"},
        {"Fn::Sub": "a-${Gone.Arn}"},
        {"Fn::Sub": "${Gone}"},
    ],
)
def test_a_dangling_reference_would_be_found(prod: Template, value: Any) -> None:
    broken = {"Resources": {**prod["Resources"], "More": {"Type": "X", "Properties": {"a": [value, {"Fn::Sub": "${!Literal}"}]}}}}
    assert dangling(broken) == {"Gone"}


@pytest.mark.parametrize("stage", ["prod", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("dev", "staging"))])
def test_cfn_lint_has_nothing_to_say(rendered: Callable[[str], Template], stage: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(json.dumps(rendered(stage)))
    # W3005: osls writes DependsOn beside each reference.
    done = lint(tmp_path / "template.json", "--ignore-checks", "W3005")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_cfn_lint_would_say_something(tmp_path: Path) -> None:
    queue = {"Type": "AWS::SQS::Queue", "Properties": {"VisibilityTimeOut": 1}}
    (tmp_path / "template.json").write_text(json.dumps({"Resources": {"Requests": queue}}))
    assert "VisibilityTimeOut" in lint(tmp_path / "template.json").stdout


def lint(template: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("cfn-lint")
    return subprocess.run([program, *options, "-t", template], capture_output=True, text=True, timeout=120, check=False)


def alias_of(template: Template, logical: str) -> Any:
    return template["Resources"][f"{logical}ProvConcLambdaAlias"]


@pytest.mark.parametrize("logical", PREDICTING)
def test_the_api_calls_the_provisioned_alias(prod: Template, logical: str) -> None:
    alias = alias_of(prod, logical)["Properties"]
    assert alias["Name"] == "provisioned"
    assert alias["ProvisionedConcurrencyConfig"] == {"ProvisionedConcurrentExecutions": 2}
    version = alias["FunctionVersion"]["Fn::GetAtt"][0]
    assert properties(prod, version)["FunctionName"] == alias["FunctionName"] == {"Ref": f"{logical}LambdaFunction"}
    called = {"Fn::Join": [":", [{"Fn::GetAtt": [f"{logical}LambdaFunction", "Arn"]}, "provisioned"]]}
    assert properties(prod, f"HttpApiIntegration{logical}")["IntegrationUri"] == called
    assert properties(prod, f"{logical}LambdaPermissionHttpApi")["FunctionName"] == called


def test_no_integration_goes_past_an_alias(prod: Template) -> None:
    integrations = of_type(prod, "AWS::ApiGatewayV2::Integration")
    assert set(integrations) == {f"HttpApiIntegration{logical}" for logical in PREDICTING}
    routes = {
        route["Properties"]["RouteKey"]: route["Properties"]["Target"]
        for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()
    }
    assert {key: [name for name in references(target) if name in integrations] for key, target in routes.items()} == {
        "ANY /{proxy+}": ["HttpApiIntegrationPredict"],
        "ANY /v2/models/flight-delay": ["HttpApiIntegrationFlightDelay"],
        "ANY /v2/models/flight-delay/{rest+}": ["HttpApiIntegrationFlightDelay"],
    }


def matched(route_key: str, path: str) -> dict[str, str] | None:
    """The path parameters that API Gateway would send for a path of this route; None where the route is not the path's."""
    pattern = re.sub(r"\\\{(\w+)\\\+\\\}", r"(?P<\1>.+)", re.escape(route_key.partition(" ")[2]))
    found = re.fullmatch(pattern, path)
    return found and found.groupdict()


@pytest.mark.parametrize("stage", ["$default", "v1"])
def test_the_function_sees_the_path_that_was_asked_for(prod: Template, stage: str) -> None:
    asked = ["/v2/models/flight-delay", "/v2/models/flight-delay/infer", "/v2/models/flight-delay/versions/3/ready", "/ping"]
    tried = set()
    for key in (route["Properties"]["RouteKey"] for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()):
        for path in asked:
            if (parameters := matched(key, path)) is None:
                continue
            tried.add(key)
            context = {"http": {"method": "POST", "path": path}, "stage": stage, "routeKey": key}
            raw = path if stage == "$default" else f"/{stage}{path}"
            event = {"version": "2.0", "routeKey": key, "rawPath": raw, "requestContext": context}
            if parameters:
                event["pathParameters"] = parameters
            assert HttpApi(event).request().path == path, key
    assert tried == {route["Properties"]["RouteKey"] for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()}


def test_nobody_unknown_gets_in(prod: Template, dev: Template) -> None:
    for route in of_type(prod, "AWS::ApiGatewayV2::Route").values():
        assert route["Properties"]["AuthorizationType"] == "JWT"
        assert route["Properties"]["AuthorizerId"] == {"Ref": "HttpApiAuthorizerJwt"}
    jwt = properties(prod, "HttpApiAuthorizerJwt")
    assert jwt["JwtConfiguration"] == {"Audience": ["triform"], "Issuer": "https://issuer.example.com/"}
    assert {route["Properties"]["AuthorizationType"] for route in of_type(dev, "AWS::ApiGatewayV2::Route").values()} == {
        "AWS_IAM"
    }
    assert of_type(dev, "AWS::ApiGatewayV2::Authorizer") == {}


def test_the_api_is_throttled(prod: Template, dev: Template) -> None:
    told = {"DetailedMetricsEnabled": True, "ThrottlingRateLimit": 200, "ThrottlingBurstLimit": 400}
    assert properties(prod, "HttpApiStage")["DefaultRouteSettings"] == told
    assert properties(dev, "HttpApiStage")["DefaultRouteSettings"]["ThrottlingRateLimit"] == 10


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


def test_errors_that_lambda_does_not_see_are_counted(prod: Template) -> None:
    """The handler never raises, so an error of ours is an invocation that went well."""
    counted = f'SUM("{REQUESTS.name}")'
    schema = ", ".join(f'"{name}"' for name in ("Triform/prod", *REQUESTS.labels))
    told = f"SELECT {counted} FROM SCHEMA({schema}) WHERE \"form\" = 'lambda' AND \"code\" = '{TriformError.code}'"  # noqa: S608
    for logical, more in ("Predict", ""), ("FlightDelay", " AND \"model\" = 'flight-delay'"):
        alarm = properties(prod, f"{logical}Internal")
        (metric,) = alarm["Metrics"]
        assert (metric["Expression"], metric["Period"], alarm["Threshold"]) == (told + more, 60, 0)


LOGS = {"logs:CreateLogStream", "logs:PutLogEvents"}
TRACES = {"xray:PutTraceSegments", "xray:PutTelemetryRecords"}
FUNCTION = LOGS | TRACES | {"kms:Decrypt"}
DATA = {"kms:GenerateDataKey"}
CONSUME = {"sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"}
HOOK = FUNCTION | {"lambda:InvokeFunction", "codedeploy:PutLifecycleEventHookExecutionStatus"}
ACTIONS = {
    "PredictRole": FUNCTION | DATA | {"s3:GetObject", "s3:PutObject", "s3:ListBucket"},
    "FlightDelayRole": FUNCTION | DATA | {"s3:GetObject", "s3:PutObject", "s3:ListBucket"},
    "SqsRole": FUNCTION | DATA | CONSUME | {"s3:PutObject", "dynamodb:PutItem", "dynamodb:UpdateItem", "dynamodb:DeleteItem"},
    "S3Role": FUNCTION
    | DATA
    | CONSUME
    | {
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
        "s3:ListBucket",
        "s3:ListBucketMultipartUploads",
    }
    | {"sqs:SendMessage", "secretsmanager:GetSecretValue"},
    "NightlyRole": FUNCTION | DATA | {"secretsmanager:GetSecretValue", "sqs:SendMessage"},
    "PredictHookRole": HOOK,
    "FlightDelayHookRole": HOOK,
    "NightRole": DATA | {"kms:Decrypt", "lambda:InvokeFunction", "sqs:SendMessage"},
    "RolloutRole": {
        "cloudwatch:DescribeAlarms",
        "lambda:UpdateAlias",
        "lambda:GetAlias",
        "lambda:GetProvisionedConcurrencyConfig",
        "lambda:InvokeFunction",
    },
}


def some(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(template: Template, role: str) -> list[Any]:
    return [one for policy in properties(template, role)["Policies"] for one in policy["PolicyDocument"]["Statement"]]


def test_each_role_may_do_exactly_this(prod: Template, dev: Template) -> None:
    for template in prod, dev:
        roles = of_type(template, "AWS::IAM::Role")
        assert {name: {a for one in statements(template, name) for a in some(one["Action"])} for name in roles} == ACTIONS
        assert not any("ManagedPolicyArns" in role["Properties"] for role in roles.values())


def test_everything_is_allowed_only_where_there_is_no_other_way(prod: Template) -> None:
    for role in of_type(prod, "AWS::IAM::Role"):
        for one in statements(prod, role):
            assert one["Effect"] == "Allow"
            if "*" in some(one["Resource"]):
                assert set(some(one["Action"])) <= TRACES | {"cloudwatch:DescribeAlarms"}


def test_no_two_functions_share_a_role(prod: Template) -> None:
    functions = of_type(prod, "AWS::Lambda::Function")
    roles = [function["Properties"]["Role"]["Fn::GetAtt"][0] for function in functions.values()]
    assert sorted(roles) == sorted(name.replace("LambdaFunction", "Role") for name in functions)
    for name, function in functions.items():
        (logs,) = (one for one in statements(prod, name.replace("LambdaFunction", "Role")) if one["Sid"] == "Logs")
        assert logs["Resource"]["Fn::Sub"].endswith(f":log-group:/aws/lambda/{function['Properties']['FunctionName']}:*")


def test_what_a_role_may_write_is_where_its_function_writes(prod: Template) -> None:
    def resources(role: str, action: str) -> list[str]:
        found = [one["Resource"] for one in statements(prod, role) if action in some(one["Action"])]
        return [resource.get("Fn::Sub") or ".".join(resource["Fn::GetAtt"]) for one in found for resource in some(one)]

    assert resources("PredictRole", "s3:PutObject") == ["${Data.Arn}/references/*"]
    assert resources("SqsRole", "s3:PutObject") == ["${Data.Arn}/results/*"]
    assert resources("S3Role", "s3:PutObject") == ["${Data.Arn}/scored/*"]
    assert all("/scored/*/_" in resource for resource in resources("S3Role", "s3:DeleteObject"))
    assert resources("S3Role", "sqs:SendMessage") == ["Undone.Arn"]
    for logical in PREDICTING:
        assert resources(f"{logical}HookRole", "lambda:InvokeFunction") == [f"${{{logical}LambdaFunction.Arn}}:*"]


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


def test_queues_are_encrypted_and_lose_nothing(prod: Template) -> None:
    queues = of_type(prod, "AWS::SQS::Queue")
    assert all(queue["Properties"]["KmsMasterKeyId"] == {"Ref": "Key"} for queue in queues.values())
    for mapping in of_type(prod, "AWS::Lambda::EventSourceMapping").values():
        told = mapping["Properties"]
        assert told["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
        queue = properties(prod, told["EventSourceArn"]["Fn::GetAtt"][0])
        function = properties(prod, told["FunctionName"]["Fn::GetAtt"][0])
        assert queue["VisibilityTimeout"] >= 6 * function["Timeout"]
        dead = queue["RedrivePolicy"]["deadLetterTargetArn"]["Fn::GetAtt"][0]
        assert properties(prod, dead)["MessageRetentionPeriod"] == 14 * 86_400
    dead = {"Fn::GetAtt": ["NightlyDead", "Arn"]}
    assert properties(prod, "Night")["Target"]["DeadLetterConfig"] == {"Arn": dead}
    assert properties(prod, "NightlyLambdaEvConf")["DestinationConfig"] == {"OnFailure": {"Destination": dead}}


def test_every_queue_of_dead_letters_has_an_alarm(prod: Template) -> None:
    alarmed = {
        dimension["Value"]["Fn::GetAtt"][0]
        for alarm in of_type(prod, "AWS::CloudWatch::Alarm").values()
        for dimension in alarm["Properties"].get("Dimensions", [])
        if dimension["Name"] == "QueueName"
    }
    assert alarmed == {name for name in of_type(prod, "AWS::SQS::Queue") if name.endswith("Dead")} | {"Undone"}


def test_logs_are_encrypted_and_do_not_stay_for_ever(prod: Template, dev: Template) -> None:
    for template, days in (prod, 90), (dev, 7):
        groups = of_type(template, "AWS::Logs::LogGroup")
        assert {group["Properties"]["RetentionInDays"] for group in groups.values()} == {days}
        assert {json.dumps(group["Properties"].get("KmsKeyId")) for group in groups.values()} == {
            '{"Fn::GetAtt": ["Key", "Arn"]}'
        }
        assert len(groups) == len(of_type(template, "AWS::Lambda::Function")) + 1


def test_environments_are_encrypted_and_traced(prod: Template) -> None:
    for function in of_type(prod, "AWS::Lambda::Function").values():
        assert function["Properties"]["KmsKeyArn"] == {"Fn::GetAtt": ["Key", "Arn"]}
        assert function["Properties"]["TracingConfig"] == {"Mode": "Active"}


def test_the_bucket_is_private(prod: Template) -> None:
    bucket = properties(prod, "Data")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    (policy,) = properties(prod, "DataPolicy")["PolicyDocument"]["Statement"]
    assert (policy["Effect"], policy["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    for name in "Data", "Key":
        assert prod["Resources"][name]["DeletionPolicy"] == "RetainExceptOnCreate"
        assert prod["Resources"][name]["UpdateReplacePolicy"] == "Retain"


def test_output_does_not_come_in_again(prod: Template) -> None:
    (events,) = properties(prod, "Data")["NotificationConfiguration"]["QueueConfigurations"]
    prefix = events["Filter"]["S3Key"]["Rules"][0]["Value"]
    variables = properties(prod, "S3LambdaFunction")["Environment"]["Variables"]
    assert variables["TRIFORM_WATCHED"].endswith(f"/{prefix}")
    assert not variables["TRIFORM_OUTPUT"].startswith(variables["TRIFORM_WATCHED"])


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


def test_no_stage_counts_for_another(prod: Template, dev: Template) -> None:
    for template, namespace in (prod, "Triform/prod"), (dev, "Triform/dev"):
        for function in of_type(template, "AWS::Lambda::Function").values():
            assert function["Properties"]["Environment"]["Variables"]["POWERTOOLS_METRICS_NAMESPACE"] == namespace
        told = json.dumps(template)
        assert set(re.findall(r"Triform(?:/\w+)?", told)) == {namespace}
        assert told.count(namespace) >= 7 + 2 + 9


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


def test_functions_have_the_layers_that_were_built(prod: Template) -> None:
    names = {layer["Properties"]["LayerName"] for layer in of_type(prod, "AWS::Lambda::LayerVersion").values()}
    assert names == {f"triform-prod-{name}" for name in LAYERS if name != "function"}
    for function in of_type(prod, "AWS::Lambda::Function").values():
        layers = function["Properties"].get("Layers", [])
        assert len(layers) <= 5
        assert bool(layers) == ("ImageUri" not in function["Properties"]["Code"])


def test_functions_are_given_settings_that_there_are(prod: Template) -> None:
    """Of each function whose handler is here: an unknown key would refuse its start."""
    known = {f"TRIFORM_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    for name, function in of_type(prod, "AWS::Lambda::Function").items():
        handler = function["Properties"].get("Handler") or function["Properties"]["ImageConfig"]["Command"][0]
        given = {key for key in function["Properties"]["Environment"]["Variables"] if key.startswith("TRIFORM_")}
        if (ROOT / handler.removesuffix(".handler").replace(".", "/")).with_suffix(".py").is_file():
            assert given <= known, name


def test_the_cache_of_models_fits_the_functions_disk(prod: Template) -> None:
    function = properties(prod, "S3LambdaFunction")
    cache = int(function["Environment"]["Variables"]["TRIFORM_CACHE_BYTES"])
    assert cache == 1 << 30
    assert 2 * cache <= function["EphemeralStorage"]["Size"] << 20


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


def test_what_cannot_be_rendered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected one of dev, staging, prod"):
        serverless.render("test", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="layers: none are built there"):
        serverless.render("dev", tmp_path, tmp_path / "out")
    with pytest.raises(JobError, match=r"provider\.httpApi\.authorizers"):
        serverless.render("dev", stand_ins(tmp_path / "layers"), tmp_path / "out", {"access": "nobody"})
    assert not (tmp_path / "out" / serverless.TEMPLATE).exists()


def test_layers_of_another_target_are_refused(prod: Template) -> None:
    serverless.check_target(prod, {"arch": "x86_64", "python": "3.13"})
    for arch, python in ("arm64", "3.13"), ("x86_64", "3.12"):
        with pytest.raises(
            ConfigurationError, match=rf"runs on x86_64, python3\.13, the layers are built for {arch}, python{python}"
        ):
            serverless.check_target(prod, {"arch": arch, "python": python})


def command(*args: str) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": ROOT}
    return subprocess.run([sys.executable, "-m", "infra.serverless", "package", *args], **options)  # type: ignore[call-overload]


def test_wrong_use_is_one_line_and_2(tmp_path: Path) -> None:
    for args, told in (
        (["--param", "rate"], "param: expected key=value"),
        (["--layers", str(tmp_path)], "layers: none are built"),
    ):
        done = command(*args, "--out", str(tmp_path))
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert told in done.stderr


@pytest.mark.slow
def test_the_command_renders_with_the_params_that_it_is_given(tmp_path: Path) -> None:
    layers = stand_ins(tmp_path / "layers")
    done = command(
        "--stage",
        "staging",
        "--layers",
        str(layers),
        "--out",
        str(tmp_path / "out"),
        "--param",
        "rate=7",
        "--param",
        "python=3.12",
    )
    assert done.returncode == 0, done.stderr
    assert "AWS::Lambda::Function" in done.stdout
    template = json.loads((tmp_path / "out/staging" / serverless.TEMPLATE).read_text())
    assert properties(template, "HttpApiStage")["DefaultRouteSettings"]["ThrottlingRateLimit"] in (7, "7")
    assert properties(template, "PredictLambdaFunction")["Runtime"] == "python3.12"


def test_osls_is_locked_by_hash_and_names_no_address() -> None:
    lock = json.loads((serverless.NPM / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages["node_modules/osls"]["version"] == lock["packages"][""]["dependencies"]["osls"]
    assert all("integrity" in entry and "resolved" not in entry for entry in packages.values())
