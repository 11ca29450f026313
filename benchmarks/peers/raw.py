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
        _expect(process, b"ready\n")
    begin = time.time()
    for process in loops:
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in loops:
        _expect(process, b"done\n")
    finish(read_task(task), begin=begin, end=time.time())
    for process in loops:
        if process.wait(60):
            sys.exit(f"a loop ended with {process.returncode}")


def _expect(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout
    if (got := process.stdout.readline()) != line:
        sys.exit(f"expected {line!r} of a loop, got {got!r}")


def loop(path: str, index: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.peers.task import BATCH_ROWS, Scorer, read_task

    task = read_task(path)
    pa.set_cpu_count(1)
    score = Scorer(task)
    output = Path(task.output)
    output.mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    sys.stdin.readline()
    for number, file in enumerate(task.files[index :: task.workers]):
        writer = None
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(BATCH_ROWS, columns=task.columns, use_threads=False):
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
    print("done", flush=True)


if __name__ == "__main__":
    main() if len(sys.argv) == 2 else loop(sys.argv[1], int(sys.argv[2]))
