"""What a process counts of both sides: as windows.py has it, in bounded memory."""

from __future__ import annotations

import weakref
from typing import Any

import msgspec
import numpy as np
import pytest

from triform.rollout.findings import Finding
from triform.rollout.guards import findings
from triform.rollout.policy import PROBABILITY_BINS, Guards, Policy, ScoreShift, Step
from triform.rollout.windows import Arm, Shadowed, Sketch, rows_bucket, score_bins
from triform.tally import FEW_ROWS, MOST_ANSWERS, MOST_BYTES, MOST_SCORES, MOST_WAITING, SMALL_ROW, Side, Tally
from triform.telemetry import InferenceRecord

CANARY = 2
GUARD = ScoreShift()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_is_what_was_counted_since_the_last_one() -> None:
    clock = Clock()
    tally = Tally(PROBABILITY_BINS, CANARY, clock)
    for seconds in 0.1, 0.2, 0.2:
        tally.request("stable", seconds)
    tally.request("canary", 0.4, failed=True)
    tally.ran("stable", 3, 0.01)
    tally.ran("stable", 4, 0.02)
    tally.ran("canary", 1, 0.5)
    tally.scored("canary", {"y": np.array([[0.01], [0.99]], np.float32)})
    tally.scored("canary", {"y": np.array([[np.nan], [0.5]], np.float64)})
    clock.now += 5.0
    window = tally.take(step=2)
    assert (window.step, window.seconds, window.fault(), window.complete) == (2, 5.0, None, True)
    assert window.stable == Arm(
        requests=3, request_seconds=Sketch.of([0.1, 0.2, 0.2]), execute={rows_bucket(4): Sketch.of([0.01, 0.02])}
    )
    assert window.canary == Arm(
        requests=1,
        errors=1,
        request_seconds=Sketch.of([0.4]),
        execute={0: Sketch.of([0.5])},
        scores=score_bins([np.float32(0.01), np.float32(0.99), np.nan, 0.5], PROBABILITY_BINS),
    )
    clock.now += 1.0
    empty = tally.take()
    assert (empty.stable, empty.canary, empty.seconds) == (Arm(), Arm(), 1.0)


def test_a_caller_who_fails_again_counts_again() -> None:
    """Else the error rate of few callers with many requests would be next to nothing."""
    tally = Tally(PROBABILITY_BINS, CANARY)
    for number in range(100):
        tally.request("canary", 0.1, failed=number % 20 == 0)
        tally.request("stable", 0.1)
    window = tally.take()
    assert (window.canary.errors, window.canary.requests, window.stable.errors) == (5, 100, 0)


def test_other_bins_are_those_of_the_next_window() -> None:
    tally = Tally((0.5,), CANARY)
    tally.scored("stable", {"y": np.array([0.1, 0.9, 0.9])})
    assert tally.take(edges=(0.2, 0.4)).stable.scores == (1, 2, 0)
    tally.scored("stable", {"y": np.array([0.1, 0.3, 0.9])})
    assert tally.take().stable.scores == (1, 1, 1, 0)


