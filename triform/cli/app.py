"""The command line's root: every error becomes one line and an exit code, with `--json` the errors' JSON shape."""

from __future__ import annotations

import logging

import typer

import triform
from triform.cli import audit, doctor, keys, model, prune, releases, rollout
from triform.cli.output import run_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
model.register(app)
releases.repo.command()(prune.prune)
app.add_typer(releases.repo, name="repo")
app.add_typer(releases.release, name="release")
app.add_typer(rollout.rollout, name="rollout")
app.add_typer(keys.keys, name="keys")
app.add_typer(audit.audit, name="audit")
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"triform {triform.__version__}")
        raise typer.Exit


@app.callback()
def root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version")) -> None:
    """Package an ONNX model once; run it as Lambda, on Ray Serve or over Parquet."""


def run() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    run_app(app)
