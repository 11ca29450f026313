"""How many rows a run of the model has: requests below the maximum are never cut, those above it are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.batchers import DynamicBatcher
from tests.gates import Gate, within
from triform import testing
from triform.batched import Batched, BatchOptions
from triform.batching import MAX_ROWS
from triform.errors import DeadlineExceeded
from triform.predictor import Predictor
from triform.signature import Array


class Counted:
    """The predictor's session, and the rows of each of its runs; `seconds` that each takes more than it does."""

    def __init__(self, predictor: Predictor, seconds: float = 0.0) -> None:
        self.rows: list[int] = []
        self._seconds = seconds
        self._session = predictor._session
        predictor._session = self

    def run(self, outputs: list[str], feed: dict[str, Array], options: Any) -> Any:
        self.rows.append(len(feed["x"]))
        values = self._session.run(outputs, feed, options)
        time.sleep(self._seconds)
        return values


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Predictor]:
    """`load(name, config)`: a predictor of the test's own."""

    def load(name: str, config: str = "") -> Predictor:
        make = {"lookup": testing.lookup, "centred": testing.centred}[name]
        repository = testing.repository(tmp_path / "models", {name: make(tmp_path / "m.onnx")}, config={name: config})
        return Predictor.load(repository.package(name, 1))

    return load


def x(rows: int) -> dict[str, Array]:
    return {"x": np.arange(rows) % 10}


@pytest.mark.parametrize(
    ("config", "rows", "runs"),
    [
        ("", 3, [3]),
        ("", 4, [4]),
        ("", 5, [4, 1]),
        ("", 10, [4, 4, 2]),
        ("[batching]\nmax_rows = 3", 10, [3, 3, 3, 1]),
        ("[batching]\npad_to = [1, 4, 8]", 10, [4, 4, 4]),
        ("[batching]\npad_to = [2, 8]", 7, [8, 8]),
    ],
)
def test_a_request_above_the_maximum_is_cut_there(
    load: Callable[..., Predictor], gate: Gate, config: str, rows: int, runs: Any
) -> None:
    """And its runs have the shapes of `pad_to` as ever."""

    async def test() -> None:
        predictor = load("lookup", config)
        session = Counted(predictor)
        batched = Batched(gate, {"lookup": BatchOptions(max_rows=4)}, short=0.0)
        gate.open.set()
        answer = await batched.batcher(predictor).infer(x(rows), deadline=time.monotonic() + 60)
        assert session.rows == runs
        assert answer.outputs["y"].tolist() == [10.0 * (i % 10) for i in range(rows)]
        assert gate.began == 1, "one after another in its slot"

    within(test())


def test_a_maximum_that_nobody_has_set_cuts_no_request(load: Callable[..., Predictor], gate: Gate) -> None:
    """It is how many are worth running together; how many a run can have the package says."""

    async def test() -> None:
        predictor = load("lookup")
        session = Counted(predictor)
        batched = Batched(gate, short=0.0)
        gate.open.set()
        await batched.batcher(predictor).infer(x(MAX_ROWS + 1), deadline=time.monotonic() + 60)
        assert session.rows == [MAX_ROWS + 1]

    within(test())


def test_requests_below_the_maximum_are_not_cut(load: Callable[..., Predictor], gate: Gate) -> None:
    async def test() -> None:
        predictor = load("lookup")
        session = Counted(predictor)
        batcher = DynamicBatcher(predictor, gate, max_rows=4)
        gate.open.set()
        await asyncio.gather(*(batcher.infer(x(rows)) for rows in (2, 2, 3, 2, 4)))
        assert session.rows == [4, 3, 2, 4]

    within(test())


@pytest.mark.parametrize("rows", [3, 6])
def test_rows_of_a_dependent_model_run_alone_whatever_the_maximum(load: Callable[..., Predictor], gate: Gate, rows: int) -> None:
    async def test() -> None:
        predictor = load("centred")
        assert predictor.independence == "dependent"
        session = Counted(predictor)
        gate.open.set()
        await DynamicBatcher(predictor, gate, max_rows=4).infer({"x": np.zeros((rows, 2), np.float32)})
        assert session.rows == [1] * rows

    within(test())


def test_the_deadline_is_seen_to_between_the_runs_of_a_request(load: Callable[..., Predictor]) -> None:
    predictor = load("lookup")
    session = Counted(predictor, seconds=2.5)
    with pytest.raises(DeadlineExceeded, match="before the model ran"):
        predictor.run(x(12), deadline=time.monotonic() + 2, most_rows=4)
    assert session.rows == [4]
