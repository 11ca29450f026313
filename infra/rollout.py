"""`rollout.toml` for functions of Lambda, as far as CodeDeploy can do it: `python -m infra.rollout render rollout.toml`.

    rollout.toml ─► read_policy ─► steps ───► a deployment configuration: TimeBasedCanary or TimeBasedLinear
                                   limits ──► alarms on the function's version that is shifted to, which end a deployment
                                   the rest ► stderr: nobody does it there
    build/layers ─► does the function itself share keys between stable and canary? then CodeDeploy moves it at once
                        │
                        └─► resources that osls merges over infra/lambda/*.yml: `--param policy=build/rollout.json`

One actuator per function: either its version of a model is shifted by CodeDeploy, or it holds two and splits by the release.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import typer

from infra.layers.models import PINNED
from infra.shifted import Shifted, shifted_functions
from triform.cli.output import run_app
from triform.errors import ConfigurationError
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.rollout.policy import Policy, Step, read_policy
from triform.telemetry import FAULTS

AT_ONCE: Final = "CodeDeployDefault.LambdaAllAtOnce"
STEPS: Final = "RolloutSteps"  # the logical name of the deployment configuration
PERIOD: Final = 60  # seconds of an alarm's data point
PERIODS: Final = 3  # data points that are looked at
RINGING: Final = 2  # of which so many beyond the limit ring
LEAST_MINUTES: Final = PERIODS  # so that an alarm has the time to ring
# CloudFormation's operations end after 36 hours, and its own canaries may plan 33 of them. CodeDeploy alone would wait 48.
# https://docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference/aws-properties-ecs-service-canaryconfiguration.html
MOST_MINUTES: Final = 33 * 60

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Rendered(NamedTuple):
    """`resources`: for osls' `resources`; `notes`: what of the policy is done differently, or not at all."""

    resources: dict[str, Any]
    notes: list[str]


class Shift(NamedTuple):
    """How CodeDeploy moves an alias: so many per cent, then after so many minutes the next, or (Canary) all."""

    kind: Literal["Canary", "Linear"]
    percentage: int
    minutes: int

    def config(self) -> dict[str, Any]:
        given = {f"{self.kind}Percentage": self.percentage, f"{self.kind}Interval": self.minutes}
        routing = {"Type": f"TimeBased{self.kind}", f"TimeBased{self.kind}": given}
        # Without a name: CloudFormation replaces a configuration that changes, and two of one name cannot be.
        return {
            "Type": "AWS::CodeDeploy::DeploymentConfig",
            "Properties": {"ComputePlatform": "Lambda", "TrafficRoutingConfig": routing},
        }


def render(policy: Policy, layers: Path) -> Rendered:
    """The policy for the functions that CodeDeploy moves; `layers`: as built. Raises `ConfigurationError`, naming the key."""
    shift, notes = plan(policy)
    notes += list(_left_out(policy))
    resources: dict[str, Any] = {}
    for function in shifted_functions():
        config: Any = {"Ref": STEPS}
        if shared := list(sharing(function, layers)):
            config = AT_ONCE
            notes.append(f"{function.name}: shifted at once, as it splits keys itself between stable and canary of {shared[0]}")
        alarms = dict(_alarms(policy, function))
        resources |= alarms
        resources[f"{function.logical}Rollout"] = {
            "Properties": {
                "DeploymentConfigName": config,
                "AlarmConfiguration": {"Alarms": [*function.alarms, *({"Name": {"Ref": name}} for name in alarms)]},
            }
        }
    if f'"Ref": "{STEPS}"' in json.dumps(resources):
        resources[STEPS] = shift.config()
    return Rendered({"Resources": dict(sorted(resources.items()))}, notes)


def plan(policy: Policy) -> tuple[Shift, list[str]]:
    """What comes nearest to the steps, never giving the canary more than they do before it gets all; and what differs.

    Raises `ConfigurationError` for a first step below one per cent, and for more time than a deployment may take.
    """
    steps = policy.steps
    shares = [math.floor(round(step.weight * 100, 6)) for step in steps]
    if shares[0] < 1:
        raise ConfigurationError(
            f"steps[0].weight: expected 0.01 or more, as CodeDeploy shifts whole per cents, got {steps[0].weight:g}"
        )
    even = len(steps) > 1 and shares[-1] + shares[0] >= 100 and shares == [(i + 1) * shares[0] for i in range(len(steps))]
    if even:
        shift, increments = Shift("Linear", shares[0], _minutes(max(step.min_seconds for step in steps))), len(steps)
    else:
        shift, increments = Shift("Canary", shares[0], _minutes(sum(step.min_seconds for step in steps))), 1
    if (seconds := shift.minutes * increments * 60) > MOST_MINUTES * 60:
        raise ConfigurationError(
            f"steps: min_seconds: expected {MOST_MINUTES * 60} together at most, as CloudFormation waits no longer, got {seconds}"
        )
    return shift, list(_differences(steps, shares, shift))


