"""The vocabulary as a Prometheus server would scrape it, from a registry of one's own."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from triform.telemetry import FREED, VOCABULARY, InferenceRecord, LoadRecord, Silent, prometheus

LABELS = {"model": "flight-delay", "version": "2", "variant": "canary", "form": "serve"}
RECORD = InferenceRecord(
    form="serve",
    model="flight-delay",
    version=2,
    variant="canary",
    rows=5,
    batch_rows=8,
    seconds=0.03,
    stages={"decode": 0.01, "execute": 0.02},
    dead_letters={"missing_value": 2, "run_failed": 1},
    request_id="a-very-private-request-id",
)
LOAD = LoadRecord(
    form="serve",
    model="m",
    version=1,
    provider="cuda",
    precision="float32",
    digest="0123456789abcdef" * 4,
    stages={"verify": 0.5},
)


def scraped(registry: CollectorRegistry) -> Iterator[tuple[str, dict[str, str], float]]:
    """Every sample in the exposition text."""
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield sample.name, sample.labels, sample.value


def test_a_request_is_counted_under_the_vocabularys_names_and_labels() -> None:
    registry = CollectorRegistry()
    backend = prometheus(registry)
    backend.record(RECORD)
    backend.loaded(LOAD)
    stems = {
        f"{m.name}{end}": m for m in VOCABULARY for end in (("_bucket", "_sum", "_count") if m.kind == "histogram" else ("",))
    }
    for name, labels, _ in scraped(registry):
        assert set(labels) - {"le"} == set(stems[name].labels)


@pytest.mark.parametrize(
    ("name", "more", "value"),
    [
        ("triform_requests_total", {"code": "ok"}, 2),
        ("triform_rows_total", {}, 10),
        ("triform_request_seconds_count", {}, 2),
        ("triform_request_seconds_sum", {}, 0.06),
        ("triform_request_seconds_bucket", {"le": "0.025"}, 0),
        ("triform_request_seconds_bucket", {"le": "0.05"}, 2),
        ("triform_batch_rows_bucket", {"le": "8.0"}, 2),
        ("triform_stage_seconds_sum", {"stage": "decode"}, 0.02),
        ("triform_dead_letter_rows_total", {"code": "missing_value"}, 4),
    ],
)
def test_two_requests_add_up(name: str, more: dict[str, str], value: float) -> None:
    registry = CollectorRegistry()
    backend = prometheus(registry)
    backend.record(RECORD)
    backend.record(RECORD)
    assert registry.get_sample_value(name, LABELS | more) == pytest.approx(value)


def test_a_load_is_told() -> None:
    registry = CollectorRegistry()
    prometheus(registry).loaded(LOAD)
    labels = {"model": "m", "version": "1", "variant": "stable", "form": "serve"}
    info = {"provider": "cuda", "precision": "float32", "digest": "0123456789ab"}
    assert registry.get_sample_value("triform_model_info", labels | info) == 1
    assert registry.get_sample_value("triform_model_load_seconds", labels | {"stage": "verify"}) == 0.5


def test_a_load_that_failed_and_one_that_ended_are_told() -> None:
    registry = CollectorRegistry()
    backend = prometheus(registry)
    backend.loaded(LOAD)
    backend.loaded(msgspec.structs.replace(LOAD, code=FREED))
    for _ in range(2):
        backend.loaded(LoadRecord(form="serve", model="m", version=2, code="digest_mismatch"))
    backend.loaded(LoadRecord(form="serve", model="m", version=None, code="store_unavailable"))
    labels = {"model": "m", "version": "1", "variant": "stable", "form": "serve"}
    info = {"provider": "cuda", "precision": "float32", "digest": "0123456789ab"}
    assert registry.get_sample_value("triform_model_info", labels | info) == 0
    failures = {
        (labels["version"], labels["code"], value)
        for name, labels, value in scraped(registry)
        if name == "triform_model_load_failures_total"
    }
    assert failures == {("2", "digest_mismatch", 2.0), ("unknown", "store_unavailable", 1.0)}


def test_a_request_without_a_model_is_unknown_and_ids_make_no_series() -> None:
    """Endlessly many names and ids must not become endlessly many series."""
    registry = CollectorRegistry()
    backend = prometheus(registry)
    for i in range(100):
        backend.record(InferenceRecord(form="lambda", code="model_not_found", request_id=f"request-{i}"))
    totals = [(labels, value) for name, labels, value in scraped(registry) if name == "triform_requests_total"]
    unknown = {"model": "unknown", "version": "unknown", "variant": "stable", "form": "lambda", "code": "model_not_found"}
    assert totals == [(unknown, 100)]
    assert b"request-" not in generate_latest(registry)


def test_two_backends_do_not_meet() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    prometheus(first).record(RECORD)
    prometheus(second)
    assert first.get_sample_value("triform_rows_total", LABELS) == 5
    assert second.get_sample_value("triform_rows_total", LABELS) is None


def test_silence_takes_anything() -> None:
    Silent().record(RECORD)
    Silent().loaded(LOAD)


def test_times_below_a_millisecond_are_told_apart() -> None:
    registry = CollectorRegistry()
    telemetry = prometheus(registry)
    for microseconds in 20, 40, 90, 200:
        telemetry.record(InferenceRecord(form="serve", model="m", version=1, seconds=microseconds / 1e6))
    labels = {"model": "m", "version": "1", "variant": "stable", "form": "serve"}
    bounds = ["2.5e-05", "5e-05", "0.0001", "0.00025"]
    found = [registry.get_sample_value("triform_request_seconds_bucket", {**labels, "le": bound}) for bound in bounds]
    assert found == [1, 2, 3, 4]
