"""What a replica counts, through Ray's metrics: the names of triform/telemetry.py, which Ray exports with the prefix `ray_`.

InferenceRecord -> some wait together -> observations -> counted here -> ray.util.metrics (the replica's own, by Ray's labels)
                -> a line of the log, for failed requests or for all
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Final, Literal

from triform.telemetry import (
    FREED,
    VOCABULARY,
    InferenceRecord,
    LoadRecord,
    Metric,
    RunRecord,
    SplitRecord,
    Telemetry,
    observations,
    observed,
    of_load,
    of_split,
    shape,
)

log = logging.getLogger(__name__)

PER_REQUEST: Final = (
    "request_id", "model", "version", "variant", "code", "rows", "batch_rows", "seconds", "instead_of", "caller",
)  # fmt: skip
EVERY_SECONDS: Final = 5.0
MOST_WAITING: Final = 128  # requests that are still to be counted
REMEMBERED: Final = 1000  # freed models for whom requests may still be in flight: more than are released in a request's time


class RayTelemetry:
    """Counts here, and tells `ray.util.metrics` every few seconds what it has come to.

    To Ray each number costs microseconds, and each one of a histogram tens of them in the node's agent, which records them one by
    one. So a histogram is told as Prometheus has it: `_bucket` with the label `le`, `_sum` and `_count`, which are gauges to Ray.
    Serve's own are told the same way (latencies.py).
    """

    def __init__(self) -> None:
        self._counted: dict[tuple[str, ...], _Series] = {}
        self._by_shape: dict[tuple[object, ...], list[Callable[[float], None]]] = {}  # what records count in
        self._gone: dict[tuple[str, ...], None] = {}  # models that were freed, by their labels: the latest
        self._waiting: list[InferenceRecord] = []
        self._counting = threading.Lock()
        self._telling = threading.Lock()
        self._made: dict[str, Any] = {metric.name: _made(metric) for metric in VOCABULARY}
        threading.Thread(target=self._tell_again, name="triform-metrics", daemon=True).start()

    def record(self, inference: InferenceRecord) -> None:
        self._waiting.append(inference)
        if len(self._waiting) >= MOST_WAITING:
            self._count_waiting(wait=False)

    def _count_waiting(self, *, wait: bool) -> None:
        """Many at once, which takes a fraction of the time of one by one; not again, or after it, where another thread does."""
        if not self._counting.acquire(blocking=wait):
            return
        try:
            waiting = self._waiting[:]
            del self._waiting[: len(waiting)]  # others may have come at its end
            for inference in waiting:
                self._count(inference)
        finally:
            self._counting.release()

    def _count(self, inference: InferenceRecord) -> None:
        kind = shape(inference)
        counted_in = self._by_shape.get(kind)
        if counted_in is None:
            with self._telling:  # none is let go of meanwhile
                counted_in = self._by_shape[kind] = [
                    self.series(metric, labels).add for metric, labels, _ in observations(inference)
                ]
        for add, value in zip(counted_in, observed(inference)):  # noqa: B905 - of one shape they are as many
            add(value)

    def loaded(self, load: LoadRecord) -> None:
        model = (*load.labels().values(),)
        if load.code == "ok":
            self._gone.pop(model, None)
        elif load.code == FREED:
            self._gone[model] = None
            if len(self._gone) > REMEMBERED:
                del self._gone[next(iter(self._gone))]
        for metric, labels, value in of_load(load):
            self.series(metric, labels).add(value)
        self.tell()

    def ran(self, run: RunRecord) -> None:
        """No batch runs here."""

    def shared(self, split: SplitRecord) -> None:
        for metric, labels, value in of_split(split):
            self.series(metric, labels).add(value)

    def tell(self) -> None:
        """Tells Ray all of it: a gauge that is not told again is forgotten. So what is said of a model that is gone is said once,
        and then of who was in flight when it went."""
        self._count_waiting(wait=True)
        with self._telling:
            for key, series in [*self._counted.items()]:
                series.tell(self._made[key[0]])
                if key[1:5] in self._gone:  # model, version, variant, form
                    self._counted.pop(key, None)
                    self._by_shape.clear()

    def _tell_again(self) -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            try:
                self.tell()
            except Exception:  # the next telling says all of it
                log.exception("Ray could not be told what was counted")

    def series(self, metric: Metric, labels: Mapping[str, str]) -> _Series:
        """Whose `add` counts; of a metric of the vocabulary, or of another, by all of its labels in their order."""
        if metric.name not in self._made:
            self._made[metric.name] = _made(metric)
        key = (metric.name, *labels.values())
        series = self._counted.get(key)
        return series or self._counted.setdefault(key, _SERIES[metric.kind](metric, labels))


class _Counter:
    """One metric with one set of labels, as the two below are."""

    def __init__(self, metric: Metric, labels: Mapping[str, str]) -> None:  # noqa: ARG002 - all are made alike
        self.labels = labels
        self._sum = self._told = 0.0

    def add(self, value: float) -> None:
        self._sum += value

    def tell(self, made: Any) -> None:
        if (since := self._sum - self._told) > 0:
            made.inc(since, self.labels)
            self._told += since


class _Gauge:
    def __init__(self, metric: Metric, labels: Mapping[str, str]) -> None:  # noqa: ARG002
        self.labels = labels
        self._value = 0.0

    def add(self, value: float) -> None:
        self._value = value

    def tell(self, made: Any) -> None:
        made.set(self._value, self.labels)


class _Histogram:
    def __init__(self, metric: Metric, labels: Mapping[str, str]) -> None:
        self.labels = labels
        self._bounds = metric.buckets
        self._counts = [0] * (len(metric.buckets) + 1)
        self._sum = 0.0
        self._buckets = [{**labels, "le": bound} for bound in [*map(str, metric.buckets), "+Inf"]]

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def tell(self, made: Any) -> None:
        bucket, total, count = made
        upto = [*accumulate(self._counts)]
        for labels, number in zip(self._buckets, upto, strict=True):
            bucket.set(number, labels)
        total.set(self._sum, self.labels)
        count.set(upto[-1], self.labels)


_Series = _Counter | _Gauge | _Histogram
_SERIES: Final[Mapping[str, type[_Counter] | type[_Gauge] | type[_Histogram]]] = {
    "counter": _Counter,
    "gauge": _Gauge,
    "histogram": _Histogram,
}


def _made(metric: Metric) -> Any:
    """What Ray is told by: of a histogram its three."""
    from ray.util import metrics

    if metric.kind == "histogram":
        parts = {"_bucket": (*metric.labels, "le"), "_sum": metric.labels, "_count": metric.labels}
        return [metrics.Gauge(metric.name + part, metric.help, tag_keys=labels) for part, labels in parts.items()]
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=metric.labels)


class Logged:
    """Passes on what it is told, and logs a line a request: of those that failed, or of all."""

    def __init__(self, telemetry: Telemetry, which: Literal["errors", "all"]) -> None:
        self._telemetry = telemetry
        self._all = which == "all"

    def record(self, inference: InferenceRecord) -> None:
        self._telemetry.record(inference)
        if self._all or inference.code != "ok":
            log.info("request", extra={name: getattr(inference, name) for name in PER_REQUEST})

    def loaded(self, load: LoadRecord) -> None:
        self._telemetry.loaded(load)
        if load.code in ("ok", FREED):  # whoever could not load one has said why
            told = {"model": load.model, "version": load.version, "variant": load.variant, "digest": load.digest}
            log.info("loaded" if load.code == "ok" else FREED, extra=told | {"stages": load.stages})

    def ran(self, run: RunRecord) -> None:
        self._telemetry.ran(run)

    def shared(self, split: SplitRecord) -> None:
        self._telemetry.shared(split)
