"""The loaded models of tests/conformance/models.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conformance.models import surface
from triform.models import Served
from triform.protocols.bodies import Call


@pytest.fixture(scope="session")
def served(online_models: Path) -> Callable[[str], Served]:
    """`served("linear")`."""
    return surface(online_models).service.models.get


@pytest.fixture(scope="session")
def answered(served: Callable[[str], Served]) -> Callable[[str, Call], Any]:
    """`answered("linear", call)`: what the model's answer to the call is, read from JSON."""

    def answered(model: str, call: Call) -> Any:
        return orjson.loads(call.encode(served(model).predictor.predict(call.inputs)).body)

    return answered
