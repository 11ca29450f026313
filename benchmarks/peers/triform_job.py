"""Ours: the batch job, as `python -m batch run` runs it.

python -m benchmarks.peers.triform_job TASK
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from batch import job
from batch.spec import JobSpec
from benchmarks.peers.task import finish, read_task
from triform.dead_letters import FOOTER_KEY
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
    finish(task, begin=first_begun(summary.data, parts.elapsed), end=parts.told_first + summary.scoring_seconds)


def first_begun(data: Path, elapsed: dict[int, float]) -> float:
    """When the first part was really begun: by its file's last change and how long the part took.

    `Summary.scoring_seconds` counts back from when an outcome *reached* the driver, up to two seconds after it was there, and so
    begins too late. Dead letters are written after the data file, which can only make this too early: against us.
    """
    begun = []
    for file in data.glob("*.parquet"):
        footer = json.loads(pq.read_metadata(file).metadata[FOOTER_KEY])
        begun.append(file.stat().st_mtime - elapsed[footer["part"]])
    return min(begun)


class PartTimes:
    """Telemetry that keeps how long each part took, and when the driver took the first to have begun."""

    def __init__(self) -> None:
        self.elapsed: dict[int, float] = {}
        self.told_first = math.inf

    def record(self, inference: InferenceRecord) -> None:
        self.elapsed[int(inference.request_id.rpartition("/")[2])] = inference.seconds
        self.told_first = min(self.told_first, time.time() - inference.seconds)

    def loaded(self, load: LoadRecord) -> None:
        """Counts for nothing."""


if __name__ == "__main__":
    main()
