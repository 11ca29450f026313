"""One Ray cluster a session; tiny models and repositories for every test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triform import testing
from triform.repository import ModelRepository

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TRIFORM_* of the developer's shell reaches a test."""
    for key in [k for k in os.environ if k.startswith("TRIFORM_")]:
        monkeypatch.delenv(key)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The session's cluster: 4 logical CPUs, whatever the machine has."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=150_000_000, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., ModelRepository]:
    """`repository(linear=path, ...)`: a fresh repository with each ONNX file as version 1."""

    def make(config: dict[str, str] | None = None, **models: Path) -> ModelRepository:
        return testing.repository(tmp_path / "models", models, config=config)

    return make
