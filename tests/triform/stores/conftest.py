"""A store of each kind, empty or with versions that look as old as a test wants them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from moto.s3.models import s3_backends

from tests.triform.conftest import reseal
from tests.triform.stores.rollouts import Clock
from triform.package import MANIFEST, FileEntry, file_entry
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.rollout_log import RolloutLog
from triform.stores.cache import PackageCache
from triform.stores.s3_repository import S3Repository


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRepository:
    if request.param == "local":
        return open_repository(tmp_path / "models")
    bucket = request.getfixturevalue("s3_bucket")
    return S3Repository.open(f"s3://{bucket}/team/models", PackageCache(tmp_path / "cache"))


@pytest.fixture
def publish(_linear: Path, store: ModelRepository) -> Callable[..., None]:
    """`publish(1, 2)`: versions of `linear`, each with a file of its own beside those that all of them share."""

    def act(*versions: int, to: ModelRepository | None = None) -> None:
        repository = to or store
        for version in versions:
            with repository.staging("linear") as folder:
                shutil.copytree(_linear / "linear/1", folder, dirs_exist_ok=True)
                (folder / "model.toml").write_text(f'description = "number {version}"')
                reseal(folder, version=version, files=_files(folder))
                repository.publish(folder, "linear", version)

    return act


def _files(folder: Path) -> dict[str, FileEntry]:
    return {p.name: file_entry(p) for p in folder.iterdir() if p.name != MANIFEST}


@pytest.fixture
def age(store: ModelRepository) -> Callable[..., None]:
    """`age(days)`: everything in the store becomes so much older; `age(days, "claims/")` only what has that in its name."""

    def act(days: float, part: str = "") -> None:
        if isinstance(store, S3Repository):
            for key, found in s3_backends["123456789012"]["aws"].buckets[store.bucket.name].keys.items():
                if part in key:
                    found.last_modified -= timedelta(days=days)
        else:
            for path in Path(store.location).rglob("*"):
                if part in str(path):
                    os.utime(path, times=(path.stat().st_mtime - 86400 * days,) * 2)

    return act


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(store: ModelRepository, publish: Callable[..., None], clock: Clock) -> RolloutLog:
    """Of `linear`, with versions 1 (stable), 2 and 3."""
    publish(1, 2, 3)
    ReleaseLog(store, "linear").set(stable=1)
    return RolloutLog(store, "linear", clock)
