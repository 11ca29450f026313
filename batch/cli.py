"""`python -m batch`: run, verify, current and report.

Exit codes: 0 done, 1 the job or check failed and the same command goes on, 2 wrong use, 3 another driver holds the lease, 4 too
many dead letters. Of several partitions, the first that failed decides.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table

from batch import job
from batch import report as reports
from batch.canary import canarys_share
from batch.metrics import published
from batch.nightly import Done, run_all
from batch.spec import read_spec
from triform.cli.output import exit_code, make_table, print_error, print_json, printable
from triform.errors import JobError, LeaseHeld, StoreError, TooManyDeadLetters, TriformError
from triform.repository import Ref
from triform.runs import commit
from triform.runs.folder import RunFolder
from triform.runs.pointer import current
from triform.settings import Settings
from triform.stores.files import open_files

EXIT_CODES: Final = {LeaseHeld.code: 3, TooManyDeadLetters.code: 4}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    spec: Annotated[
        Path | None, typer.Argument(help="a TOML file with these options as keys; options given here override it")
    ] = None,
    repository: Annotated[str | None, typer.Option(help="the model repository")] = None,
    model: Annotated[str | None, typer.Option(help="name, name@stable or name/3")] = None,
    input: Annotated[list[str] | None, typer.Option(help="a Parquet file, folder or glob; may be given again")] = None,
    output: Annotated[str | None, typer.Option(help="the folder that gets run=<id>/")] = None,
    key: Annotated[list[str] | None, typer.Option(help="a key column; keys are kept and must be unique")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="a column to carry over into the output")] = None,
    actors: Annotated[str | None, typer.Option(help="N or MIN:MAX; without it as many as fit")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs of an actor; without it the model's threads")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of an actor, e.g. 0.25")] = None,
    provider: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or auto")] = None,
    max_dead_letters: Annotated[float | None, typer.Option(help="the share of rows that may be refused [0.01]")] = None,
    if_exists: Annotated[str | None, typer.Option(help="fail or replace, where the output stands for another run [fail]")] = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster: auto, host:port or ray://host:port; without it one is started here")
    ] = None,
    partition: Annotated[
        list[str] | None, typer.Option(help="only that folder of the input: month=2013-12; month alone with --from and --to")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="the first value of a range of partitions")] = None,
    last: Annotated[str | None, typer.Option("--to", help="the last one")] = None,
    lease: Annotated[float | None, typer.Option(help="seconds without a sign of life after which another may take over")] = None,
    pushgateway: Annotated[str | None, typer.Option(help="address of a Pushgateway that is told what came of it")] = None,
    cloudwatch: Annotated[str | None, typer.Option(help="namespace in CloudWatch that is told what came of it")] = None,
    compare: Annotated[
        str | None, typer.Option(help="another version of the model, 2 or canary: what it would have answered is compared")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="a rollout.toml by which the comparison is judged")] = None,
    split: Annotated[
        bool | None,
        typer.Option("--split/--no-split", help="each row by the version of its key: stable, or the release's canary"),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="write the report after the commit")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Score Parquet files with a model, each row exactly once. Run it again after a crash: it does only what is missing."""
    given = {
        "repository": repository, "model": model, "input": input, "output": output, "key": key, "keep": keep, "actors": actors,
        "cpus": cpus, "gpus": gpus, "provider": provider, "max_dead_letters": max_dead_letters, "if_exists": if_exists,
        "address": address, "partition": partition, "from": first, "to": last, "lease": lease, "pushgateway": pushgateway,
        "cloudwatch": cloudwatch, "compare": compare, "policy": policy, "split": split,
    }  # fmt: skip
    console = Console(stderr=json)
    if report:
        reports.require_plots()  # said before hours of scoring, not after
    asked = read_spec(spec, given, Settings.from_env(os.environ))
    done = []
    with published(
        Ref.parse(asked.model).model, pushgateway=asked.pushgateway, cloudwatch=asked.cloudwatch, warn=_warn
    ) as telemetry:
        for one in run_all(asked, console, telemetry):
            done.append(one)
            if one.summary is not None and not json:
                print_summary(one.summary, console)
            if one.summary is not None and report:
                report_committed(one.summary, console)
            if one.error is not None and one.partition:
                print_error(one.error)
    failed = [one.error for one in done if one.error is not None]
    if failed and not asked.partition:
        raise failed[0]
    if json:
        print_json(_as_json(done))
    elif len(done) > 1:
        console.print(_table(done))
    if failed:
        raise typer.Exit(_exit_code(failed[0]))


