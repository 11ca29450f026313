"""A rollout.toml rendered for CodeDeploy: what becomes of its steps and limits, and what is said of the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import rollout, serverless
from infra.layers import models
from tests.infra.built import tiny_repository
from tests.infra.template import PREDICTING, Template, alias_of, properties, references, stand_ins
from tests.infra.test_template import dangling, lint
from triform.errors import ConfigurationError
from triform.rollout.policy import Policy, Step, read_policy
from triform.telemetry import FAULTS

ROOT = Path(__file__).parent.parent.parent
FULL = """
[shadow]
sample = 0.1
[[steps]]
weight = 0.1
min_seconds = 600
[guards.disagreement]
limit = 0.01
[guards.score_shift]
limit = 0.2
[guards.limits]
error_rate = 0.1
p50_ms = 100
p95_ms = 500
p99_ms = 1000
qps = 50
"""
LIMITS = ["LimitErrorRate", "LimitP50", "LimitP95", "LimitP99", "LimitQps"]


def steps(*weights: float, seconds: float = 600.0) -> Policy:
    return Policy(steps=tuple(Step(weight=weight, min_seconds=seconds) for weight in weights))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "rollout.toml"
    path.write_text(FULL)
    return path


@pytest.fixture(scope="module")
def guarded(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The template of prod with the policy, packaged as a user does it."""
    folder = tmp_path_factory.mktemp("with-policy")
    layers = stand_ins(folder / "layers")
    done = command(str(policy), "--layers", str(layers), "--to", str(folder / "rollout.json"))
    assert done.returncode == 0, done.stderr
    template = serverless.render("prod", layers, folder / "out", {"policy": str(folder / "rollout.json")})
    content: Template = json.loads(template.read_text())
    return content


def command(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "infra.rollout", "render", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("policy", "shift"),
    [
        (steps(0.1), ("Canary", 10, 10)),
        (steps(0.25, 0.5, 0.75), ("Linear", 25, 10)),
        (steps(0.3, 0.6, 0.9), ("Linear", 30, 10)),  # the last increment is what is left
        (steps(0.01, 0.1, 0.5), ("Canary", 1, 30)),  # as long as the three together
        (steps(0.25, 0.5), ("Canary", 25, 20)),  # even, but half is missing
        (steps(0.1, seconds=61), ("Canary", 10, 3)),  # alarms need so long
        (steps(0.1, seconds=601), ("Canary", 10, 11)),
        (Policy(steps=(Step(weight=0.5, min_seconds=300.0),)), ("Canary", 50, 5)),
        (steps(0.29), ("Canary", 29, 10)),  # 0.29 * 100 is less than 29
        (steps(0.125), ("Canary", 12, 10)),
    ],
)
def test_steps_become_the_nearest_that_codedeploy_can_do(policy: Policy, shift: tuple[str, int, int]) -> None:
    assert rollout.plan(policy)[0] == shift


