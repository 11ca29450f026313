"""The limit: as many single-process loops at once as there are workers, each over its share of the files.

    python -m benchmarks.peers.raw TASK

    Parquet file -> iter_batches -> Scorer -> ParquetWriter        in one thread; nothing is checked, nothing is synced

All loops have imported their libraries and opened their session before one of them begins.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Starts the loops, waits until all are ready, lets them go, and waits until all are done."""
    from benchmarks.peers.task import finish, read_task

    task = sys.argv[1]
    workers = read_task(task).workers
    command = [sys.executable, "-m", "benchmarks.peers.raw", task]
    loops = [subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for i in range(workers)]
    for process in loops:
        _said(process, "ready")
    begin = time.time()
    for process in loops:
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
    steady = sum(float(_said(process, "done")) for process in loops)
    finish(read_task(task), begin=begin, end=time.time(), steady=steady)
    for process in loops:
        if process.wait(60):
            sys.exit(f"a loop ended with {process.returncode}")


def _said(process: subprocess.Popen[bytes], word: str) -> str:
    """What follows the word on the loop's next line."""
    assert process.stdout
    got, _, rest = process.stdout.readline().decode().strip().partition(" ")
    if got != word:
        sys.exit(f"expected {word} of a loop, got {got!r}")
    return rest


def loop(path: str, index: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.peers.task import BATCH_ROWS, Scorer, read_task, steady_rate

    task = read_task(path)
    pa.set_cpu_count(1)
    score = Scorer(task)
    output = Path(task.output)
    output.mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    sys.stdin.readline()
    ends = []
    for number, file in enumerate(task.files[index :: task.workers]):
        writer, rows = None, 0
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(BATCH_ROWS, columns=task.columns, use_threads=False):
                rows += batch.num_rows
                scored = score(batch)
                writer = writer or pq.ParquetWriter(
                    output / f"{index}-{number}.parquet",
                    scored.schema,
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=["_model_version", "_scored_at", *task.keep],
                )
                writer.write_batch(scored)
        if writer:
            writer.close()
        ends.append((time.time(), rows))
    print("done", steady_rate(ends), flush=True)


if __name__ == "__main__":
    main() if len(sys.argv) == 2 else loop(sys.argv[1], int(sys.argv[2]))
