"""Ours: the batch job, as `python -m batch run` runs it.

python -m benchmarks.peers.triform_job TASK
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from rich.console import Console

from batch import job
from batch.spec import JobSpec
from benchmarks.peers.task import finish, read_task, steady_rate
from triform.scoring import ScoredPart


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
    with ExitStack() as stack:  # which stops Ray afterwards: nobody waits for that to read the output
        summary = job.run(spec, Console(quiet=True), stack=stack)
        ended = time.time()
    parts: dict[str, list[ScoredPart]] = {}
    for part in sorted(summary.manifest.parts, key=lambda part: part.began):
        parts.setdefault(part.worker, []).append(part)
    begun = [one[0].began for one in parts.values()]
    steady = sum(steady_rate([(part.began + part.elapsed, part.rows_in) for part in one]) for one in parts.values())
    seconds = sum(ended - began for began in begun) / len(begun)
    finish(task, begin=min(begun), end=ended, seconds=seconds, steady=steady)


if __name__ == "__main__":
    main()
