"""`triform doctor`: what is open here that should not be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from triform.cli.model import Json, Repository
from triform.cli.output import FAILED, print_json, printable
from triform.doctor import examine
from triform.errors import InvalidRequest
from triform.settings import Settings


def doctor(
    url: Annotated[list[str] | None, typer.Option(help="where callers ask; may be given again")] = None,
    args: Annotated[Path | None, typer.Option(help="a JSON file with the arguments of Serve's build_app")] = None,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """Look at settings, files, ports and addresses; exit code 1 where something is open."""
    settings = Settings.from_env(os.environ, **{"repository": repository, **_settings_of(args)})
    findings = list(examine(settings, os.environ, url or ()))
    some_open = any(finding.state == "open" for finding in findings)
    if json:
        print_json({"open": some_open, "findings": findings})
    else:
        console = Console(soft_wrap=True)
        for finding in findings:
            mend = f"; {finding.mend}" if finding.mend and finding.state != "ok" else ""
            line = f"{finding.state:7} {finding.check:10} {finding.told}{mend}"
            console.print(printable(line), markup=False, highlight=False)
    if some_open:
        raise typer.Exit(FAILED)


def _settings_of(args: Path | None) -> dict[str, Any]:
    """Those arguments that are settings."""
    if args is None:
        return {}
    try:
        given = msgspec.json.decode(args.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{args}: expected a JSON object: {error}") from error
    return {name: given[name] for name in Settings.__struct_fields__ if name in given and name != "models"}
