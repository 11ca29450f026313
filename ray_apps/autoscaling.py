"""How many replicas: by what is under way, and by how long requests wait for their model. Fast up, one by one down.

    replica -> record_autoscaling_stats -> {"queue_s": ...} -> Serve's controller -> LoadPolicy -> replicas wanted

Requests under way alone say too little: thirty of them are nothing to a model of a millisecond, and half a minute to one of a
second. Serve pickles this module by value into its controller, so it imports nothing of ours. The bounds, and how long something
must be wanted until it is done, are Serve's.
"""

from __future__ import annotations

from typing import Any, Final

QUEUE: Final = "queue_s"  # of a replica: how long the oldest request that waits has waited, in seconds
NEEDED: Final = "needed"  # of a replica: 1 where there must be one, whether anybody asks or not
MOST_GROWTH: Final = 2.0  # times the replicas that run: a wait grows faster than the load


class LoadPolicy:
    """A policy for `AutoscalingConfig`. `target_queue_s`: the wait at which it grows; below half of it, it may shrink."""

    def __init__(self, target_queue_s: float) -> None:
        self.target = target_queue_s

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The replicas wanted, to be rounded up. `ctx`: an `AutoscalingContext`. Serve itself wakes what has no replica."""
        running = ctx.current_num_replicas
        if not running:
            return ctx.target_num_replicas, {}
        wanted = max(ctx.total_num_requests / ctx.config.target_ongoing_requests, running - 1)
        told = ctx.aggregated_metrics or {}
        wanted = max(wanted, *told.get(NEEDED, {}).values(), 0.0)
        waits = told.get(QUEUE, {}).values()
        too_long = sum(waits) / len(waits) / self.target if waits else 0.0
        if too_long > 1:
            wanted = max(wanted, running * min(too_long, MOST_GROWTH))
        elif too_long > 0.5:
            wanted = max(wanted, running)
        return wanted, {}