def _differences(steps: Sequence[Step], shares: Sequence[int], shift: Shift) -> Iterator[str]:
    for i, (step, share) in enumerate(zip(steps, shares, strict=True)):
        if abs(step.weight * 100 - share) > 1e-6:
            yield f"steps[{i}].weight: {step.weight:g} becomes {share} %: CodeDeploy shifts whole per cents"
    least = sum if shift.kind == "Canary" else max
    if least(step.min_seconds for step in steps) < LEAST_MINUTES * 60:
        yield f"steps: min_seconds: {LEAST_MINUTES} minutes at least, so that an alarm can ring"
    if shift.kind == "Linear" and len({step.min_seconds for step in steps}) > 1:
        yield f"steps: min_seconds: {shift.minutes} minutes for each: CodeDeploy's increments take equally long"
    if shift.kind == "Canary" and len(steps) > 1:
        skipped = ", ".join(f"{step.weight:g}" for step in steps[1:])
        yield (
            f"steps: {shift.percentage} % for {shift.minutes} minutes, then all: CodeDeploy does not stop at {skipped}. "
            "It can do one step, or even ones up to the last (0.25, 0.5, 0.75)"
        )


def _minutes(seconds: float) -> int:
    return max(LEAST_MINUTES, math.ceil(seconds / 60))


def _left_out(policy: Policy) -> Iterator[str]:
    """What of a policy no alarm and no deployment configuration can do."""
    guards = policy.guards
    yield "key: nobody stays on a version: Lambda chooses one for each request by chance"
    if policy.shadow:
        yield "shadow: left out: a function does nothing after its answer"
    yield "steps: min_requests: left out: CodeDeploy counts minutes, not requests"
    given = {
        "errors": guards.errors,
        "latency": guards.latency,
        "disagreement": guards.disagreement,
        "score_shift": guards.score_shift,
    }
    relative = ", ".join(f"guards.{name}" for name, guard in given.items() if guard is not None)
    yield f"{relative}: left out: an alarm compares the new version with a limit, not with the stable one"
    yield "alpha, beta, inconclusive, longest_seconds: left out: there is no gate; what no alarm takes back is released"
    if guards.limits.qps is not None:
        yield "guards.limits.qps: of both versions together: what callers ask for, as Lambda does not tell a share from a lack"
    if not guards.limits.named():
        yield "guards.limits: none: only the alarms of infra/lambda/alarms.yml take a version back"


def sharing(function: Shifted, layers: Path) -> Iterator[str]:
    """Models of whose keys the function gives some to a canary, by the release in its layers (handlers/_boot.py)."""
    for layer in function.layers:
        folder = layers / layer / "models"
        if (folder / PINNED).is_file():
            repository = open_repository(folder)
            for model in repository.models():
                release = ReleaseLog(repository, model).current()
                if release is not None and release.canary is not None and release.canary.weight > 0:
                    yield f"{model} (revision {release.revision}, weight {release.canary.weight:g})"


def check_actuators(template: Mapping[str, Any], layers: Path) -> None:
    """Raises `ConfigurationError` where CodeDeploy would shift a function step by step that splits keys itself."""
    for function in shifted_functions():
        config = template["Resources"][f"{function.logical}Rollout"]["Properties"]["DeploymentConfigName"]
        if config != AT_ONCE and (shared := list(sharing(function, layers))):
            raise ConfigurationError(
                f"rollout: {function.name} splits keys itself between stable and canary of {shared[0]}: CodeDeploy must move it "
                f"at once. Give --param policy=FILE, rendered anew by `python -m infra.rollout`, or --param rollout={AT_ONCE}"
            )