SHAPES: list[tuple[int, ...]] = [(400,), (400, 1), (400, 2), (400, 1, 1), (400, 2, 3), (0,), (0, 2), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_one_score(shape: tuple[int, ...]) -> None:
    """The last value of it, whatever the array's order in memory."""
    values = np.random.default_rng(0).random(shape, np.float32)
    scores = score_bins(values.reshape(len(values), -1)[:, -1], PROBABILITY_BINS) if values.size else ()
    for array in values, np.asfortranarray(values):
        tally = Tally(PROBABILITY_BINS, CANARY)
        tally.scored("stable", {"label": np.array([7]), "y": array, "z": np.array([0.5])})
        assert tally.take().stable.scores == scores


def shift(stable: np.ndarray[Any, Any], canary: np.ndarray[Any, Any], guard: ScoreShift = GUARD) -> Finding:
    """What the guard says of such outputs, each row a request."""
    tally = Tally(guard.edges, CANARY)
    sides: dict[Side, np.ndarray[Any, Any]] = {"stable": stable, "canary": canary}
    for side, outputs in sides.items():
        for row in range(len(outputs)):
            tally.scored(side, {"y": outputs[row : row + 1]})
            tally.request(side, 0.01)
    policy = Policy(steps=(Step(weight=0.5),), guards=Guards(score_shift=guard))
    return findings(policy, [msgspec.structs.replace(tally.take(), seconds=60.0)], 0)[-1]


def test_classes_that_are_swapped_are_a_shift() -> None:
    """Of both columns together the values are the same."""
    positive = np.random.default_rng(0).beta(2.0, 6.0, 4000)
    both = np.stack([1 - positive, positive], axis=1)
    assert shift(both, both).says == "within"
    assert shift(both, both[:, ::-1]).says == "beyond"


@pytest.mark.parametrize(("rows", "enough"), [(999, False), (1000, True)])
def test_rows_are_counted_and_not_their_values(rows: int, enough: bool) -> None:
    outputs = np.tile([0.25, 0.75], (rows, 1))
    assert (shift(outputs, outputs).in_favour < 1e9) == enough


WIDE = ScoreShift(edges=(100.0, 400.0, 10_000.0))
BLIND = [
    pytest.param((10, 500), (5_000, 90_000), GUARD, "no data", id="beyond the last edge"),
    pytest.param((-500, -10), (-90_000, -5_000), GUARD, "no data", id="below the first"),
    pytest.param((10, 500), (5_000, 90_000), WIDE, "beyond", id="edges of their own"),
    pytest.param((10, 500), (10, 500), WIDE, "within", id="the same"),
    pytest.param((10, 500), (-500, -10), GUARD, "beyond", id="from one end to the other"),
    pytest.param((0.0, 0.04), (0.06, 0.09), GUARD, "beyond", id="into the next bin"),
    pytest.param((0.5, 0.54), (0.5, 0.54), GUARD, "within", id="a bin with two ends"),
]


@pytest.mark.parametrize(("stable", "canary", "guard", "says"), BLIND)
def test_bins_that_tell_nothing_apart_are_no_data(
    stable: tuple[float, float], canary: tuple[float, float], guard: ScoreShift, says: str
) -> None:
    """With reasons that say what to do."""
    rng = np.random.default_rng(0)
    found = shift(rng.uniform(*stable, 4000), rng.uniform(*canary, 4000), guard)
    assert found.says == says
    assert ("set guards.score_shift.edges" in found.why) == (says == "no data")


@pytest.mark.parametrize(("outside", "says"), [(39, "no data"), (41, "within")])
def test_nearly_all_is_more_than_99_of_100(outside: int, says: str) -> None:
    """On both sides: one that has left the bin is seen."""
    scores, others = np.full(4000, 7.0), np.full(4000, 7.0)
    scores[:outside] = others[:39] = 0.5
    assert shift(scores, others).says == shift(others, scores).says == says


def test_of_a_large_answer_some_scores_are_taken() -> None:
    tally = Tally(PROBABILITY_BINS, CANARY)
    tally.scored("stable", {"y": np.linspace(0, 1, 100 * MOST_SCORES)})
    scores = tally.take().stable.scores
    assert MOST_SCORES / 2 < sum(scores) <= MOST_SCORES
    assert max(scores[:-1]) - min(scores[:-1]) < 0.02 * sum(scores), "from all of it"


def test_a_shadow_is_counted_as_the_canary_whose_callers_there_are_not() -> None:
    tally = Tally(PROBABILITY_BINS, CANARY, Clock())
    for number in range(3 * MOST_WAITING):
        tally.ran("canary", 1, 0.1)
        tally.request("canary", None, failed=number == 0)
        tally.shadowed(number % 3, number % 2 if number % 3 else 0)
        assert len(tally._its.waiting_runs) <= MOST_WAITING
    window = tally.take()
    assert (window.canary.requests, window.canary.errors, window.canary.request_seconds.total) == (3 * MOST_WAITING, 1, 0)
    assert window.canary.execute[0].total == 3 * MOST_WAITING
    assert window.shadowed == Shadowed(requests=2 * MOST_WAITING, rows=3 * MOST_WAITING, disagreed=MOST_WAITING)
    assert tally.take().shadowed == Shadowed(), "of a request without rows nothing was compared"


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_it_does_not_grow_with_the_requests(rows: int) -> None:
    tally = Tally(PROBABILITY_BINS, CANARY)
    values = np.linspace(0, 1, rows)
    for i in range(2000):
        tally.ran("canary", 1, 0.1)
        tally.scored("canary", {"y": values})
        tally.request("canary", 10.0 ** (i % 9 - 6), failed=True)
        arm = tally._its
        assert max(map(len, (arm.waiting, arm.waiting_runs, arm.waiting_rows))) <= MOST_WAITING
        assert len(arm.waiting_scores) <= MOST_BYTES
    window = tally.take()
    assert sum(window.canary.scores) == rows * window.canary.requests
    assert window.canary.errors == window.canary.requests
    assert len(window.canary.request_seconds.bins) == 9
    assert window.canary.execute[0].total == window.canary.requests


def test_it_does_not_grow_with_runs_whose_callers_have_gone() -> None:
    tally = Tally(PROBABILITY_BINS, CANARY)
    for _ in range(3 * MOST_WAITING):
        tally.ran("canary", 1, 0.1)
        tally.scored("canary", {"label": np.array([7])})
        assert len(tally._its.waiting_runs) < MOST_WAITING
    assert tally.take().canary.execute[0].total == 3 * MOST_WAITING


def test_an_answer_at_once_is_the_same_as_its_parts() -> None:
    whole, parts = Tally(PROBABILITY_BINS, CANARY, Clock()), Tally(PROBABILITY_BINS, CANARY, Clock())
    answers = [np.array([[0.01, 0.99]], np.float32), None, np.array([[0.5]], np.float64), np.linspace(0, 1, 3 * MOST_SCORES)]
    for number in range(3 * MOST_WAITING):
        side: Side = "canary" if number % 3 else "stable"
        rows, scores, stages = number % 5, answers[number // 50 % 4], {"execute": 0.01 * (number % 2)}
        version = CANARY if number % 3 else 1
        record = InferenceRecord(form="serve", version=version, seconds=0.1 * number, batch_rows=rows, stages=stages)
        whole.answered(record, {"label": np.array(["a"])} if scores is None else {"label": np.array([7]), "score": scores})
        if rows:
            parts.ran(side, rows, stages["execute"])
        if scores is not None:
            parts.scored(side, {"score": scores})
        parts.request(side, 0.1 * number)
        assert max(len(arm.waiting) for arm in (whole._stable, whole._its)) < MOST_WAITING
    assert whole.answers_of_canary == 2 * MOST_WAITING
    assert whole.take() == parts.take()
    assert whole.answers_of_canary == 2 * MOST_WAITING, "of all windows"


@pytest.mark.parametrize(("rows", "row_bytes"), [(1, SMALL_ROW + 1), (1, None), (FEW_ROWS + 1, 4)])
def test_an_answer_that_may_be_large_does_not_wait(rows: int, row_bytes: int | None) -> None:
    tally, batch = Tally(PROBABILITY_BINS, CANARY), np.zeros((1024, 1), np.float32)
    tally.expect(CANARY, 4)
    tally.expect(1, row_bytes)
    small = InferenceRecord(form="serve", version=CANARY, stages={"execute": 0.1}, rows=1, batch_rows=1)
    tally.answered(small, {"score": np.zeros((1, 1), np.float32)})
    assert len(tally._answers) == 1
    gone = weakref.ref(batch)
    tally.answered(msgspec.structs.replace(small, version=1, rows=rows), {"score": batch[:rows]})
    del batch
    assert gone() is None
    window = tally.take()
    assert (window.stable.requests, window.canary.requests) == (1, 1)


def test_small_answers_are_counted_some_at_a_time() -> None:
    tally = Tally(PROBABILITY_BINS, CANARY)
    tally.expect(CANARY, SMALL_ROW)
    record = InferenceRecord(form="serve", version=CANARY, stages={"execute": 0.1}, rows=FEW_ROWS, batch_rows=FEW_ROWS)
    waiting = set[int]()
    for number in range(1000):
        tally.answered(record, {"score": np.full((1, 1), 0.5, np.float32)})
        waiting.add(len(tally._answers))
        if number == 500:
            assert (tally.answers_of_canary, tally.answers_of_stable, tally._answers) == (501, 0, [])
    assert max(waiting) == MOST_ANSWERS - 1
    window = tally.take()
    assert (window.canary.requests, sum(window.canary.scores), sum(s.total for s in window.canary.execute.values())) == (
        1000,
    ) * 3
