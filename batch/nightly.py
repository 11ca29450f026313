"""Partition after partition: what a scheduler runs at night, or somebody who fills a gap.

    JobSpec -> partitions.py: one job a partition -> job.py, one after the other on one Ray -> Done, each

A partition that fails does not stop the next: what was done is kept, and the same command goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
from rich.console import Console

from batch import job
from batch.partitions import jobs
from batch.spec import JobSpec
from triform.errors import TriformError
from triform.sources import Sources
from triform.telemetry import Telemetry


class Done(msgspec.Struct, frozen=True):
    """What came of a partition; `partition` is "" for a job without any."""

    partition: str
    summary: job.Summary | None = None
    error: TriformError | None = None


def run_all(spec: JobSpec, console: Console, telemetry: Telemetry) -> Iterator[Done]:
    """Runs the jobs that were asked for. Raises what is wrong with the partitions themselves; see `partitions.jobs`."""
    with ExitStack() as stack:
        with job.told_if_failed(spec, telemetry):  # a night whose input is missing alerts too
            chosen = jobs(spec, Sources())
        for i, (partition, one) in enumerate(chosen):
            if partition:
                console.print(f"{partition} ({i + 1} of {len(chosen)})", highlight=False, soft_wrap=True, style="bold")
            try:
                yield Done(partition, job.run(one, console, telemetry, stack=stack))
            except TriformError as error:
                yield Done(partition, None, error)
