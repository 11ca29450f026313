"""`python -m batch`: run and verify. Exit codes: 0 done, 1 the job or check failed, 2 wrong use."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import orjson
import typer
from rich.console import Console

from batch import commit, job
from batch.folder import RunFolder, current
from batch.spec import read_spec
from triform.cli.output import exit_code, print_error, print_json
from triform.errors import JobError, StoreError, TriformError
from triform.settings import Settings

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
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Score Parquet files with a model, each row exactly once. Run it again after a crash: it does only what is missing."""
    given = {
        "repository": repository, "model": model, "input": input, "output": output, "key": key, "keep": keep, "actors": actors,
        "cpus": cpus, "gpus": gpus, "provider": provider,
        "max_dead_letters": max_dead_letters, "if_exists": if_exists, "address": address,
    }  # fmt: skip
    console = Console(stderr=json)
    summary = job.run(read_spec(spec, given, Settings.from_env(os.environ)), console)
    if json:
        sys.stdout.buffer.write(orjson.dumps(msgspec.to_builtins(summary, enc_hook=str), option=orjson.OPT_INDENT_2) + b"\n")
    else:
        print_summary(summary, console)


@app.command("current")
def current_run(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="the folder that was given to `run` as --output")],
    json: Annotated[bool, typer.Option("--json", help="print the entry as JSON")] = False,
) -> None:
    """Print the data folder of the run that the output stands for: what a reader should read."""
    now = current(output.absolute())
    if now is None:
        raise JobError(f"{output} stands for no run yet: none was committed")
    data = RunFolder(output.absolute(), now.run).data(committed=True)
    if json:
        print_json({"run": now.run, "previous": now.previous, "committed_at": now.committed_at, "data": str(data)})
    else:
        typer.echo(data)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder: <output>/run=<id>")],
    json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Check a committed run against its manifest: files, digests, counts, keys."""
    folder = folder.absolute()
    checked = commit.verify(RunFolder(folder.parent, folder.name.removeprefix("run=")))
    if json:
        sys.stdout.buffer.write(orjson.dumps({"run": str(folder), "ok": True, "checked": checked}) + b"\n")
    else:
        Console().print("\n".join([*checked, f"ok: {folder}"]), markup=False, highlight=False, soft_wrap=True)


def print_summary(summary: job.Summary, console: Console) -> None:
    """What came of a run, for a person."""
    done = summary.manifest
    rows = [
        ("model", f"{done.pinned.ref} (digest {done.pinned.digest[:12]})"),
        ("rows", f"{done.rows_in:,} in = {done.rows_out:,} answered + {done.rows_dead:,} dead letters"),
        *(("", f"{dead:,} {code}") for code, dead in done.dead.items()),
    ]
    if summary.scored:
        speed = f"{summary.rows_per_second:,.0f} rows/s while scoring ({summary.scoring_seconds:.1f} s)"
        rows.append(("speed", f"{speed}; {summary.seconds:.1f} s with the start of Ray and the commit"))
    rows.append(("output", str(summary.data)))
    if done.dead:
        rows.append(("dead letters", str(summary.folder / "dead_letters")))
    rows.append(("verify", f"python -m batch verify {shlex.quote(str(summary.folder))}"))
    for name, value in rows:  # a table would cut long paths short
        console.print(f"  {name:<14}{value}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: errors in one line, never a traceback."""
    try:
        app(standalone_mode=True)
    except TriformError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(exit_code(error))
    except OSError as error:  # the output cannot be written: full, gone or not ours
        failed = StoreError(f"the output failed: {error}")
        print_error(failed, as_json="--json" in sys.argv)
        sys.exit(exit_code(failed))
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from here", highlight=False)
        sys.exit(130)
