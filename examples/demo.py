"""`make demo`: builds the flights example, scores all 336,776 flights with the batch job, asks a local Lambda for 1,000 of them,
and shows what came out.

python -m examples.demo [--to build/flights]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from batch import job
from batch.cli import print_summary
from batch.spec import JobSpec
from examples.flights import build, evaluate, online
from triform.errors import TriformError
from triform.runs import commit
from triform.runs.folder import RunFolder

QUERY = """SELECT carrier, count(*) AS flights, round(avg(p_late), 3) AS expected_late
FROM read_parquet('{data}/*.parquet') GROUP BY carrier ORDER BY expected_late DESC LIMIT 5"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("build/flights"), help="where data, models and output go")
    folder = parser.parse_args().to
    console = Console()
    try:
        demo(folder, console)
    except TriformError as error:
        sys.exit(f"error: {error} [{error.code}]")


def demo(folder: Path, console: Console) -> None:
    started = time.perf_counter()
    step(console, "1. Build: Parquet by month, two versions of the model, a release (stable = 1)")
    build.build(folder)
    step(console, "2. Score every flight: python -m batch run --model flight-delay@stable --key id ...")
    spec = JobSpec(
        repository=str(folder / "repository"),
        model="flight-delay@stable",
        input=(str(folder / "input"),),
        output=str(folder / "scored"),
        key=("id",),
        keep=("carrier", "origin", "dest"),
        if_exists="replace",  # a demo that is run again after the example changed takes the new run
    )
    summary = job.run(spec, console)
    print_summary(summary, console)
    step(console, "3. Verify the run: python -m batch verify")
    for line in commit.verify(RunFolder(folder.absolute() / "scored", summary.manifest.run)):
        console.print(f"  {line}", highlight=False)
    step(console, "4. How good is it? October to December, which the model has not seen, from the scored output")
    figures = evaluate.evaluate(Path(summary.data), folder / "input")
    console.print("  " + ", ".join(f"{name} {value:g}" for name, value in figures.items()), highlight=False)
    step(console, "5. Query it with anything that reads Parquet, for instance DuckDB")
    query = QUERY.format(data=summary.data)
    console.print(query, highlight=False, soft_wrap=True)
    console.print(query_table(query))
    step(console, "6. Ask for 1,000 of them one by one: a local API Gateway, a real Lambda runtime client, handlers.predict")
    print_online(online.ask(folder, Path(summary.data)), console)
    console.print(f"Done in {time.perf_counter() - started:.0f} s. Everything lies in {folder}.", highlight=False, soft_wrap=True)


def print_online(asked: online.Online, console: Console) -> None:
    p50, p99 = np.quantile(asked.millis, (0.5, 0.99))
    console.print(f"  cold start: ready after {asked.init:.0f} ms, the first answer after {asked.first:.0f} ms", highlight=False)
    console.print(f"  then {len(asked.millis)} requests: p50 {p50:.2f} ms, p99 {p99:.2f} ms", highlight=False)
    furthest = float(np.abs(asked.answers - asked.batch).max())
    told = f"{asked.equal} of {len(asked.batch)} answers of {asked.ref} are the batch output's to the bit"
    if asked.equal < len(asked.batch):
        told += f", the others within the recorded bound (furthest {furthest:.1e})"
    console.print(f"  {told}", highlight=False, soft_wrap=True)
    if not asked.agree:
        raise TriformError(f"Lambda and batch disagree by {furthest:.1e}")


def step(console: Console, title: str) -> None:
    console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)


def query_table(query: str) -> Table:
    """The query's answer, from DuckDB."""
    import duckdb

    answer = duckdb.sql(query)
    table = Table(*answer.columns)
    for row in answer.fetchall():
        table.add_row(*map(str, row))
    return table


if __name__ == "__main__":
    main()
