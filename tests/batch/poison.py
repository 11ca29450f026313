"""Parts that kill: a repository whose model does not survive an x of -2, and how many processes died of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.batch.workbench import Workbench
from triform import testing
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository

KILLS = -2
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="elsewhere the division that kills gives a number")


def fragile_bench(root: Path, name: str = "output") -> Workbench:
    """Like the others, but its model `lookup` is `testing.fragile`."""
    models = root / "fragile"
    repository = open_repository(models)
    package_model(testing.fragile(root / "fragile.onnx"), name="lookup", repository=repository)
    ReleaseLog(repository, "lookup").set(stable=1)
    return Workbench(root, models, name)


def write_poison(bench: Workbench, name: str, start: int, rows: int = 100) -> Path:
    """The last row but one kills."""
    x: Sequence[int] = [*[1] * (rows - 2), KILLS, 1]
    return bench.write(name, start, rows, x=x)
