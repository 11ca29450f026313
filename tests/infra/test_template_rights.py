"""Who may do what in the rendered template, and what is encrypted."""

from __future__ import annotations

import json
from typing import Any

from tests.infra.template import PREDICTING, Template, of_type, properties, some

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
    "ShiftingRole": {
        "codedeploy:ListDeployments",
        "application-autoscaling:RegisterScalableTarget",
        "lambda:GetProvisionedConcurrencyConfig",
        "lambda:PutProvisionedConcurrencyConfig",
    },
    "ShiftingStartsRole": {"states:StartExecution"},
    "RolloutRole": {
        "cloudwatch:DescribeAlarms",
        "lambda:UpdateAlias",
        "lambda:GetAlias",
        "lambda:GetProvisionedConcurrencyConfig",
        "lambda:InvokeFunction",
    },
}


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
