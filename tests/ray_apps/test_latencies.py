"""Serve's histograms, counted by us: what Ray is told of them. That Serve itself tells ours so is in test_straight.py."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util import metrics

from ray_apps.latencies import Latencies, tell_latencies, tell_latencies_of
from ray_apps.telemetry import RayTelemetry


class Gauge:
    """One of Ray's that only remembers the latest."""

    told: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:  # noqa: ARG002 - as Ray's
        self._name, self._keys = name, tag_keys

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert sorted(tags) == sorted(self._keys)
        self.told[self._name, frozenset(tags.items())] = value


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> RayTelemetry:
    Gauge.told = {}
    monkeypatch.setattr(metrics, "Gauge", Gauge)
    monkeypatch.setattr("ray_apps.telemetry.EVERY_SECONDS", 3600)
    return RayTelemetry()


def histogram(name: str) -> Any:
    made = metrics.Histogram(name, "of requests", boundaries=[1, 5.0], tag_keys=("application", "route", "replica"))
    made.set_default_tags({"replica": "r1", "application": "a"})
    return made


def told(name: str, **labels: str) -> float:
    return Gauge.told[name, frozenset(labels.items())]


def test_ray_is_told_what_its_histogram_would_have_come_to(telemetry: RayTelemetry) -> None:
    latencies = Latencies(histogram("serve_ms"), telemetry)
    for value in 0.5, 1.0, 1.5, 7.0:
        latencies.observe(value, {"route": "/"})
    latencies.observe(2.0, {"route": "/below", "application": "b"})
    latencies.observe(2.0, {"application": "b", "route": "/below"})
    telemetry.tell()
    labels = {"application": "a", "route": "/", "replica": "r1"}
    assert [told("serve_ms_bucket", **labels, le=le) for le in ("1.0", "5.0", "+Inf")] == [2.0, 3.0, 4.0]
    assert (told("serve_ms_sum", **labels), told("serve_ms_count", **labels)) == (10.0, 4.0)
    assert told("serve_ms_count", application="b", route="/below", replica="r1") == 2.0


def test_a_label_that_nobody_gives_is_empty(telemetry: RayTelemetry) -> None:
    Latencies(histogram("serve_ms"), telemetry).observe(1.0, {})
    telemetry.tell()
    assert told("serve_ms_count", application="a", route="", replica="r1") == 1.0


class Counts:
    """A replica's metrics manager, as far as that."""

    def __init__(self) -> None:
        self.tracker = "processing_latency_tracker"
        self._processing_latency_tracker = histogram("serve_deployment_ms")
        self._ingress_metrics: dict[str, Any] = {}
        self._add_ingress_metrics("HTTP")

    def _add_ingress_metrics(self, protocol: str) -> None:
        self._ingress_metrics[protocol] = SimpleNamespace(**{self.tracker: histogram(f"serve_{protocol}_ms")})


def test_all_of_a_replica_are_told_so_and_those_of_grpc_that_are_made_later(telemetry: RayTelemetry) -> None:
    counts = Counts()
    tell_latencies_of(counts, telemetry)
    counts._add_ingress_metrics("GRPC")
    counts._processing_latency_tracker.observe(1.0, {"route": "/"})
    for ingress in counts._ingress_metrics.values():
        ingress.processing_latency_tracker.observe(1.0, {"route": "/"})
    telemetry.tell()
    named = ["serve_GRPC_ms_count", "serve_HTTP_ms_count", "serve_deployment_ms_count"]
    assert sorted(name for name, _ in Gauge.told if name.endswith("_count")) == named


def test_where_serve_has_changed_it_tells_them_itself(telemetry: RayTelemetry, caplog: pytest.LogCaptureFixture) -> None:
    tell_latencies(telemetry)  # this process is no replica
    assert "its agent is told of each request" in caplog.text
    counts = Counts()
    made = counts._ingress_metrics["HTTP"].processing_latency_tracker
    del counts._processing_latency_tracker
    with pytest.raises(AttributeError):
        tell_latencies_of(counts, telemetry)
    assert counts._ingress_metrics["HTTP"].processing_latency_tracker is made
    assert "_add_ingress_metrics" not in vars(counts)


def test_where_serve_counts_calls_in_another_way_it_starts_all_the_same(
    telemetry: RayTelemetry, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts()
    tell_latencies_of(counts, telemetry)
    assert caplog.text == ""
    counts.tracker = "another_name"
    counts._add_ingress_metrics("GRPC")
    assert "its agent is told of each request" in caplog.text
