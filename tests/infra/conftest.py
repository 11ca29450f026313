"""Each stage's template, and layers of a tiny repository: made once a session, because both take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import serverless
from infra.layers.build import Wanted, build
from tests.infra.built import RUNNING, tiny_repository
from tests.infra.template import Template, stand_ins
from triform.repository import ModelRepository


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Template]:
    """`rendered(stage)`: each stage once."""
    folder = tmp_path_factory.mktemp("rendered")
    layers, done = stand_ins(folder / "layers"), {}

    def template(stage: str) -> Template:
        if stage not in done:
            done[stage] = json.loads(serverless.render(stage, layers, folder / stage).read_text())
        return done[stage]

    return template


@pytest.fixture(scope="session")
def prod(rendered: Callable[[str], Template]) -> Template:
    return rendered("prod")


@pytest.fixture(scope="session")
def dev(rendered: Callable[[str], Template]) -> Template:
    return rendered("dev")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelRepository:
    return tiny_repository(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def layers(tmp_path_factory: pytest.TempPathFactory, source: ModelRepository) -> Path:
    """Built for the Python that runs here."""
    out = tmp_path_factory.mktemp("layers")
    build(Wanted(target=RUNNING, refs=("linear", "lookup"), each=True), out, source)
    return out
