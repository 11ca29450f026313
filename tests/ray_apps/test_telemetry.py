"""What Ray is told, seen through metrics that remember it in place of Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray.util import metrics

from ray_apps.telemetry import MOST_WAITING, RayTelemetry
from triform.telemetry import FREED, InferenceRecord, LoadRecord

MODEL: Mapping[str, Any] = {"form": "serve", "model": "m"}


class Told:
    """A metric of Ray's that only remembers."""

    seen: list[tuple[str, str, float]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:  # noqa: ARG002 - as Ray's
        self.name = name

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.seen.append((self.name, tags["version"], value))

    inc = set


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> RayTelemetry:
    Told.seen = []
    monkeypatch.setattr(metrics, "Gauge", Told)
    monkeypatch.setattr(metrics, "Counter", Told)
    monkeypatch.setattr("ray_apps.telemetry.EVERY_SECONDS", 3600)
    return RayTelemetry()


def test_requests_of_many_threads_are_each_counted_once(telemetry: RayTelemetry) -> None:
    def ask(number: int) -> None:
        for _ in range(MOST_WAITING + 7):
            telemetry.record(InferenceRecord(**MODEL, version=1 + number % 2, seconds=0.01))
            if number == 0:
                telemetry.tell()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    telemetry.tell()
    counted = [value for name, _, value in Told.seen if name == "triform_requests_total"]
    assert sum(counted) == 8 * (MOST_WAITING + 7)


def test_the_last_telling_waits_for_what_is_being_counted(telemetry: RayTelemetry) -> None:
    telemetry.record(InferenceRecord(**MODEL, version=1, seconds=0.01))
    with ThreadPoolExecutor(1) as threads:
        with telemetry._counting:
            telling = threads.submit(telemetry.tell)
            assert not telling.done()
        telling.result(30)
    assert ("triform_requests_total", "1", 1.0) in Told.seen


def versions(telemetry: RayTelemetry, name: str | None = None) -> list[str]:
    """Of which the next telling tells, by that metric or any."""
    Told.seen.clear()
    telemetry.tell()
    return sorted({version for metric, version, _ in Told.seen if name in (None, metric)})


def test_who_is_in_flight_when_his_version_goes_is_counted_and_its_series_stay_away(telemetry: RayTelemetry) -> None:
    for version in range(1, 4):
        telemetry.loaded(LoadRecord(**MODEL, version=version, stages={"fetch": 1.0}))
        telemetry.record(InferenceRecord(**MODEL, version=version, seconds=0.01))
    telemetry.loaded(LoadRecord(**MODEL, version=2, code=FREED))
    telemetry.record(InferenceRecord(**MODEL, version=2, seconds=0.01))
    assert versions(telemetry, "triform_requests_total") == ["2"], "he is counted, as the only one since"
    assert versions(telemetry) == ["1", "3"]
    telemetry.loaded(LoadRecord(**MODEL, version=2, stages={"fetch": 1.0}))
    assert versions(telemetry) == ["1", "2", "3"], "it came back"
    assert versions(telemetry) == ["1", "2", "3"]
