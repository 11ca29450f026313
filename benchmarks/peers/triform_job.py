"""Ours: the batch job, as `python -m batch run` runs it.

python -m benchmarks.peers.triform_job TASK
"""

from __future__ import annotations

import math
import sys
import time

from rich.console import Console

from batch import job
from batch.spec import JobSpec
from benchmarks.peers.task import finish, read_task
from triform.telemetry import InferenceRecord, LoadRecord


def main() -> None:
    task = read_task(sys.argv[1])
    spec = JobSpec(
        repository=task.repository,
        model=task.ref,
        input=tuple(task.files),
        output=task.output,
        key=tuple(task.key),
        keep=tuple(task.keep),
        actors=task.workers,
        max_dead_letters=0.05,
    )
    parts = PartTimes()
    summary = job.run(spec, Console(quiet=True), parts)
    finish(task, begin=parts.first, end=parts.first + summary.scoring_seconds)


class PartTimes:
    """Telemetry that keeps when the first part was begun."""

    def __init__(self) -> None:
        self.first = math.inf

    def record(self, inference: InferenceRecord) -> None:
        self.first = min(self.first, time.time() - inference.seconds)

    def loaded(self, load: LoadRecord) -> None:
        """Counts for nothing."""


if __name__ == "__main__":
    main()
