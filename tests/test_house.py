"""What keeps a clone installable anywhere: hashed locks without addresses, and no trace of a machine in tracked files."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").rglob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.name for lock in LOCKS])
def test_locks_carry_hashes_and_no_addresses(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host", text)
    entries = re.split(r"\n(?=\S)", text.strip())
    assert entries
    assert [e.splitlines()[0] for e in entries if "--hash=sha256:" not in e] == []


def test_cpu_and_gpu_builds_are_never_locked_together() -> None:
    for lock in LOCKS:
        builds = set(re.findall(r"^(onnxruntime(?:-gpu)?)==", lock.read_text(), re.MULTILINE))
        assert len(builds) <= 1, lock.name
        assert ("onnxruntime-gpu" in builds) == (lock.name == "gpu.txt")


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    command = [
        "git",
        "grep",
        "-nIE",
        r"/(root|home/[a-z]+|work)/|pypi\.org/simple|registry\.npmjs",
        "--",
        ".",
        ":!tests/test_house.py",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert [t for t in phony[1].split() if f"make {t} " not in listed] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked and untracked files as they are."""
    out = tmp_path_factory.mktemp("dist")
    command = [ROOT / ".venv/bin/python", "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, capture_output=True, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_core_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"triform"}
    assert "triform/py.typed" in names


PREDICT = """
import sys
from pathlib import Path
import numpy as np
from triform.package import ModelPackage
from triform.predictor import Predictor

predictor = Predictor.load(ModelPackage.open(Path(sys.argv[1])), verification="full")
answer = predictor.predict({"x": np.ones((2, 3), np.float32)})["y"]
assert answer.tolist() == [[6.0], [6.0]], answer
for heavy in ("pyarrow", "onnx", "ray", "typer", "rich", "boto3", "pandas"):
    try:
        __import__(heavy)
    except ImportError:
        continue
    raise SystemExit(f"{heavy} is installed: this is not the wheel with the cpu extra alone")
"""


def test_the_wheel_with_the_cpu_extra_alone_imports_and_predicts(wheel: Path, tmp_path: Path) -> None:
    from triform import testing

    repository = testing.repository(tmp_path / "models", {"linear": testing.linear(tmp_path / "linear.onnx")})
    python = tmp_path / "venv/bin/python"
    uv = ROOT / ".venv/bin/uv"
    for command in (
        [uv, "venv", "--quiet", "--python", ROOT / ".venv/bin/python", tmp_path / "venv"],
        [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", ROOT / "requirements/runtime.txt"],
        [uv, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel],
        [python, "-I", "-c", PREDICT, repository.package("linear", 1).folder],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
