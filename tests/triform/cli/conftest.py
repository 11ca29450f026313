"""`triform(...)`: the command line in this process, as its console script runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from triform.cli import main


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def triform(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs one command line; no traceback is ever told."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["triform", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Said(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def released(released_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository with a release, named by TRIFORM_REPOSITORY."""
    monkeypatch.setenv("TRIFORM_REPOSITORY", str(released_models))
    return released_models
