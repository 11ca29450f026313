"""The hook against a loopback server that speaks the two API calls; behind its `invoke` is the real predict function."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from handlers import _boot
from handlers._function import Function
from infra.local.environments import Environments, FunctionConfig
from tests.handlers.loopback import Quiet, served
from tests.handlers.starting import Handler, Invocation, golden_event, start
from triform import testing
from triform.errors import ConfigurationError, InvalidRequest
from triform.packaging import package_model
from triform.repository import open_repository

TARGET = "arn:aws:lambda:us-east-1:123456789012:function:triform-predict:7"


class Aws:
    """Lambda's `Invoke` and CodeDeploy's `PutLifecycleEventHookExecutionStatus`. `told` holds what CodeDeploy was told."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] = lambda event: event
        self.function_error = False
        self.statuses = iter(lambda: 200, None)
        self.invoked: list[tuple[str, Any]] = []
        self.told: list[dict[str, str]] = []

    def handle(self, path: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if target == "CodeDeploy_20141006.PutLifecycleEventHookExecutionStatus":
            self.told.append(json.loads(body))
            return 200, {}, json.dumps({"lifecycleEventHookExecutionId": "x"}).encode()
        if (status := next(self.statuses)) != 200:
            return status, {}, b'{"message": "not now"}'
        event = json.loads(body)
        self.invoked.append((unquote(path.removeprefix("/2015-03-31/functions/").removesuffix("/invocations")), event))
        extra = {"X-Amz-Function-Error": "Unhandled"} if self.function_error else {}
        return 200, extra, json.dumps(self.answer(event)).encode()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    aws = Aws()

    class Endpoint(Quiet):
        def reply(self) -> None:
            status, headers, answer = aws.handle(self.path, self.headers.get("X-Amz-Target", ""), self.body())
            self.answer(status, answer, **headers)

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with served(Endpoint) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield aws


TWO = """
[inputs.word]
columns = ["word"]
[inputs.x]
columns = [{name = "amount", null = "nan"}]
"""


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packaged")
    made = {"linear": testing.linear(root / "linear.onnx"), "two": testing.text_and_number(root / "two.onnx")}
    testing.repository(root / "models", made, config={"two": TWO})
    return root / "models"


@pytest.fixture
def models(packaged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packaged, tmp_path / "models")


def predicting(models: Path) -> Callable[[Any], Any]:
    """What the version answers that has these models."""
    function = Function(_boot.boot({"TRIFORM_REPOSITORY": str(models)}))
    return lambda event: function(event, Invocation())


@pytest.fixture
def hook(models: Path, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Handler:
    aws.answer = predicting(models)
    return start("pre_traffic", monkeypatch, repository=models, target=TARGET)


def call(hook: Handler, aws: Aws) -> str:
    """The status that CodeDeploy is told."""
    event = golden_event("pre-traffic")
    said = hook(event, Invocation())["status"]
    told = aws.told.pop()
    assert told == {
        "deploymentId": event["DeploymentId"],
        "lifecycleEventHookExecutionId": event["LifecycleEventHookExecutionId"],
        "status": said,
    }
    assert aws.told == []
    return str(said)


def test_a_version_that_answers_as_it_was_packaged_may_have_traffic(hook: Handler, aws: Aws) -> None:
    assert call(hook, aws) == "Succeeded"
    assert [(function, event["model"], event["version"]) for function, event in aws.invoked] == [
        (TARGET, "linear", 1),
        (TARGET, "two", 1),
    ]
    assert all(len(event["inputs"]["x"]) > 1 for _, event in aws.invoked)


def test_the_version_behind_the_real_runtime_client(hook: Handler, aws: Aws, models: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRIFORM_")}
    config = FunctionConfig(environ={**environ, "TRIFORM_REPOSITORY": str(models)})
    running = Environments(config, report=lambda _: None, line=lambda _: None)
    try:
        aws.answer = lambda event: json.loads(running.invoke(json.dumps(event).encode()).payload)
        assert call(hook, aws) == "Succeeded"
    finally:
        running.close()


def test_samples_that_do_not_fit_in_one_invocation_are_sent_in_several(
    hook: Handler, aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.pre_traffic.PAYLOAD_BYTES", 200)
    assert call(hook, aws) == "Succeeded"
    assert len(aws.invoked) > 2


def test_an_answer_that_does_not_fit_is_asked_for_in_halves(hook: Handler, aws: Aws, models: Path) -> None:
    answer = predicting(models)

    def small_answers_only(event: Any) -> Any:
        many = len(event["inputs"]["x"]) > 2
        return {"error": "too large", "code": "answer_too_large", "status": 413} if many else answer(event)

    aws.answer = small_answers_only
    assert call(hook, aws) == "Succeeded"


def test_other_weights_under_the_same_version_fail(hook: Handler, aws: Aws, tmp_path: Path) -> None:
    other = open_repository(tmp_path / "other")
    package_model(testing.linear(tmp_path / "other.onnx", outputs=1, features=3), name="linear", repository=other)
    wrong = predicting(tmp_path / "other")

    def answer(event: Any) -> Any:
        told = wrong(event)
        told["outputs"][0][0] += 0.5
        return told

    aws.answer = answer
    assert call(hook, aws) == "Failed"


@pytest.mark.parametrize(
    "answer",
    [
        None, [], {}, {"error": "no model 'linear'", "code": "model_not_found", "status": 404},
        {"model": "linear/2", "outputs": []}, {"model": "linear/1"}, {"model": "linear/1", "outputs": "text"},
        {"model": "linear/1", "outputs": [[1.0]]}, {"model": "linear/1", "outputs": {"z": []}},
        {"error": "too large", "code": "answer_too_large", "status": 413},
    ],
)  # fmt: skip
def test_an_answer_of_another_kind_fails(answer: Any, hook: Handler, aws: Aws) -> None:
    aws.answer = lambda _: answer
    assert call(hook, aws) == "Failed"


def test_a_version_that_raises_fails(hook: Handler, aws: Aws) -> None:
    aws.function_error = True
    assert call(hook, aws) == "Failed"


def test_a_version_that_cannot_be_invoked_fails(hook: Handler, aws: Aws) -> None:
    aws.statuses = iter(lambda: 404, None)
    assert call(hook, aws) == "Failed"


def test_what_passes_is_tried_again(hook: Handler, aws: Aws) -> None:
    aws.statuses = iter([429, *[200] * 10])
    assert call(hook, aws) == "Succeeded"


def test_a_package_that_is_damaged_meanwhile_fails(hook: Handler, aws: Aws, models: Path) -> None:
    shutil.rmtree(models / "linear/1")
    assert call(hook, aws) == "Failed"


def test_nan_is_left_out_of_what_is_sent_and_null_in_what_comes_back(
    aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.array([1.0, np.nan, 2.0, -1.0], dtype=np.float32))
    models = open_repository(tmp_path / "logs")
    node = [testing.helper.make_node("Log", ["x"], ["y"])]
    made = testing.save(tmp_path / "log.onnx", node, [testing.value("x", "FP32", ["N"])], [testing.value("y", "FP32", ["N"])])
    package_model(made, name="log", repository=models, samples=samples)
    aws.answer = predicting(tmp_path / "logs")
    hook = start("pre_traffic", monkeypatch, repository=models.location, target=TARGET)
    assert call(hook, aws) == "Succeeded"
    sent = [value for _, event in aws.invoked for value in event["inputs"]["x"]]
    assert -1.0 in sent
    assert all(value is not None for value in sent)


@pytest.mark.parametrize("event", [None, {}, {"DeploymentId": "d-1"}, {"DeploymentId": 1, "LifecycleEventHookExecutionId": "x"}])
def test_what_is_no_hook_is_refused(event: Any, hook: Handler, aws: Aws) -> None:
    with pytest.raises(InvalidRequest):
        hook(event, Invocation())
    assert aws.told == aws.invoked == []


@pytest.mark.parametrize("target", ["", "triform-predict", "arn:aws:lambda:us-east-1:1:function:x:7", "f:$LATEST", "f:7/../x"])
def test_a_target_without_a_version_is_refused(target: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="TRIFORM_TARGET"):
        start("pre_traffic", monkeypatch, repository=models, target=target)