def _alarms(policy: Policy, function: Shifted) -> Iterator[tuple[str, Any]]:
    """By logical name, of each limit. Their metrics are those of the function's version, which infra/lambda/hooks.js puts in: a
    model's own are fed by functions of queues, too, which have the new version at once."""
    limits = policy.guards.limits
    alias: list[dict[str, Any]] = [
        {"Name": "FunctionName", "Value": {"Ref": f"{function.logical}LambdaFunction"}},
        {"Name": "Resource", "Value": {"Fn::Sub": f"${{{function.logical}LambdaFunction}}:provisioned"}},
    ]
    version = [*alias, {"Name": "ExecutedVersion", "Value": function.name}]
    what = f"of the version of {function.name} that is rolled out"
    if (limit := limits.error_rate) is not None:
        rate = {
            "own": "FILL(invocations, 0)",
            "failed": "FILL(errors, 0) + FILL(faults, 0)",
            "rate": "failed / (own + IF(own > 0, 0, 1))",
        }
        metrics = [
            _counted("invocations", "AWS/Lambda", "Invocations", version),
            _counted("errors", "AWS/Lambda", "Errors", version),
            _counted("faults", "${self:custom.namespace}", FAULTS.name, _ours(function)),
        ]
        told = f"More than {limit:g} of the requests {what} fail"
        yield f"{function.logical}LimitErrorRate", _alarm(told, limit, _math(rate, metrics))
    for name, limit in limits.named().items():
        if name.startswith("p"):
            quantile = name.removesuffix("_ms")
            duration = {"Namespace": "AWS/Lambda", "MetricName": "Duration", "Dimensions": version, "ExtendedStatistic": quantile}
            told = f"{quantile} {what} is above {limit:g} ms"
            yield f"{function.logical}Limit{quantile.upper()}", _alarm(told, limit, {**duration, "Period": PERIOD})
    if (limit := limits.qps) is not None:
        metrics = [_counted(key, "AWS/Lambda", key.capitalize(), alias) for key in ("invocations", "errors")]
        told = f"{function.name} answers fewer than {limit:g} requests a second, both versions together"
        rate = {"rate": f"(invocations - errors) / {PERIOD}"}
        yield f"{function.logical}LimitQps", _alarm(told, limit, _math(rate, metrics), below=True)


def _ours(function: Shifted) -> list[dict[str, Any]]:
    values = ("lambda", {"Ref": f"{function.logical}LambdaFunction"}, function.name)
    return [{"Name": name, "Value": value} for name, value in zip(FAULTS.labels, values, strict=True)]


def _counted(key: str, namespace: str, metric: str, dimensions: list[dict[str, Any]]) -> dict[str, Any]:
    of = {"Namespace": namespace, "MetricName": metric, "Dimensions": dimensions}
    return {"Id": key, "ReturnData": False, "MetricStat": {"Stat": "Sum", "Period": PERIOD, "Metric": of}}


def _math(expressions: Mapping[str, str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What is looked at is the last of the expressions."""
    *_, last = expressions
    told = [{"Id": key, "Expression": text, "ReturnData": key == last} for key, text in expressions.items()]
    return {"Metrics": [*told, *metrics]}


def _alarm(told: str, limit: float, metric: dict[str, Any], *, below: bool = False) -> dict[str, Any]:
    """One that rings where the metric is beyond the limit; without data too where it must not be below."""
    properties = {
        "AlarmDescription": told,
        **metric,
        "EvaluationPeriods": PERIODS,
        "DatapointsToAlarm": RINGING,
        "Threshold": limit,
        "ComparisonOperator": "LessThanThreshold" if below else "GreaterThanThreshold",
        "TreatMissingData": "breaching" if below else "notBreaching",
        "AlarmActions": [{"Ref": "Alarms"}],
        "OKActions": [{"Ref": "Alarms"}],
    }
    return {"Type": "AWS::CloudWatch::Alarm", "Properties": properties}


@app.callback()
def root() -> None:
    """A release policy for functions of Lambda."""


@app.command("render")
def render_command(
    policy: Annotated[Path, typer.Argument(metavar="ROLLOUT.TOML", help="the policy")],
    layers: Annotated[Path, typer.Option(help="where `python -m infra.layers build` has built")] = Path("build/layers"),
    to: Annotated[Path | None, typer.Option(help="the file to write; standard output without it")] = None,
) -> None:
    """Write the policy as resources for osls: `--param policy=FILE`. What CodeDeploy cannot do is said on standard error."""
    if not (layers / "function.zip").is_file():
        raise ConfigurationError("layers: none are built there: run `python -m infra.layers build --model ... --each` first")
    rendered = render(read_policy(policy), layers)
    text = json.dumps(rendered.resources, indent=2) + "\n"
    if to is None:
        sys.stdout.write(text)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    for note in rendered.notes:
        typer.echo(note, err=True)


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
