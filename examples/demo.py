"""`make demo`: builds the flights example, scores all 336,776 flights with the batch job, asks a local Lambda and a local Ray
Serve for 1,000 of them, and shows what came out and how far the three forms agree.

python -m examples.demo [--to build/flights]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from batch import job
from batch.cli import print_summary
from examples.flights import build, evaluate, online, scoring
from examples.flights.serving import LocalServe, local_serve
from infra.local.gateway import local_gateway
from triform.errors import TriformError
from triform.runs import commit
from triform.runs.folder import RunFolder

QUERY = """SELECT carrier, count(*) AS flights, round(avg(p_late), 3) AS expected_late
FROM read_parquet('{data}/*.parquet') GROUP BY carrier ORDER BY expected_late DESC LIMIT 5"""
COLUMNS = ("form", "protocol", "equal bits", "furthest", "bound", "p50, ms", "p99, ms")


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
    with local_serve() as serve:
        step(console, "2. Score every flight: python -m batch run --model flight-delay@stable --key id ...")
        summary = job.run(scoring.spec(folder), console)
        print_summary(summary, console)
        serve.begin(folder / "repository")  # it gets ready meanwhile
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
        step(
            console,
            "6. Ask the online forms for 1,000 of them, one by one: handlers.predict in a local Lambda, ray_apps on Ray Serve",
        )
        console.print(f"  Serve: ready {serve.wait():.1f} s after it was begun, in the batch job's Ray", highlight=False)
        flights = online.choose(folder, Path(summary.data))
        print_agreement(flights, [*ask_lambda(folder, flights, console), *ask_serve(serve, flights)], console)
    console.print(f"Done in {time.perf_counter() - started:.0f} s. Everything lies in {folder}.", highlight=False, soft_wrap=True)


def ask_lambda(folder: Path, flights: online.Flights, console: Console) -> list[online.Asked]:
    environ = {"TRIFORM_REPOSITORY": str((folder / "repository").absolute())}
    with local_gateway("http-v2", environ=environ, max_concurrency=1) as gateway:
        address = gateway.url.removeprefix("http://")
        asked = [ask("Lambda", address, flights) for ask in (online.ask_json, online.ask_binary)]
        console.print(f"  Lambda: ready after {gateway.reports[0].init_ms:.0f} ms, at its first request", highlight=False)
    return asked


def ask_serve(serve: LocalServe, flights: online.Flights) -> list[online.Asked]:
    asked = [ask("Serve", serve.http, flights) for ask in (online.ask_json, online.ask_binary)]
    return [*asked, online.ask_grpc("Serve", serve.grpc, flights)]


def print_agreement(flights: online.Flights, asked: Sequence[online.Asked], console: Console) -> None:
    """Each form's answers beside the batch's. Raises `TriformError` where one lies further off than the package says."""
    console.print(agreement_table(flights, asked))
    bound = flights.manifest.row_independence.tolerance
    told = "exact: equal bits in any company"
    if flights.manifest.row_independence.kind != "exact":
        told = f"close: in other company answers move by {bound.atol:.1e} + {bound.rtol:.1e} * p at most"
    console.print(f"  {flights.manifest.ref} is {told}", highlight=False, soft_wrap=True)
    for one in asked:
        if not one.agrees(flights):
            furthest = one.distances(flights).max()
            raise TriformError(f"{one.form} ({one.protocol}) and batch disagree by {furthest:.1e}, more than the package says")


def agreement_table(flights: online.Flights, asked: Sequence[online.Asked]) -> Table:
    """Of each form and protocol: how many answers are the batch's, how far the others are, and how long a caller waits."""
    table = Table(*COLUMNS)
    total = len(flights.batch)
    table.add_row("batch", "Parquet", "reference", "", "", "", "")
    for one in asked:
        distances = one.distances(flights)
        at = int(distances.argmax())
        p50, p99 = np.quantile(one.millis[1:], (0.5, 0.99))  # the first request opens the connection, and may be a cold start
        equal = f"{one.equal(flights)} of {total}"
        table.add_row(
            one.form, one.protocol, equal, f"{distances[at]:.1e}", f"{flights.bound[at]:.1e}", f"{p50:.2f}", f"{p99:.2f}"
        )
    return table


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
