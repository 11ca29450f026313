"""Whether memory stays flat and time linear as rows and files grow, and what it costs to run a finished job again.

One actor, so that one process's memory and one process's time are seen. The rows are the flights, again and again.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.datasets import FLIGHTS, ROW_GROUP, DataSet, flights
from benchmarks.plot import lines
from benchmarks.processes import Usage, measured
from benchmarks.report import Report

FILES = 20
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
RESUMES = 3


class Case(NamedTuple):
    files: list[Path]
    rows: int
    usage: Usage


def run(root: Path, report: Report, *, rows: int, plot: Path | None) -> None:
    data = flights(root, None)
    folder = root / f"bench/flat-{rows}"
    if not folder.exists():
        make(folder, data, rows)
    work = root / "bench/work"
    shares = [sorted((folder / "many").glob("*.parquet"))[: round(FILES * share)] for share in SHARES]
    cases = [score(data, files, work) for files in [*shares, [folder / "one.parquet"]]]
    tell(cases, report)
    resume(data, shares[-1], work, report)
    if plot:
        grown = cases[: len(SHARES)]
        millions = [case.rows / 1e6 for case in grown]
        lines(plot / "batch-time.png", "Time against rows, one actor", millions, [c.usage.seconds for c in grown], "seconds")
        memory = [c.usage.largest / 2**20 for c in grown]
        lines(plot / "batch-memory.png", "Peak memory of the scoring process", millions, memory, "MB")


def make(folder: Path, data: DataSet, rows: int) -> None:
    """The flights repeated to `rows` rows: in one file, and in 20."""
    print(f"making {folder}", flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "many").mkdir(parents=True)
    year = pa.concat_tables([pq.read_table(file, partitioning=None) for file in data.files]).slice(0, 10 * FLIGHTS)
    each = rows // FILES
    with pq.ParquetWriter(unfinished / "one.parquet", year.schema, compression="zstd") as one:
        for i in range(FILES):
            at = i * each % (year.num_rows - each)
            ids = pa.array(range(i * each, (i + 1) * each), pa.int64())
            some = year.slice(at, each).set_column(0, year.schema.field("id"), ids)
            pq.write_table(some, unfinished / f"many/{i:02}.parquet", compression="zstd", row_group_size=ROW_GROUP)
            one.write_table(some, row_group_size=ROW_GROUP)
    unfinished.rename(folder)


def score(data: DataSet, files: list[Path], work: Path) -> Case:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    task = data._replace(files=[file.absolute() for file in files]).task(
        work.absolute() / "output", work.absolute() / "result.json", 1
    )
    (work / "task.json").write_text(json.dumps(task._asdict()))
    command = [sys.executable, "-m", "benchmarks.peers.triform_job", str(work / "task.json")]
    usage = measured(command, Path(task.result), env=os.environ | {"PYTHONPATH": str(Path.cwd())}, timeout=600.0)
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    print(f"{rows:,} rows in {len(files)} file(s): {usage.seconds:.1f} s, {usage.largest >> 20} MB", flush=True)
    return Case(files, rows, usage)


def tell(cases: Sequence[Case], report: Report) -> None:
    per_million = [case.usage.seconds / case.rows * 1e6 for case in cases]
    usual = per_million[len(SHARES) - 1]
    report.table(
        "Memory and time as rows and files grow, one actor",
        ["rows", "files", "s", "s / M rows", "of the largest's", "CPU s / M rows", "MB, scoring process", "MB, whole tree"],
        [
            [
                f"{case.rows:,}",
                str(len(case.files)),
                f"{case.usage.seconds:.1f}",
                f"{each:.2f}",
                f"{each / usual:.2f}",
                f"{case.usage.cpu / case.rows * 1e6:.2f}",
                f"{case.usage.largest / 2**20:,.0f}",
                f"{case.usage.total / 2**20:,.0f}",
            ]
            for case, each in zip(cases, per_million, strict=True)
        ],
    )


def resume(data: DataSet, files: Sequence[Path], work: Path, report: Report) -> None:
    """`python -m batch run` on a run that is committed: beside what Python needs to import the command."""
    output = work.absolute() / "resumed"
    command = [sys.executable, "-m", "batch", "run", "--repository", str(data.repository), "--model", data.package.manifest.ref]
    command += ["--key", "id", "--keep", "carrier", "--max-dead-letters", "0.05", "--output", str(output)]
    for file in files:
        command += ["--input", str(file.absolute())]
    first = timed(command)
    again = [timed(command) for _ in range(RESUMES)]
    help_only = [timed([sys.executable, "-m", "batch", "run", "--help"]) for _ in range(RESUMES)]
    ray = [
        timed([sys.executable, "-c", "import ray; ray.init(include_dashboard=False, log_to_driver=False)"])
        for _ in range(RESUMES)
    ]
    report.table(
        "The same command on a finished run",
        ["", "s"],
        [
            ["the first run", f"{first:.2f}"],
            ["the same command again", f"{statistics.median(again):.2f}"],
            ["for comparison: the command's --help", f"{statistics.median(help_only):.2f}"],
            ["for comparison: Ray's start alone, which the second run does without", f"{statistics.median(ray):.2f}"],
        ],
    )


def timed(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started
