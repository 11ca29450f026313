"""The usual way with Ray Data: read_parquet -> map_batches(a class, a pool of actors) -> write_parquet.

    python -m benchmarks.peers.ray_data TASK

One CPU must stay for the tasks that read and write, or they never start and the pipeline hangs. On two CPUs two ways are left:
one actor with a CPU, or two with half a CPU each. The former was the faster: 7.3 and 7.6 s against 16.9 and 17.8 s on the floats
with the perceptron. `BENCH_ACTOR_CPUS=0.5` gives the other.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.task import BATCH_ROWS, Scorer, Task, finish, read_task

ACTOR_CPUS = float(os.environ.get("BENCH_ACTOR_CPUS", "1"))


class TableScorer:
    """The callable class of `map_batches`. Notes when the first actor was ready."""

    def __init__(self, task: Task) -> None:
        import pyarrow as pa

        pa.set_cpu_count(1)
        self.score = Scorer(task)
        ready = Path(f"{task.result}.ready.{os.getpid()}")
        ready.write_text(repr(time.time()))

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        return pa.Table.from_batches([self.score(batch) for batch in table.combine_chunks().to_batches()])


def main() -> None:
    import ray
    import ray.data

    task = read_task(sys.argv[1])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=task.workers, include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_parquet(task.files, columns=task.columns, partitioning=None)
        .map_batches(
            TableScorer,
            fn_constructor_args=(task,),
            batch_size=BATCH_ROWS,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=task.workers if ACTOR_CPUS < 1 else task.workers - 1),
            num_cpus=ACTOR_CPUS,
        )
        .write_parquet(task.output, compression="zstd", compression_level=1)
    )
    end = time.time()
    marks = Path(task.result).parent.glob(Path(task.result).name + ".ready.*")
    finish(task, begin=min(float(mark.read_text()) for mark in marks), end=end)
    ray.shutdown()


if __name__ == "__main__":
    main()
