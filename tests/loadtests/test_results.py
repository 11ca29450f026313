"""Figures of a run, and whether those who counted agree."""

from __future__ import annotations

import pytest

from loadtests.records import CONNECTION, OK, REFUSED, TIMEOUT, WRONG
from loadtests.results import Counters
from tests.loadtests.made import found


def test_what_was_right_is_timed_and_the_rest_is_counted() -> None:
    requests = [(i / 10, 0.001 * (i + 1), OK) for i in range(99)]
    run = found(*requests, (9.95, 20.0, TIMEOUT), (9.96, 0.0001, REFUSED), (9.97, 0.0001, WRONG), (9.98, 0.0, CONNECTION))
    total = run.total
    assert (total.requests, total.ok, total.refused, total.wrong, total.errors) == (103, 99, 1, 1, 2)
    assert total.p50_ms == pytest.approx(50.0)
    assert total.p99_ms == pytest.approx(98.02)
    assert total.error_rate == pytest.approx(3 / 103)
    assert total.refused_share == pytest.approx(1 / 103)
    assert run.seconds == pytest.approx(29.95), "until the last answer, or until it was given up"
    assert run.examples == {name: f"why {name}" for name in (TIMEOUT, REFUSED, WRONG, CONNECTION)}


def test_a_rate_is_of_answers_that_came_in_time_not_of_what_was_offered() -> None:
    """Ten a second are offered in each stage of a second, and every answer takes two."""
    run = found(*[(i / 10, 2.0, OK) for i in range(100)])
    assert [round(stage.offered) for stage in run.stages] == [10] * 10
    assert run.stages[0].figures.rate == 0
    assert max(moment.outstanding for moment in run.timeline) == pytest.approx(20, abs=1)
    assert run.timeline[-1].outstanding == 0


def test_a_stage_in_which_the_run_ended_is_no_point_of_a_curve() -> None:
    run = found(*[(i / 10, 0.01, OK) for i in range(33)], shape="steps", saturated=2.0)
    assert [stage.begin for stage in run.stages] == [0, 1, 2]
    assert (run.total.ok, run.counters.client) == (33, {OK: 33})


def test_a_run_in_which_nothing_was_asked_has_no_latency() -> None:
    run = found()
    assert (run.total.requests, run.total.p50_ms, run.total.error_rate) == (0, None, 0.0)


@pytest.mark.parametrize(
    ("client", "server", "prometheus", "said"),
    [
        ({OK: 5}, {OK: 5}, {OK: 5}, 0),
        ({OK: 5}, {OK: 4}, None, 1),
        ({OK: 5}, {OK: 6}, None, 2),
        ({OK: 5, TIMEOUT: 1}, {OK: 6}, None, 0),  # it answered after the client had gone
        ({OK: 5, REFUSED: 3}, {OK: 5, "overloaded": 2}, None, 0),  # one was refused before the model
        ({OK: 5, REFUSED: 3}, {OK: 5, "overloaded": 4}, None, 1),
        ({OK: 5}, {OK: 5}, {OK: 4}, 2),
        ({OK: 5}, None, None, 0),
    ],
)
def test_who_counts_what(
    client: dict[str, int], server: dict[str, int] | None, prometheus: dict[str, int] | None, said: int
) -> None:
    assert len(Counters(client=client, server=server, prometheus=prometheus).differences()) == said
