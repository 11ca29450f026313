"""What the tests of functions share: a function in this process, and its context."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awslambdaric.lambda_context import LambdaContext

from handlers._boot import Booted, boot
from handlers._function import Function
from triform import testing


def context(seconds: float = 30.0, request_id: str = "11111111-2222-3333-4444-555555555555") -> LambdaContext:
    """The runtime client's own context, with so many seconds left."""
    return LambdaContext(request_id, None, None, int((time.time() + seconds) * 1e3), "arn:aws:lambda:us-east-1:0:function:f")


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Each test has the JSON logger anew: it keeps the standard output of its day, and is no other test's business."""
    _forget_loggers()
    yield
    _forget_loggers()


def _forget_loggers() -> None:
    logger = logging.getLogger("triform")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    for name in ("init", "powertools_handler"):  # what Powertools knows its own logger by
        vars(logger).pop(name, None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """linear (x FP32[rows, 3] -> y FP32[rows, 1]) and words (text and numbers)."""
    folder = tmp_path_factory.mktemp("served")
    files = {"linear": testing.linear(folder / "linear.onnx"), "words": testing.text_and_number(folder / "words.onnx")}
    testing.repository(folder / "models", files)
    return folder / "models"


@pytest.fixture
def started(models: Path) -> Callable[..., Booted]:
    """`started(TRIFORM_...="...")`: what `boot` makes of these settings."""

    def make(**environ: str) -> Booted:
        anybody = {"TRIFORM_REPOSITORY": str(models), "TRIFORM_DEFAULT_MODEL": "linear", "TRIFORM_ALLOW_ANONYMOUS": "true"}
        return boot({**anybody, **environ})

    return make


@pytest.fixture
def function(started: Callable[..., Booted]) -> Function:
    """The function with default settings, whose default model is linear."""
    return Function(started())
