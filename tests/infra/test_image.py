"""The batch form's image: clean by hadolint, and made of what the job needs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "infra/ray/Dockerfile"
STAGES = DOCKERFILE.read_text().split("\nFROM ")


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, file], capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("# hadolint ignore", "# ignored"))
    assert "DL3008" in hadolint(tmp_path / "Dockerfile").stdout


def test_the_last_stage_is_nobodys_and_builds_nothing() -> None:
    last = STAGES[-1]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001"]
    assert "pip install" not in last
    assert "--require-hashes" in STAGES[-2]


def test_only_what_is_copied_travels_to_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    sources = re.findall(r"^COPY ([^-]\S*) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert all((ROOT / source).exists() for source in sources)
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)


def test_the_locked_requirements_are_those_of_the_job() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements/batch.txt").read_text(), re.MULTILINE))
    assert {"onnxruntime", "boto3", "pyarrow", "typer", "rich", "prometheus-client", "matplotlib"} <= set(locked)
    assert not {"pytest", "moto", "mypy", "ruff"} & set(locked)
    (job,) = yaml.safe_load_all((ROOT / "infra/ray/rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == locked["ray"] == version("ray")
