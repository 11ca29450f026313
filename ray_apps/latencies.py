"""Serve's own histograms of the time of requests, told as ours are (telemetry.py).

    Serve's replica -> observe, for each request -> counted here, in Serve's buckets -> three gauges of Ray, every few seconds

What a histogram of Ray is told goes to the agent of the node, a process in Python that records each number by itself. Two of them
for each request were 24 us there and 20 in the replica, a fifth of all that a request to a small model takes, and one agent has
all the replicas of a node. Names, labels and buckets stay as they are, so that dashboards find what they did; but the series of a
replica end with it, as a gauge's do, and are not kept until the agent ends.

Seen in Ray 2.60: `ReplicaMetricsManager` in ray/serve/_private/replica.py, of the actor that a process is, which
`ray._private.worker` has. Where Ray has another, it tells its histograms itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from ray_apps.telemetry import RayTelemetry
from triform.telemetry import Metric

log = logging.getLogger(__name__)

_CHANGED: Final = (ImportError, AttributeError, KeyError, TypeError)
_SAYS: Final = "this version of Ray Serve counts in another way than 2.60 (%s): its agent is told of each request"


class Latencies:
    """In place of a `ray.util.metrics.Histogram` that was told nothing yet: else there would be two of one name."""

    def __init__(self, histogram: Any, telemetry: RayTelemetry) -> None:
        info = histogram.info
        self._always: Mapping[str, str] = info["default_tags"]
        buckets = tuple(map(float, info["boundaries"]))
        self._metric = Metric(info["name"], "histogram", info["description"], tuple(info["tag_keys"]), buckets)
        self._telemetry = telemetry
        self._by_tags: dict[tuple[tuple[str, str], ...], Callable[[float], None]] = {}

    def observe(self, value: float, tags: Mapping[str, str]) -> None:
        """`value`: in milliseconds, as Serve has it."""
        key = (*tags.items(),)
        add = self._by_tags.get(key)
        if add is None:
            told = {**self._always, **tags}
            labels = {name: str(told.get(name, "")) for name in self._metric.labels}
            add = self._by_tags[key] = self._telemetry.series(self._metric, labels).add
        add(value)


def tell_latencies(telemetry: RayTelemetry) -> None:
    """By way of `telemetry`, from now on; of the replica that this process is, before it answers anybody."""
    try:
        tell_latencies_of(_replica()._metrics_manager, telemetry)
    except _CHANGED as error:
        log.warning(_SAYS, error)


def tell_latencies_of(counts: Any, telemetry: RayTelemetry) -> None:
    """Of a replica's metrics manager. Raises `AttributeError`, `KeyError`, `TypeError`: then nothing is changed."""
    add = counts._add_ingress_metrics

    def added(protocol: Any) -> None:  # that of gRPC, once it is listened for
        add(protocol)
        try:
            ingress = counts._ingress_metrics[protocol]
            ingress.processing_latency_tracker = Latencies(ingress.processing_latency_tracker, telemetry)
        except _CHANGED as error:
            log.warning(_SAYS, error)

    ours = Latencies(counts._processing_latency_tracker, telemetry)
    of_ingress = [
        (ingress, Latencies(ingress.processing_latency_tracker, telemetry)) for ingress in counts._ingress_metrics.values()
    ]
    counts._add_ingress_metrics = added
    counts._processing_latency_tracker = ours
    for ingress, latencies in of_ingress:
        ingress.processing_latency_tracker = latencies


def _replica() -> Any:
    from ray._private.worker import global_worker

    return global_worker.actors[global_worker.actor_id]._replica_impl
