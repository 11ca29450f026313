"""What a replica counts, through Ray's metrics: the names of triform/telemetry.py, which Ray exports with the prefix `ray_`.

InferenceRecord -> observations -> ray.util.metrics (the replica's own, told apart by Ray's labels)
                -> a line of the log, for failed requests or for all
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from triform.telemetry import VOCABULARY, InferenceRecord, LoadRecord, Observation, RunRecord, Telemetry, observations, of_load

log = logging.getLogger(__name__)

PER_REQUEST: Final = ("request_id", "model", "version", "variant", "code", "rows", "batch_rows", "seconds", "caller")


AGAIN_SECONDS: Final = 15.0


class RayTelemetry:
    """Counts in `ray.util.metrics`. Ray forgets a gauge that nobody has set for some time, so each is set again and again."""

    def __init__(self) -> None:
        self._metrics: Mapping[str, Any] = {metric.name: _made(metric) for metric in VOCABULARY}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        threading.Thread(target=self._remind, name="triform-gauges", daemon=True).start()

    def _remind(self) -> None:
        while True:
            time.sleep(AGAIN_SECONDS)
            for (name, labels), value in list(self._gauges.items()):
                self._metrics[name].set(value, dict(labels))

    def record(self, inference: InferenceRecord) -> None:
        self._tell(observations(inference))

    def loaded(self, load: LoadRecord) -> None:
        self._tell(of_load(load))

    def ran(self, run: RunRecord) -> None:
        """No batch runs here."""

    def _tell(self, seen: Sequence[Observation]) -> None:
        for metric, labels, value in seen:
            made = self._metrics[metric.name]
            if metric.kind == "histogram":
                made.observe(value, labels)
            elif metric.kind == "gauge":
                self._gauges[metric.name, tuple(sorted(labels.items()))] = value
                made.set(value, labels)
            elif value > 0:
                made.inc(value, labels)


def _made(metric: Any) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=metric.labels)
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
        log.info("loaded", extra={"model": load.model, "version": load.version, "digest": load.digest, "stages": load.stages})

    def ran(self, run: RunRecord) -> None:
        self._telemetry.ran(run)