def test_what_becomes_of_the_steps_is_said() -> None:
    def told(policy: Policy) -> str:
        return "\n".join(rollout.plan(policy)[1])

    assert told(steps(0.1)) == told(steps(0.25, 0.5, 0.75)) == ""
    assert "does not stop at 0.1, 0.5" in told(steps(0.01, 0.1, 0.5))
    assert told(steps(0.125)).startswith("steps[0].weight: 0.125 becomes 12 %")
    assert "3 minutes at least" in told(steps(0.1, seconds=60))
    uneven = Policy(steps=(Step(weight=0.5, min_seconds=600.0),))
    assert told(uneven) == ""
    times = Policy(steps=tuple(Step(weight=w, min_seconds=s) for w, s in ((0.4, 300.0), (0.8, 900.0))))
    assert "15 minutes for each" in told(times)


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        (steps(0.005, 0.5), r"steps\[0\]\.weight: expected 0\.01 or more"),
        (Policy(steps=(Step(weight=0.1, min_seconds=40 * 3600),), longest_seconds=50 * 3600), "steps: min_seconds"),
        (
            Policy(
                steps=tuple(Step(weight=w, min_seconds=s) for w, s in ((0.4, 60.0), (0.8, 17 * 3600.0))), longest_seconds=86_400.0
            ),
            "steps: min_seconds",
        ),
    ],
)
def test_what_codedeploy_cannot_do_at_all_is_refused_with_the_key(policy: Policy, key: str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        rollout.plan(policy)


def test_the_rest_of_a_policy_is_said_and_not_dropped(policy: Path, tmp_path: Path) -> None:
    layers = stand_ins(tmp_path / "layers")
    notes = rollout.render(read_policy(policy), layers).notes
    for key in (
        "key",
        "shadow",
        "steps: min_requests",
        "guards.errors, guards.latency, guards.disagreement, guards.score_shift",
        "alpha, beta, inconclusive, longest_seconds",
        "guards.limits.qps",
    ):
        assert [note for note in notes if note.startswith(f"{key}: ")], key
    plain = rollout.render(Policy(), layers).notes
    assert not [note for note in plain if note.startswith(("shadow", "guards.limits.qps"))]
    assert [note for note in plain if note.startswith("guards.limits: none")]


@pytest.mark.parametrize("logical", PREDICTING)
def test_the_template_follows_the_policy(guarded: Template, prod: Template, logical: str) -> None:
    group, before = properties(guarded, f"{logical}Rollout"), properties(prod, f"{logical}Rollout")
    assert group["DeploymentConfigName"] == {"Ref": "RolloutSteps"}
    assert properties(guarded, "RolloutSteps") == {
        "ComputePlatform": "Lambda",
        "TrafficRoutingConfig": {
            "Type": "TimeBasedCanary",
            "TimeBasedCanary": {"CanaryPercentage": 10, "CanaryInterval": 10},
        },
    }
    more = [{"Name": {"Ref": f"{logical}{what}"}} for what in LIMITS]
    assert group["AlarmConfiguration"]["Alarms"] == before["AlarmConfiguration"]["Alarms"] + more
    assert {key: value for key, value in group.items() if key not in ("DeploymentConfigName", "AlarmConfiguration")} == {
        key: value for key, value in before.items() if key not in ("DeploymentConfigName", "AlarmConfiguration")
    }
    assert f"{logical}Rollout" in alias_of(guarded, logical)["DependsOn"], "its alarms are there before there is traffic"


@pytest.mark.parametrize("logical", PREDICTING)
def test_limits_are_alarms_on_the_version_that_is_shifted_to(guarded: Template, logical: str) -> None:
    version = {"Fn::GetAtt": [alias_of(guarded, logical)["Properties"]["FunctionVersion"]["Fn::GetAtt"][0], "Version"]}
    function = {"Ref": f"{logical}LambdaFunction"}
    alias = [
        {"Name": "FunctionName", "Value": function},
        {"Name": "Resource", "Value": {"Fn::Sub": f"${{{logical}LambdaFunction}}:provisioned"}},
    ]
    executed = [*alias, {"Name": "ExecutedVersion", "Value": version}]
    rate, *quantiles, qps = (properties(guarded, f"{logical}{what}") for what in LIMITS)

    assert (rate["Threshold"], rate["ComparisonOperator"], rate["TreatMissingData"]) == (
        0.1,
        "GreaterThanThreshold",
        "notBreaching",
    )
    read = {query["Id"]: query["MetricStat"]["Metric"] for query in rate["Metrics"] if "MetricStat" in query}
    assert {key: (metric["Namespace"], metric["MetricName"], metric["Dimensions"]) for key, metric in read.items()} == {
        "invocations": ("AWS/Lambda", "Invocations", executed),
        "errors": ("AWS/Lambda", "Errors", executed),
        "faults": (
            "Triform/prod",
            FAULTS.name,
            [{"Name": n, "Value": v} for n, v in zip(FAULTS.labels, ("lambda", function, version), strict=True)],
        ),
    }
    for alarm, (statistic, limit) in zip(quantiles, (("p50", 100), ("p95", 500), ("p99", 1000)), strict=True):
        told = [alarm[key] for key in ("MetricName", "ExtendedStatistic", "Dimensions", "Threshold", "ComparisonOperator")]
        assert told == ["Duration", statistic, executed, limit, "GreaterThanThreshold"]
    assert (qps["Threshold"], qps["ComparisonOperator"], qps["TreatMissingData"]) == (50, "LessThanThreshold", "breaching")
    assert [query["MetricStat"]["Metric"]["Dimensions"] for query in qps["Metrics"][1:]] == [alias, alias]
    for alarm in rate, qps:
        assert [query["Id"] for query in alarm["Metrics"] if query["ReturnData"]] == ["rate"]


@pytest.mark.parametrize(
    ("invocations", "errors", "faults", "rate"), [(0, 0, 0, 0.0), (100, 5, 5, 0.1), (100, 0, 30, 0.3), (1, 1, 0, 1.0)]
)
def test_the_error_rate_is_failed_by_all(guarded: Template, invocations: int, errors: int, faults: int, rate: float) -> None:
    """The expressions, as CloudWatch computes them at one point."""
    known: dict[str, Any] = {"invocations": invocations, "errors": errors, "faults": faults}
    functions: dict[str, Callable[..., Any]] = {
        "FILL": lambda value, other: other if value is None else value,
        "IF": lambda condition, one, other: one if condition else other,
    }
    for query in properties(guarded, "PredictLimitErrorRate")["Metrics"]:
        if "Expression" in query:
            known[query["Id"]] = eval(query["Expression"], {"__builtins__": {}}, known | functions)  # noqa: S307 - our own text
    assert known["rate"] == pytest.approx(rate)


def test_the_template_with_the_policy_is_sound(guarded: Template, tmp_path: Path) -> None:
    assert dangling(guarded) == set()
    assert "RolloutSteps" in set(references(guarded))
    (tmp_path / "template.json").write_text(json.dumps(guarded))
    done = lint(tmp_path / "template.json", "--ignore-checks", "W3005")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_command_writes_the_same_text_each_time_and_refuses_in_one_line(policy: Path, tmp_path: Path) -> None:
    layers = str(stand_ins(tmp_path / "layers"))
    first, second = (command(str(policy), "--layers", layers) for _ in range(2))
    assert (first.returncode, first.stdout) == (0, second.stdout)
    assert "RolloutSteps" in json.loads(first.stdout)["Resources"]
    assert first.stderr == second.stderr != ""
    (tmp_path / "wrong.toml").write_text("[[steps]]\nweight = 0.001\n")
    for args, told in (
        ([str(tmp_path / "wrong.toml"), "--layers", layers], "steps[0].weight: expected 0.01 or more"),
        ([str(policy), "--layers", str(tmp_path)], "layers: none are built"),
        ([str(tmp_path / "none.toml"), "--layers", layers], "none.toml"),
    ):
        done = command(*args)
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
        assert told in done.stderr


def test_a_function_that_splits_keys_itself_is_shifted_at_once(tmp_path: Path) -> None:
    """Its models layer holds stable and canary of `linear`, and the release; the other function's holds stable alone."""
    layers, source = stand_ins(tmp_path / "layers"), tiny_repository(tmp_path / "source")
    models.place(source, ["linear"], layers / "models/models")
    models.place(source, ["linear@stable"], layers / "models-flight-delay/models")
    rendered = rollout.render(steps(0.1), layers)
    groups = {name: rendered.resources["Resources"][f"{name}Rollout"]["Properties"] for name in PREDICTING}
    assert groups["Predict"]["DeploymentConfigName"] == "CodeDeployDefault.LambdaAllAtOnce"
    assert groups["FlightDelay"]["DeploymentConfigName"] == {"Ref": "RolloutSteps"}
    (note,) = (note for note in rendered.notes if note.startswith("predict: "))
    assert "linear (revision 2, weight 0.1)" in note
    assert not [note for note in rendered.notes if note.startswith("flightDelay")]

    with pytest.raises(ConfigurationError, match="predict splits keys itself between stable and canary of linear"):
        serverless.render("prod", layers, tmp_path / "two-actuators")
    (tmp_path / "rollout.json").write_text(json.dumps(rendered.resources))
    serverless.render("prod", layers, tmp_path / "one-actuator", {"policy": str(tmp_path / "rollout.json")})
