"""`triform audit verify`; and how the commands that change something get on record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from triform.audit import Action, audited, open_audit
from triform.audit import verify as verify_log
from triform.cli.model import Json
from triform.cli.output import FAILED, print_json
from triform.errors import ConfigurationError
from triform.releases import whoami
from triform.settings import Settings

audit = typer.Typer(no_args_is_help=True, help="Check the audit log.")


@audit.callback()
def root() -> None:
    """A group, although it has one command."""


@audit.command()
def verify(
    log: Annotated[Path | None, typer.Argument(metavar="[LOG]", help="the audit log [TRIFORM_AUDIT]")] = None,
    contains: Annotated[str | None, typer.Option(help="the head that an earlier check has told: it must still be there")] = None,
    json: Json = False,
) -> None:
    """Follow the chain of hashes from the first line to the last."""
    configured = Settings.from_env(os.environ, audit=str(log) if log else None).audit
    if configured is None:
        raise ConfigurationError("no audit log: name it, or set TRIFORM_AUDIT")
    found = verify_log(Path(configured), contains=contains)
    if json:
        print_json(
            {"ok": not found.faults, "entries": found.entries, "head": found.head, "faults": found.faults, "notes": found.notes}
        )
    else:
        console = Console(soft_wrap=True)
        for line in [*(f"note: {note}" for note in found.notes), *(f"fault: {fault}" for fault in found.faults)]:
            console.print(line, markup=False, highlight=False)
        console.print(f"{'damaged' if found.faults else 'ok'}: {found.entries} entries, head {found.head}", highlight=False)
    if found.faults:
        raise typer.Exit(FAILED)


@contextmanager
def on_record(what: str, target: str, *, by: str | None = None, note: str = "") -> Iterator[None]:
    """Of a command that changes something: TRIFORM_AUDIT, where it is set, says that it was done and how it ended."""
    me = whoami()
    action = Action(who=by or me, what=what, target=target, where=me, note=note)
    with audited(open_audit(Settings.from_env(os.environ).audit), action):
        yield
