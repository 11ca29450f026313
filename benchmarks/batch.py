"""The batch job beside its peers, in one run, with interleaved rounds.

    python -m benchmarks.batch [--only flights] [--rows N] [--peers raw,triform] [--rounds 3] [--plot docs/img] [--markdown FILE]
    python -m benchmarks.batch --flat       memory and time from 1M to 20M rows and from 1 to 20 files; resuming a finished run
    python -m benchmarks.batch --profile    where the time of one part goes

    data set -> each round, each way: a fresh process tree, measured -> answers held against the first's -> medians -> table

Rows/s and `s` count from the moment a way has its libraries, workers and model: the raw loops all ready and warm; our first
part begun (by its file, see `peers/triform_job.py`); Ray Data's first actor ready, what it has read by then given to it; Spark's
workers warm. They end with the write, ours with its checks and the commit. `steady` leaves out the first file of each worker and
what comes after the last: Ray's own actors still start beside the first ones. `wall s` is the whole program. `CPU s / M` are the
CPU seconds of all processes per million rows in the span of `s`, `whole` in the whole program. `MB` are peaks of resident memory:
of the largest process that holds rows, of all these, of all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import flat, stages
from benchmarks.datasets import DATA_SETS, DataSet
from benchmarks.environments import environment
from benchmarks.plot import bars
from benchmarks.processes import Usage, measured
from benchmarks.report import Report

WORKERS = 2
SPARK = ["pyspark==4.3.0", "pandas==3.1.1", "pyarrow==26.0.1", "onnxruntime==1.31.1"]


class Way(NamedTuple):
    """`python` makes the environment that the way runs in; `scores`: the started process itself holds rows."""

    title: str
    module: str
    python: Callable[[Path], str] = lambda _: sys.executable
    scores: bool = False


WAYS = {
    "raw": Way(f"{WORKERS} raw loops (the limit)", "raw"),
    "triform": Way("triform batch job", "triform_job"),
    "ray": Way("Ray Data, the usual way", "ray_data"),
    "spark": Way("PySpark mapInPandas", "spark", lambda root: environment(root / "spark-venv", SPARK), scores=True),
}


class Round(NamedTuple):
    usage: Usage
    sums: Sums


class Sums(NamedTuple):
    """What tells one output from another: rows, and sums over them. `paired` ties each answer to its row's key."""

    rows: int
    keys: int
    answers: float
    paired: float

    def agrees(self, other: Sums) -> bool:
        close = all(abs(a - b) <= 1e-5 * max(1.0, abs(a)) for a, b in zip(self[2:], other[2:], strict=True))
        return self[:2] == other[:2] and close


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names_of(DATA_SETS), default=list(DATA_SETS), help=f"of {', '.join(DATA_SETS)}")
    parser.add_argument("--peers", type=names_of(WAYS), default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--rows", type=int, help="about so many rows, instead of each data set's own number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("build"), help="where data, models and outputs go")
    parser.add_argument("--plot", type=Path, help="also draw PNGs into this folder")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument(
        "--flat", action="store_true", help="memory and time from 1M to 20M rows instead, and what resuming costs"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of one part goes instead")
    options = parser.parse_args()
    report = Report()
    if options.flat:
        flat.run(options.root, report, rows=options.rows or 20_000_000, plot=options.plot)
    elif options.profile:
        for name in options.only:
            stages.run(DATA_SETS[name](options.root, options.rows), report)
    else:
        compare(options, report)
    if options.markdown:
        report.write(options.markdown)


def names_of(known: Sequence[str] | dict[str, object]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        if strangers := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(strangers))}: expected some of {', '.join(known)}")
        return [name for name in known if name in text.split(",")]

    return read


def compare(options: argparse.Namespace, report: Report) -> None:
    rates: dict[str, list[float]] = {name: [] for name in options.peers}
    titles = []
    for name in options.only:
        data = DATA_SETS[name](options.root, options.rows)
        rounds = measure(data, options.peers, options.rounds, options.root)
        tell(data, rounds, report)
        titles.append(name)
        for way, its_rounds in rounds.items():
            rates[way].append(rate(data, its_rounds) if its_rounds else 0.0)
    if options.plot:
        series = {WAYS[way].title: values for way, values in rates.items()}
        bars(options.plot / "batch.png", f"Rows/s on {WORKERS} CPUs, start-up excluded", titles, series, "rows/s")


def measure(data: DataSet, ways: Sequence[str], rounds: int, root: Path) -> dict[str, list[Round]]:
    """Every way once a round. Raises where a way's answers are not those of the first."""
    python = {way: WAYS[way].python(root) for way in ways}
    skipped = {"spark"} if shutil.which("java") is None else set()
    done: dict[str, list[Round]] = {way: [] for way in ways}
    first: Sums | None = None
    for number in range(rounds):
        for way in ways:
            if way in skipped:
                continue
            result = run_way(data, way, python[way], root / "bench/work")
            first = first or result.sums
            if not result.sums.agrees(first):
                sys.exit(f"{data.name}: {way} came to {result.sums}, {ways[0]} to {first}: they compute something else")
            done[way].append(result)
            said = f"{result.usage.seconds:6.2f} s, {result.usage.wall:6.2f} s with start-up"
            print(f"{data.name}, round {number + 1} of {rounds}, {way:8} {said}", flush=True)
    return done


def run_way(data: DataSet, way: str, python: str, work: Path) -> Round:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    task, output = work.absolute() / "task.json", work.absolute() / "output"
    asked = data.task(output, work.absolute() / "result.json", WORKERS)
    task.write_text(json.dumps(asked._asdict()))
    env = os.environ | {"PYTHONPATH": str(Path.cwd()), "PYSPARK_PYTHON": python, "RAY_USAGE_STATS_ENABLED": "0"}
    usage = measured(
        [python, "-m", f"benchmarks.peers.{WAYS[way].module}", str(task)],
        Path(asked.result),
        env=env,
        driver_scores=WAYS[way].scores,
    )
    return Round(usage, sums_of(output, asked.key[0], list(asked.outputs)))


def sums_of(output: Path, key: str, answers: Sequence[str]) -> Sums:
    rows, keys, answered, paired = 0, 0, 0.0, 0.0
    for file in output.rglob("*.parquet"):
        if "dead_letters" in file.parts or any(part.startswith("_") for part in file.relative_to(output).parts):
            continue
        table = pq.read_table(file, columns=[key, *answers], partitioning=None)
        rows += table.num_rows
        keys += pc.sum(table[key]).as_py() or 0
        weight = pc.cast(pc.bit_wise_and(table[key], 1023), pa.float64())
        for name in answers:
            answered += pc.sum(pc.abs(pc.cast(table[name], pa.float64()))).as_py() or 0.0
            paired += pc.sum(pc.multiply(weight, pc.cast(table[name], pa.float64()))).as_py() or 0.0
    return Sums(rows, keys, answered, paired)


def rate(data: DataSet, rounds: Sequence[Round]) -> float:
    return data.rows / statistics.median(r.usage.seconds for r in rounds)


def steady(rounds: Sequence[Round]) -> float:
    """Rows/s without each worker's first file; 0 where the way does not tell."""
    return statistics.median(r.usage.steady or 0.0 for r in rounds)


def tell(data: DataSet, rounds: dict[str, list[Round]], report: Report) -> None:
    """One table: a row for each way, medians over the rounds."""
    rows = []
    reference = rate(data, rounds["raw"]) if rounds.get("raw") else None
    limit = steady(rounds["raw"]) if rounds.get("raw") else None
    for way, its_rounds in rounds.items():
        if not its_rounds:
            rows.append([WAYS[way].title, "not measured: no Java", *[""] * 11])
            continue
        usages = [r.usage for r in its_rounds]

        def median(field: str, usages: Sequence[Usage] = usages) -> float:
            return statistics.median(getattr(usage, field) for usage in usages)

        seconds = [usage.seconds for usage in usages]
        lasting = steady(its_rounds)
        rows.append(
            [
                WAYS[way].title,
                f"{rate(data, its_rounds):,.0f}",
                f"{rate(data, its_rounds) / reference:.2f}" if reference else "",
                f"{(max(seconds) - min(seconds)) / median('seconds'):.0%}",
                f"{lasting:,.0f}" if lasting else "",
                f"{lasting / limit:.2f}" if lasting and limit else "",
                f"{median('seconds'):.1f}",
                f"{median('wall'):.1f}",
                f"{median('cpu') / data.rows * 1e6:.2f}",
                f"{median('cpu_total') / data.rows * 1e6:.2f}",
                f"{median('largest') / 2**20:,.0f}",
                f"{median('scoring') / 2**20:,.0f}",
                f"{median('total') / 2**20:,.0f}",
            ]
        )
    columns = ["way", "rows/s", "of raw", "spread", "steady", "of raw"]
    columns += ["s", "wall s", "CPU s / M", "whole", "MB largest", "MB scoring", "MB tree"]
    report.table(f"{data.title} ({data.rows:,} rows, {len(data.files)} files)", columns, rows)


if __name__ == "__main__":
    main()
