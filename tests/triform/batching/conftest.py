"""Predictors of small models, and the threads that tests hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.batchers import Watched
from tests.gates import Gate
from triform import testing
from triform.predictor import Predictor


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Predictor]:
    folder = tmp_path_factory.mktemp("batching")
    models: dict[str, Path] = {
        "lookup": testing.lookup(folder / "lookup.onnx"),
        "centred": testing.centred(folder / "centred.onnx"),
        "wide": testing.identity(folder / "wide.onnx", "FP32", shape=("N", "width")),
        "slow": testing.slow(folder / "slow.onnx"),
        "text": testing.identity(folder / "text.onnx", "BYTES"),
    }
    repository = testing.repository(folder / "models", models)
    loaded: dict[str, Predictor] = {}

    def load(name: str) -> Predictor:
        if name not in loaded:
            loaded[name] = Predictor.load(repository.package(name, 1))
        return loaded[name]

    return load


@pytest.fixture(autouse=True)
def _nobody_watched_yet() -> None:
    """Whichever test this process ran before."""
    Watched.stacked.clear()


@pytest.fixture
def lookup(predictors: Callable[[str], Predictor]) -> Predictor:
    return predictors("lookup")


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        yield gate
        gate.open.set()
