"""The batch form's manifests of infra/ray against the schemas of what reads them, and against the job that they run."""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main

from batch import cli
from batch.spec import read_spec
from tests.infra.manifests import RAY, assert_needs_few_rights, documents, mounted, namespace, only, pods, tcp, validate
from triform.errors import ConfigurationError

MANIFESTS = ("access.yaml", "cronjob.yaml", "launcher.yaml", "rayjob.yaml")

DOCUMENTS = [pytest.param(one, id=f"{name}-{one['kind']}") for name in MANIFESTS for one in documents(name)]
PODS = [pytest.param(pod, id=f"{name}-{i}") for name in MANIFESTS for one in documents(name) for i, pod in enumerate(pods(one))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_manifest_fits_its_schema(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("cronjob.yaml", "CronJob", "spec"),
        ("cronjob.yaml", "CronJob", "spec.jobTemplate.spec.podFailurePolicy.rules.0"),
        ("rayjob.yaml", "RayJob", "spec"),
        ("rayjob.yaml", "RayJob", "spec.rayClusterSpec.headGroupSpec"),
        ("rayjob.yaml", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0"),
    ],
)
def test_a_misspelt_field_would_be_found(name: str, kind: str, path: str) -> None:
    document = json.loads(json.dumps(only(name, kind)))  # a copy without YAML's shared nodes
    target: Any = document
    for step in path.split("."):
        target = target[int(step) if step.isdecimal() else step]
    target["backofLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        validate(document)


def test_kustomize_finds_its_files() -> None:
    (made,) = documents("kustomization.yaml")
    maps = {entry["name"]: entry["files"] for entry in made["configMapGenerator"]}
    listed = [*made["resources"], *(file for files in maps.values() for file in files)]
    assert sorted(listed) == sorted([*MANIFESTS, "job.toml"])
    used = {v["configMap"]["name"] for pod in (p.values[0] for p in PODS) for v in pod["spec"]["volumes"] if "configMap" in v}
    assert used == set(maps)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_has_no_more_rights_than_it_needs(pod: dict[str, Any]) -> None:
    assert_needs_few_rights(pod)
    assert mounted(pod) == [{volume["name"] for volume in pod["spec"]["volumes"]}] * len(pod["spec"]["containers"])


def test_nobody_is_let_in_from_outside() -> None:
    job = only("rayjob.yaml", "RayJob")["spec"]
    assert job["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = only("access.yaml", "NetworkPolicy")["spec"]
    own = {"podSelector": {"matchLabels": {"app": "triform-batch"}}}
    assert all(pod["metadata"]["labels"] == own["podSelector"]["matchLabels"] for pod in pods(only("rayjob.yaml", "RayJob")))
    operator = {"from": [namespace("kuberay-operator")], "ports": tcp(8265)}
    assert policy == own | {"policyTypes": ["Ingress"], "ingress": [{"from": [own]}, operator]}
    (rule,) = only("launcher.yaml", "Role")["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}


def commands() -> list[str]:
    """What the two ways of a night run, with the shell's part done."""
    (pod,) = pods(only("cronjob.yaml", "CronJob"))
    (script,) = pod["spec"]["containers"][0]["args"]
    night = "2026-11-20"
    entrypoint = only("rayjob.yaml", "RayJob")["spec"]["entrypoint"].replace("DAY", night)
    return [script.removeprefix("exec ").replace("$(date -u -d yesterday +%F)", night), entrypoint]


@pytest.mark.parametrize("command", commands())
def test_the_command_line_and_the_job_file_are_what_the_job_takes(command: str) -> None:
    assert not re.search(r"[$`]", command)
    python, option, module, *args = shlex.split(command)
    assert (python, option, module) == ("python", "-m", "batch")
    group = typer.main.get_command(cli.app)
    run = group.commands[args[0]].make_context(args[0], args[1:])  # type: ignore[attr-defined]
    assert str(run.params["spec"]) == "/etc/triform/job.toml"
    spec = read_spec(RAY / "job.toml", {"partition": run.params["partition"]})
    assert spec.partition == ("day=2026-11-20",)
    assert (spec.lease, spec.key) == (120, ("id",))
    assert spec.pushgateway


def test_a_job_file_with_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text((RAY / "job.toml").read_text().replace("lease", "leese"))
    with pytest.raises(ConfigurationError, match="leese"):
        read_spec(tmp_path / "job.toml", {})


def test_what_can_not_be_mended_is_not_tried_again() -> None:
    """2 and 4 end the job; 1 and 3 are tried again until a lost driver's lease is over."""
    job = only("cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    rules = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    final = {code for rule in rules for code in rule["onExitCodes"]["values"]}
    wrong_use = 2  # click's, and that of `triform.cli.output.exit_code` for a configuration
    assert final == {wrong_use, cli.EXIT_CODES["too_many_dead_letters"]}
    assert cli.EXIT_CODES["lease_held"] not in final
    pauses = [10 * 2**attempt for attempt in range(job["backoffLimit"])]  # Kubernetes: from 10 s, doubled
    lease = read_spec(RAY / "job.toml", {}).lease
    assert lease is not None
    assert sum(pauses) > 2 * lease


@pytest.mark.parametrize("name", ["cronjob.yaml", "launcher.yaml"])
def test_every_attempt_of_a_night_means_the_same_day(name: str) -> None:
    spec = only(name, "CronJob")["spec"]
    minute, hour, *_ = spec["schedule"].split()
    start = datetime(2026, 11, 20, int(hour), int(minute), tzinfo=UTC).timestamp()
    end = start + spec["startingDeadlineSeconds"] + spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert datetime.fromtimestamp(end, UTC).day == 20
    assert spec["timeZone"] == "Etc/UTC"
    assert spec["concurrencyPolicy"] == "Forbid"
