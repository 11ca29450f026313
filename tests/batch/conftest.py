"""Workbenches, the repository that they share, and the command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batch import cli
from tests.batch.workbench import Cli, Workbench
from triform import testing
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository


@pytest.fixture(scope="session")
def lookup_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `lookup` in versions 1 (stable) and 2. Tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("lookup")
    repository = open_repository(root / "models")
    for version, entries in (1, 10), (2, 20):
        model = testing.lookup(root / f"{version}.onnx", entries=entries)
        package_model(model, name="lookup", repository=repository, version=version)
    ReleaseLog(repository, "lookup").set(stable=1)
    return root / "models"


@pytest.fixture
def workbench(tmp_path: Path, lookup_repository: Path) -> Workbench:
    return Workbench(tmp_path, lookup_repository)


@pytest.fixture
def new_workbench(tmp_path: Path, lookup_repository: Path) -> Callable[[str], Workbench]:
    """Further ones, by name."""
    return lambda name: Workbench(tmp_path / name, lookup_repository)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """`call("run", ...)`: exit code, standard output, standard error; in this process."""

    def made(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["batch", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        sys.stdout.flush()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(ended.value.code or 0), out, err

    return made
