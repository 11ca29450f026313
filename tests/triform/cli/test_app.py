"""The console script as a program: help, exit codes, one line for an error, JSON for programs."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triform as package
from triform import testing
from triform.repository import open_repository

Triform = Callable[..., Any]
SCRIPT = Path(sys.executable).with_name("triform")


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_the_installed_program_packages_and_predicts(tmp_path: Path) -> None:
    model, rows = testing.linear(tmp_path / "l.onnx"), tmp_path / "rows.json"
    rows.write_text('[{"x": [1, 2, 3]}]')
    made = program("package", model, "--name", "m", "--to", tmp_path / "models")
    assert (made.returncode, made.stderr) == (0, "")
    assert "published m/1 (digest " in made.stdout
    predicted = program("predict", "m", rows, "-r", tmp_path / "models")
    assert (predicted.returncode, predicted.stdout, predicted.stderr) == (0, '[{"y":14.0}]\n', "")


def test_it_runs_as_a_module_where_no_script_is_on_the_path(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triform"]
    said = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (0, "")
    assert "Usage: python -m triform " in said.stdout
    assert all(f" {name} " in said.stdout for name in ("package", "predict", "repo", "release", "rollout", "doctor"))
    wrong = subprocess.run([*command, "inspect", "nothing", "-r", tmp_path], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    said = program("inspect", "nothing", "-r", tmp_path)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == f"error: no model 'nothing' in {tmp_path} (it has: none at all) [model_not_found]\n"


def test_a_disk_that_is_full_is_an_error_in_one_line(tmp_path: Path) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    model = testing.linear(tmp_path / "l.onnx")
    said = program("package", model, "--name", "m", "--to", tmp_path / "models", preexec_fn=no_room)
    assert said.returncode == 1
    assert said.stderr == "error: the package could not be written: File too large [store_unavailable]\n"
    assert open_repository(tmp_path / "models").models() == []


def test_help_lists_every_command(triform: Triform) -> None:
    said = triform("--help")
    assert said.code == 0
    for command in ("package", "inspect", "verify", "predict", "repo", "release"):
        assert command in said.out
    for group, commands in {"repo": ["list"], "release": ["set", "show", "log", "rollback"]}.items():
        said = triform(group, "--help")
        for command in commands:
            assert command in said.out
            assert "--json" in triform(group, command, "--help").out


@pytest.mark.parametrize("command", ["package", "inspect", "verify", "predict"])
def test_each_command_has_help_and_json(triform: Triform, command: str) -> None:
    said = triform(command, "--help")
    assert said.code == 0
    assert "--json" in said.out


def test_version_is_told(triform: Triform) -> None:
    assert triform("--version").out == f"triform {package.__version__}\n"


LINEAR = ["package", "l.onnx", "--name", "m"]
WRONG_USE = {
    "no command": [],
    "unknown command": ["frobnicate"],
    "unknown option": ["inspect", "linear", "--frobnicate"],
    "no argument": ["inspect"],
    "no reference": ["inspect", "../etc"],
    "escaped reference": ["verify", "a%2f.."],
    "unknown alias": ["inspect", "linear@nope"],
    "version zero": ["inspect", "linear/0"],
    "endless reference": ["inspect", "a" * 100_000],
    "endless path": ["inspect", "a/" * 50_000],
    "no name": ["package", "l.onnx"],
    "a name that is none": ["package", "l.onnx", "--name", "../x"],
    "no model file": ["package", "nothing.onnx", "--name", "m"],
    "no model.toml": [*LINEAR, "--config", "nothing.toml"],
    "no samples": [*LINEAR, "--samples", "nothing.csv"],
    "samples of no kind": [*LINEAR, "--samples", "l.onnx"],
    "no figures": [*LINEAR, "--evaluation", "nothing.json"],
    "figures that are none": [*LINEAR, "--evaluation", "l.onnx"],
    "version minus one": [*LINEAR, "--version", "-1"],
    "version of letters": [*LINEAR, "--version", "x"],
    "a repository elsewhere": [*LINEAR, "--to", "gs://bucket"],
    "no rows file": ["predict", "linear", "nothing.json"],
    "rows of no kind": ["predict", "linear", "l.onnx"],
    "no provider": ["predict", "linear", "rows.json", "--provider", "frob"],
    "output of no kind": ["predict", "linear", "rows.json", "-o", "answers.txt"],
    "output nowhere": ["predict", "linear", "rows.json", "-o", "nothing/answers.json"],
    "canary without weight": ["release", "set", "linear", "--canary", "2"],
    "sample without shadow": ["release", "set", "linear", "--sample", "0.5"],
    "weight that is no number": ["release", "set", "linear", "--canary", "2", "--weight", "nan"],
    "weight above one": ["release", "set", "linear", "--canary", "2", "--weight", "1.5"],
    "canary that is stable": ["release", "set", "linear", "--stable", "2", "--canary", "2", "--weight", "0.5"],
    "a log of none": ["release", "log", "linear", "--limit", "0"],
}


@pytest.fixture
def workplace(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    testing.linear(tmp_path / "l.onnx")
    Path("rows.json").write_text('[{"x": [1, 2, 3]}]')


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_exits_with_2(triform: Triform, case: str) -> None:
    said = triform(*WRONG_USE[case])
    assert said.code == 2
    assert said.out + said.err
    assert len(said.err) < 2000


FAILED = {
    "unknown model": (["inspect", "other"], "model_not_found"),
    "unknown version": (["verify", "linear/9"], "version_not_found"),
    "taken version": (["package", "l.onnx", "--name", "linear", "--version", "1"], "version_exists"),
    "release of what is not there": (["release", "set", "linear", "--stable", "9"], "version_not_found"),
    "release of version zero": (["release", "set", "linear", "--stable", "0"], "version_not_found"),
    "somebody was first": (["release", "set", "linear", "--stable", "2", "--expect", "0"], "release_conflict"),
    "log of no model": (["release", "log", "other"], "model_not_found"),
    "no model file inside": (["package", "rows.json", "--name", "m"], "unsupported_model"),
}


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("case", FAILED)
def test_what_fails_exits_with_1_and_has_its_code_in_both_shapes(triform: Triform, case: str) -> None:
    arguments, code = FAILED[case]
    said = triform(*arguments)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: ")
    assert said.err.endswith(f" [{code}]\n")
    said = triform(*arguments, "--json")
    assert (said.code, said.err) == (1, "")
    assert said.json.keys() == {"error", "code"}
    assert said.json["code"] == code


def test_without_a_repository_it_says_where_to_name_one(triform: Triform) -> None:
    said = triform("repo", "list", "--json")
    assert (said.code, said.json["code"]) == (2, "configuration")
    assert "TRIFORM_REPOSITORY" in said.json["error"]


def test_a_bad_setting_names_its_key(triform: Triform, monkeypatch: pytest.MonkeyPatch, released: Path) -> None:
    monkeypatch.setenv("TRIFORM_THREADS", "many")
    said = triform("repo", "list")
    assert said.code == 2
    assert "TRIFORM_THREADS" in said.err