@app.command("current")
def current_run(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="the folder that was given to `run` as --output")],
    json: Annotated[bool, typer.Option("--json", help="print the entry as JSON")] = False,
) -> None:
    """Print the data folder of the run that the output stands for: what a reader should read."""
    files = open_files(output)
    now = current(files)
    if now is None:
        raise JobError(f"{output} stands for no run yet: none was committed")
    folder = RunFolder(files, now.run)
    data = folder.where(folder.data(committed=True))
    if json:
        print_json({"run": now.run, "previous": now.previous, "committed_at": now.committed_at, "data": data})
    else:
        typer.echo(data)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder: <output>/run=<id>")],
    json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Check a committed run against its manifest: files, digests, counts, keys."""
    folder = run_folder(run)
    checked = commit.verify(folder)
    if json:
        sys.stdout.buffer.write(orjson.dumps({"run": folder.location, "ok": True, "checked": checked}) + b"\n")
    else:
        Console().print("\n".join([*checked, f"ok: {folder.location}"]), markup=False, highlight=False, soft_wrap=True)


@app.command("report")
def write_report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder: <output>/run=<id>")],
    output: Annotated[
        Path | None, typer.Option(help="the file to write, in a folder that is there; without it RUN/_report.html")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the file's path as JSON")] = False,
) -> None:
    """Write a committed run's report, a page of HTML with plots: throughput, stage times, scores, dead letters, actors."""
    folder = run_folder(run)
    written = reports.write_report(folder, output.absolute() if output else None)
    if json:
        print_json({"run": folder.location, "report": written})
    else:
        typer.echo(written)


def _warn(message: str) -> None:
    Console(stderr=True).print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _exit_code(error: TriformError) -> int:
    return EXIT_CODES.get(error.code) or exit_code(error)


def _as_json(done: Sequence[Done]) -> Any:
    """The summary of a job; of partitions, a list."""
    if len(done) == 1 and not done[0].partition and done[0].summary is not None:
        return msgspec.to_builtins(done[0].summary)
    return [
        {"partition": one.partition, "summary": msgspec.to_builtins(one.summary), "code": one.error.code if one.error else "ok"}
        for one in done
    ]


def _table(done: Sequence[Done]) -> Table:
    rows = [
        (one.partition, f"{one.summary.manifest.rows_in:,}", f"{one.summary.manifest.rows_dead:,}", "done")
        if one.summary
        else (one.partition, "", "", one.error.code if one.error else "")
        for one in done
    ]
    return make_table("partition", "rows", "dead letters", "", rows=rows)


def run_folder(location: str) -> RunFolder:
    """The run at `<output>/run=<id>`, a path or s3://bucket/..."""
    output, _, name = location.rstrip("/").rpartition("/")
    if location.startswith("s3://"):
        return RunFolder(output, name.removeprefix("run="))
    path = Path(location).absolute()
    return RunFolder(path.parent, path.name.removeprefix("run="))


def report_committed(summary: job.Summary, console: Console) -> None:
    """Writes the report of a run that is done; a report that fails does not make the run fail."""
    try:
        written = reports.write_report(run_folder(summary.folder))
        console.print(f"report: {written}", markup=False, highlight=False, soft_wrap=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the rows are committed
        _warn(printable(f"the run is committed, but its report failed: {error}"))


def print_summary(summary: job.Summary, console: Console) -> None:
    """What came of a run, for a person."""
    done = summary.manifest
    rows = [
        ("model", f"{done.pinned.ref} (digest {done.pinned.digest[:12]})"),
        *([("canary", canarys_share(done))] if done.split else []),
        ("rows", f"{done.rows_in:,} in = {done.rows_out:,} answered + {done.rows_dead:,} dead letters"),
        *(("", f"{dead:,} {code}") for code, dead in done.dead.items()),
    ]
    if summary.scored:
        speed = f"{summary.rows_per_second:,.0f} rows/s while scoring ({summary.scoring_seconds:.1f} s)"
        rows.append(("speed", f"{speed}; {summary.seconds:.1f} s with the start of Ray and the commit"))
    rows.append(("output", summary.data))
    if done.dead:
        rows.append(("dead letters", f"{summary.folder}/dead_letters"))
    rows.append(("report", f"python -m batch report {shlex.quote(summary.folder)}"))
    rows.append(("verify", f"python -m batch verify {shlex.quote(summary.folder)}"))
    if (compared := summary.compared) is not None:
        share = f" ({compared.disagreed / compared.rows:.3%})" if compared.rows else ""
        told = f"{compared.disagreed:,} of {compared.rows:,} rows disagree with {compared.candidate.ref}{share}"
        rows.append(("compared", f"{told}; as a shadow: {compared.decision}"))
        rows += [("", f"{parts:,} part(s) not compared: {why}") for why, parts in compared.faults.items()]
        rows.append(("", compared.report))
        here = not compared.evidence.startswith("s3://")
        rows.append(("evidence", f"triform rollout replay {shlex.quote(compared.evidence)}" if here else compared.evidence))
    for name, value in rows:  # a table would cut long paths short
        console.print(f"  {name:<14}{value}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: errors in one line, never a traceback."""
    try:
        app(standalone_mode=True)
    except TriformError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(_exit_code(error))
    except OSError as error:  # the output cannot be written: full, gone or not ours
        failed = StoreError(f"the output failed: {error}")
        print_error(failed, as_json="--json" in sys.argv)
        sys.exit(exit_code(failed))
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from here", highlight=False)
        sys.exit(130)
