"""The Lambda form's image: clean by hadolint, and made of what its handlers need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.layers.target import ARCHITECTURES, uv

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "infra/lambda/Dockerfile"
TEXT = DOCKERFILE.read_text()
STAGES = {name: text for text in TEXT.split("\nFROM ")[1:] for name in re.findall(r"^\S+ AS (\w+)", text)}
LOCK = ROOT / "requirements/lambda.txt"


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, file], capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (tmp_path / "Dockerfile").write_text(TEXT.replace("WORKDIR /var/task", "WORKDIR task"))
    assert "DL3000" in hadolint(tmp_path / "Dockerfile").stdout


def test_what_runs_is_built_from_hashes_elsewhere() -> None:
    assert list(STAGES) == ["packages", "code", "base", "models", "scoring"]
    assert "--require-hashes" in STAGES["packages"]
    assert "pip install" not in STAGES["base"] + STAGES["models"] + STAGES["scoring"]
    assert 'ENTRYPOINT ["python", "-m", "awslambdaric"]' in STAGES["base"]
    assert "USER" not in re.findall(r"^([A-Z]+) ", TEXT, re.MULTILINE)


def test_the_last_stage_needs_no_models() -> None:
    assert "COPY" not in STAGES["scoring"]
    assert re.findall(r"^COPY (\S+) (\S+)$", STAGES["models"], re.MULTILINE) == [("build/layers/models/models", "/opt/models")]


def test_only_what_is_copied_travels_to_the_builder() -> None:
    rules = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split("\n")
    sources = set(re.findall(r"^COPY ([^-]\S*) ", TEXT, re.MULTILINE))
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources if not source.startswith("build/"))


def test_the_locked_requirements_are_those_of_the_handlers() -> None:
    def versions(name: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for package, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE):
            found.setdefault(package, set()).add(version)
        return found

    image, everything = versions("lambda.txt"), versions("dev.txt")
    assert {"onnxruntime", "numpy", "msgspec", "orjson", "boto3", "pyarrow", "awslambdaric", "aws-lambda-powertools"} <= set(
        image
    )
    assert not {"ray", "typer", "onnx", "pandas", "moto", "pytest"} & set(image)
    assert {name: everything.get(name) for name in image} == image, "what is tested is what is deployed: run `make lock`"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_package_has_a_wheel_for_the_image(arch: str, tmp_path: Path) -> None:
    platform = ["--python", sys.executable, "--python-platform", ARCHITECTURES[arch], "--python-version", "3.13"]
    command = [uv(), "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--only-binary", ":all:", *platform]
    done = subprocess.run(
        [*command, "--target", tmp_path / "none", "-r", LOCK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime==1" in done.stderr
