"""What replicas of every deployment here do for Serve, whatever they do for callers."""

from __future__ import annotations

import gc
import sys
from typing import Any, Final

from ray_apps.arguments import Arguments
from ray_apps.autoscaling import QUEUE
from ray_apps.latencies import tell_latencies
from ray_apps.logs import log_as_json
from ray_apps.telemetry import Logged, RayTelemetry
from triform.telemetry import Telemetry

# Seconds for which a thread may be kept from Python by another. A run that has ended waits until the event loop lets go of it, as
# does the next: with Python's own number that may be 5 ms each time.
SWITCH: Final = 0.0003


# Objects that are made and not let go of before the latest are looked through for garbage. Python's own number, 700, is what a
# dozen requests in flight hold.
GARBAGE: Final = 20_000


class Replica:
    """`hosted`: what hosting.py makes."""

    counted: RayTelemetry
    hosted: Any

    def begin(self, arguments: Arguments) -> Telemetry:
        """Sets up the log; who is to be told what is counted, by us and by Serve."""
        log_as_json()
        gc.set_threshold(GARBAGE)
        sys.setswitchinterval(SWITCH)
        self.counted = RayTelemetry()
        tell_latencies(self.counted)
        return self.counted if arguments.log_requests == "none" else Logged(self.counted, arguments.log_requests)

    async def check_health(self) -> None:
        """Asked by Serve; what it raises takes the replica out of service, and three times in a row gets it replaced."""
        await self.hosted.health.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the policy."""
        return {QUEUE: self.hosted.batched.waiting_seconds}
