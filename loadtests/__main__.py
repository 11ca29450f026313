"""`python -m loadtests --target serve --shape steps`: starts what it needs on loopback, asks, writes a report, and stops.

    options.py -> run.py -> flights.py: example and batch output -> targets.py -> driving.py -> results.py -> files, exit code

Exit codes: 0 all limits were kept, 1 one was not, or the run failed, 2 wrong use.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtests.credentials import read_secret
from loadtests.options import Options, check
from loadtests.thresholds import FILE
from triform.cli.output import FAILED, run_app

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # they may show locals


@app.command()
def load(
    target: Annotated[str, typer.Option(help="serve or lambda; with --host, whose limits count")] = "serve",
    shape: Annotated[str, typer.Option(help="How load goes over time: steps, spike, soak, diurnal or burst")] = "steps",
    loop: Annotated[str, typer.Option(help="open: requests arrive by chance; closed: callers wait for their answers")] = "open",
    rate: Annotated[float | None, typer.Option(help="Requests a second at the most, in the open loop; else by target")] = None,
    users: Annotated[int, typer.Option(help="Callers at the most, in the closed loop")] = 32,
    seconds: Annotated[float | None, typer.Option(help="How long; else by shape")] = None,
    workers: Annotated[int, typer.Option(help="Processes that ask")] = 1,
    protocols: Annotated[
        str | None, typer.Option(help="Of oip-json, oip-binary, oip-grpc, tfs, separated by commas; else all")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The URL of a deployment, which is asked in place of one started here")] = None,
    grpc: Annotated[str | None, typer.Option(help="Its gRPC: name:port, https://name:port for TLS")] = None,
    grpc_metadata: Annotated[
        list[str] | None, typer.Option(help="name=value that goes with each gRPC request; several times for several")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="The URL of its page for Prometheus, whose counters are compared")] = None,
    prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Also start Debian's Prometheus, and compare its counters")
    ] = False,
    auth: Annotated[str, typer.Option(help="none, key, jwt, api-key, signed or sigv4")] = "none",
    secret_file: Annotated[
        Path | None, typer.Option(help="The file with the secret; else LOADTEST_SECRET in the environment")
    ] = None,
    region: Annotated[str | None, typer.Option(help="AWS region for sigv4; else what botocore finds")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send a secret in plain text over a network")] = False,
    thresholds: Annotated[Path, typer.Option(help="A TOML file with the limits to keep")] = FILE,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take")] = 30.0,
    replicas: Annotated[str, typer.Option(help="Of Ray Serve started here: a number, or MIN:MAX to scale between")] = "1:2",
    environments: Annotated[int, typer.Option(help="Of the local Lambda, at the most")] = 4,
    example: Annotated[Path, typer.Option(help="Where the flights example is, or will be built")] = Path("build/flights"),
    output: Annotated[Path, typer.Option(help="The folder for the report: .html, .json and .xml")] = Path("build/load"),
    pictures: Annotated[Path | None, typer.Option(help="A folder for the curves as SVG files, too")] = None,
    seed: Annotated[int, typer.Option(help="Of what is left to chance")] = 0,
) -> None:
    """Ask a target for real flights, check every answer, and hold the run against its limits."""
    console = Console()
    given = Options(
        target=target,
        shape=shape,
        loop=loop,
        rate=rate,
        users=users,
        seconds=seconds,
        workers=workers,
        protocols=protocols,
        host=host,
        grpc=grpc,
        grpc_metadata=tuple(grpc_metadata or ()),
        metrics=metrics,
        prometheus=prometheus,
        auth=auth,
        region=region,
        insecure=insecure,
        thresholds=thresholds,
        timeout=timeout,
        replicas=replicas,
        environments=environments,
        example=example,
        output=output,
        pictures=pictures,
        seed=seed,
    )
    checked, secret = check(given), read_secret(auth, secret_file, os.environ)
    from loadtests.run import run  # after the options were checked: it imports Ray, pyarrow and matplotlib

    if not run(given, checked, secret, console):
        raise typer.Exit(FAILED)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started here ends as after Ctrl-C
    run_app(app)


if __name__ == "__main__":
    main()
