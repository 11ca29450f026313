"""`triform repo prune`: what the releases and the policy do not keep is shown first, and removed with `--yes`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from triform.cli.audit import on_record
from triform.cli.model import Json, Repository, given_repository
from triform.cli.output import make_table, print_json
from triform.retention import DAY, Outcome, Policy
from triform.retention import prune as prune_model


def prune(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the model's name; without it every model")] = None,
    keep_revisions: Annotated[
        int, typer.Option(help="keep what the last so many revisions name as stable, previous, canary or shadow")
    ] = 10,
    keep_versions: Annotated[int, typer.Option(help="keep the newest so many versions, released or not")] = 1,
    older_than: Annotated[float, typer.Option(metavar="DAYS", help="keep what was published in the last so many days")] = 7.0,
    yes: Annotated[bool, typer.Option("--yes", help="do it; without this nothing is changed")] = False,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """Remove the versions that nothing keeps; show them only, without --yes."""
    policy = Policy(revisions=keep_revisions, versions=keep_versions, days=older_than)
    found = given_repository(repository)
    done = []
    for name in [model] if model else found.models():
        with on_record("repo.prune", name) if yes else nullcontext():
            done.append(prune_model(found, name, policy, dry_run=not yes))
        if not json:
            _show(done[-1], yes=yes)
    if json:
        print_json({"repository": found.location, "dry_run": not yes, "models": [_told(one) for one in done]})
        return
    versions, files, size = (sum(x) for x in zip((0, 0, 0), *map(_sums, done), strict=True))
    what = f"{versions} version{'' if versions == 1 else 's'}, {files} leftover{'' if files == 1 else 's'}, {size:,} bytes"
    then = "" if yes or not (versions or files) else "; nothing was changed: --yes does it"
    Console(soft_wrap=True).print(f"{'removed' if yes else 'would remove'} {what}{then}", markup=False, highlight=False)


def _sums(outcome: Outcome) -> tuple[int, int, int]:
    return len(outcome.gone), len(outcome.leftovers), outcome.bytes


def _show(outcome: Outcome, *, yes: bool) -> None:
    goes = "removed" if yes else "goes"
    rows = [(v.version, f"{v.age_seconds / DAY:.1f}", f"stays: {v.stays}" if v.stays else goes) for v in outcome.verdicts]
    console = Console(soft_wrap=True)
    console.print(make_table("version", "days old", "what becomes of it", rows=rows, title=outcome.model, unfolded=2))
    for leftover in outcome.leftovers:
        console.print(f"{goes}: {leftover.name}, {leftover.size:,} bytes that no version names", markup=False, highlight=False)


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "model": outcome.model,
        "versions": outcome.verdicts,
        "leftovers": [leftover._asdict() for leftover in outcome.leftovers],
        "bytes": outcome.bytes,
    }
