"""What Ray is told, seen through metrics that remember it in place of Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ray.util import metrics

from ray_apps.telemetry import RayTelemetry
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
