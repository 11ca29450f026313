"""What a run counted, told to whoever watches at its end: Prometheus' Pushgateway, CloudWatch, or both.

    job.py -> Telemetry (prometheus, Sums) -> publish, once, however the run ended

The names are those of triform/telemetry.py. Where telling fails, a committed run stays committed, and a line says what was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from triform.errors import ConfigurationError
from triform.telemetry import (
    InferenceRecord,
    LoadRecord,
    Metric,
    Observation,
    RunRecord,
    SplitRecord,
    Telemetry,
    observations,
    of_load,
    of_run,
    of_split,
    prometheus,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

TIMEOUT: Final = 10.0  # seconds for a Pushgateway or CloudWatch to answer
JOB: Final = "triform-batch"
DATA_POINTS: Final = 500  # of one request; CloudWatch takes 1,000 and 1 MB


class Both:
    """Counts in every one of the given backends."""

    def __init__(self, backends: Sequence[Telemetry]) -> None:
        self._backends = backends

    def record(self, inference: InferenceRecord) -> None:
        for backend in self._backends:
            backend.record(inference)

    def loaded(self, load: LoadRecord) -> None:
        for backend in self._backends:
            backend.loaded(load)

    def ran(self, run: RunRecord) -> None:
        for backend in self._backends:
            backend.ran(run)

    def shared(self, split: SplitRecord) -> None:
        for backend in self._backends:
            backend.shared(split)


class Statistics(msgspec.Struct):
    count: float = 0.0
    total: float = 0.0
    smallest: float = float("inf")
    largest: float = float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)


class Sums:
    """Counts for CloudWatch: counters as sums, histograms as statistic sets, gauges as they were last."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Metric, tuple[tuple[str, str], ...]], Statistics] = {}

    def record(self, inference: InferenceRecord) -> None:
        self._add(observations(inference))

    def loaded(self, load: LoadRecord) -> None:
        self._add(of_load(load))

    def ran(self, run: RunRecord) -> None:
        self._add(of_run(run))

    def shared(self, split: SplitRecord) -> None:
        self._add(of_split(split))

    def _add(self, seen: Sequence[Observation]) -> None:
        for metric, labels, value in seen:
            key = metric, tuple(sorted(labels.items()))
            if metric.kind == "gauge":
                self._seen.pop(key, None)
            self._seen.setdefault(key, Statistics()).add(value)

    def data(self) -> Iterator[dict[str, Any]]:
        """As `PutMetricData` takes them."""
        for (metric, labels), found in self._seen.items():
            point: dict[str, Any] = {
                "MetricName": metric.name,
                "Dimensions": [{"Name": name, "Value": value} for name, value in labels],
                "Unit": "Seconds" if metric.name.endswith("_seconds") else "Count",
            }
            if metric.kind == "histogram":
                names = {"SampleCount": found.count, "Sum": found.total, "Minimum": found.smallest, "Maximum": found.largest}
                yield point | {"StatisticValues": names}
            else:
                yield point | {"Value": found.total}


@contextmanager
def published(model: str, *, pushgateway: str | None, cloudwatch: str | None, warn: Callable[[str], None]) -> Iterator[Telemetry]:
    """A telemetry whose counts are published at the end.

    `pushgateway`: its address, http://host:9091; `cloudwatch`: a namespace. `warn` is told what could not be published.
    """
    backends: list[Telemetry] = []
    senders: list[tuple[str, Callable[[], None]]] = []
    if pushgateway is not None:
        registry = _registry()
        backends.append(prometheus(registry))
        senders.append((f"the Pushgateway {pushgateway.rpartition('@')[2]}", lambda: _push(pushgateway, registry, model)))
    if cloudwatch is not None:
        sums = Sums()
        backends.append(sums)
        senders.append((f"CloudWatch's namespace {cloudwatch}", lambda: _put(cloudwatch, list(sums.data()))))
    try:
        yield Both(backends)
    finally:
        for name, send in senders:
            try:
                send()
            except Exception as error:  # noqa: BLE001 - whatever it is, the run has ended as it has
                warn(f"the metrics were not published to {name}: {type(error).__name__}: {error}")


def _registry() -> CollectorRegistry:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


def _push(address: str, registry: CollectorRegistry, model: str) -> None:
    """Adds to the model's group: what a failed run does not know, the time of the last success, stays there."""
    from prometheus_client import pushadd_to_gateway

    pushadd_to_gateway(address, JOB, registry, grouping_key={"model": model}, timeout=TIMEOUT)


def _put(namespace: str, points: list[dict[str, Any]]) -> None:
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"CloudWatch needs {error.name}: install triform[s3]") from error
    config = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"mode": "standard", "total_max_attempts": 3})
    client = boto3.client("cloudwatch", config=config)
    for start in range(0, len(points), DATA_POINTS):
        client.put_metric_data(Namespace=namespace, MetricData=points[start : start + DATA_POINTS])
