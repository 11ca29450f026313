"""The command that renders the template: what it refuses, and what it is locked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra import serverless
from tests.infra.template import Template, properties, stand_ins
from triform.errors import ConfigurationError, InvalidRequest, JobError

ROOT = Path(__file__).parent.parent.parent


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


@pytest.mark.slow
def test_two_templates_are_rendered_one_after_the_other(tmp_path: Path) -> None:
    """osls has one folder in the project, whoever runs it."""
    layers = stand_ins(tmp_path / "layers")
    line = [sys.executable, "-m", "infra.serverless", "package", "--layers", str(layers)]
    both = [subprocess.Popen([*line, "--stage", stage, "--out", str(tmp_path / "out")], cwd=ROOT) for stage in ("dev", "prod")]
    assert [process.wait(timeout=2 * serverless.PACKAGE_SECONDS) for process in both] == [0, 0]
    found = {stage: json.loads((tmp_path / "out" / stage / serverless.TEMPLATE).read_text()) for stage in ("dev", "prod")}
    assert found["dev"] != found["prod"]


@pytest.mark.slow
def test_two_processes_install_osls_one_after_the_other(tmp_path: Path) -> None:
    """As two processes of tests do in a fresh clone."""
    source = "import sys, pathlib; from infra import serverless as s; s.OSLS = pathlib.Path(sys.argv[1]); print(s.install_osls())"
    line = [sys.executable, "-c", source, str(tmp_path / "osls")]
    both = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for told in [process.communicate(timeout=2 * serverless.NPM_SECONDS) for process in both]:
        assert Path(told[0].strip()).is_file(), told[1]
