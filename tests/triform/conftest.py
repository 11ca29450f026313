"""What the tests of packages share: packaging a file in one call, a finished package to spoil, and fresh processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from triform import testing
from triform.package import MANIFEST, Manifest, ModelPackage, file_entry
from triform.packaging import Packaged, package_model
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog, Shadow
from triform.repository import ModelRepository, open_repository
from triform.signature import Array


class Packed(NamedTuple):
    """A model packaged as `m` in a repository of its own."""

    published: Packaged
    repository: ModelRepository

    @property
    def manifest(self) -> Manifest:
        return self.published.manifest

    @property
    def package(self) -> ModelPackage:
        return self.repository.package("m", self.manifest.version)

    @property
    def notes(self) -> str:
        return "\n".join(self.published.notes)

    def load(self) -> Predictor:
        return Predictor.load(self.package)

    def predict(self, **inputs: Any) -> dict[str, Array]:
        return self.load().predict(inputs)


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Packed]:
    """`pack(file, toml="...", samples=...)`: the file packaged as `m` in tmp_path/models."""

    def make(model: Path, toml: str | None = None, **options: Any) -> Packed:
        config = None
        if toml is not None:
            config = tmp_path / "given.toml"
            config.write_text(toml)
        repository = open_repository(tmp_path / "models")
        return Packed(package_model(model, name="m", repository=repository, config=config, **options), repository)

    return make


@pytest.fixture(scope="session")
def _linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    testing.repository(folder / "models", {"linear": testing.linear(folder / "linear.onnx")})
    return folder / "models"


@pytest.fixture
def models(_linear: Path, tmp_path: Path) -> Path:
    """A repository of one's own with `linear/1`: y = x @ [1, 2, 3]."""
    return Path(shutil.copytree(_linear, tmp_path / "models"))


@pytest.fixture
def three_versions(models: Path) -> Path:
    """The same repository with versions 1, 2 and 3 of `linear`."""
    _add_versions(models)
    return models


def _add_versions(models: Path) -> None:
    for version in (2, 3):
        shutil.copytree(models / "linear/1", models / f"linear/{version}")
        reseal(models / f"linear/{version}", version=version)


@pytest.fixture(scope="session")
def _released(_linear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = Path(shutil.copytree(_linear, tmp_path_factory.mktemp("released") / "models"))
    _add_versions(models)
    log = ReleaseLog(open_repository(models), "linear")
    log.set(stable=1, canary=Canary(2, 0.1), shadow=Shadow(3, 0.5), reason="first", changed_by="ann")
    return models


@pytest.fixture
def released_models(_released: Path, tmp_path: Path) -> Path:
    """Versions 1, 2 and 3 with revision 1: stable 1, canary 2, shadow 3, so that no later revision verifies anything anew."""
    return Path(shutil.copytree(_released, tmp_path / "models"))


@pytest.fixture
def folder(models: Path) -> Path:
    """The folder of a finished package of one's own, to spoil."""
    return models / "linear/1"


def reseal(folder: Path, **changes: Any) -> None:
    """Rewrites the manifest with changes, as an attacker who can compute digests would: the files' entries are renewed too."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    files = {n: file_entry(folder / n) if (folder / n).is_file() else e for n, e in manifest.files.items()}
    manifest = msgspec.structs.replace(manifest, **{"files": files} | changes).sealed()
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


@pytest.fixture(name="reseal")
def _reseal() -> Callable[..., None]:
    return reseal


def python(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A fresh Python process that can import this checkout; its output is kept."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=_environment(), **pipes | options)


def _environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}


@pytest.fixture(name="python")
def _python() -> Callable[..., subprocess.Popen[str]]:
    return python


def tree(folder: Path) -> dict[str, str]:
    """Every file below the folder with its sha256."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(name="tree")
def _tree() -> Callable[[Path], dict[str, str]]:
    return tree
