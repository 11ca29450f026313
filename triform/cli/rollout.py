"""`triform rollout replay`: a recorded verdict, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from triform.cli.model import Json
from triform.cli.output import FAILED, make_table, print_json
from triform.errors import InvalidRequest
from triform.rollout.evidence import decode
from triform.rollout.evidence import replay as replay_evidence

rollout = typer.Typer(no_args_is_help=True, help="Look into how versions were released.")


@rollout.callback()
def root() -> None:
    """A group, although it has one command."""


@rollout.command()
def replay(
    evidence: Annotated[Path, typer.Argument(metavar="EVIDENCE", help="the evidence of a verdict, as recorded")],
    json: Json = False,
) -> None:
    """Judge the recorded windows again, by the recorded policy; exit code 1 if the verdict is not the recorded one."""
    try:
        content = evidence.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{evidence}: cannot be read ({error.strerror})") from error
    recorded = decode(content, str(evidence))
    replayed = replay_evidence(recorded)
    if json:
        print_json({"same": not replayed.differences, "differences": replayed.differences, "verdict": replayed.verdict})
    else:
        console, verdict = Console(soft_wrap=True), replayed.verdict
        step = f"step {verdict.step + 1} of {len(recorded.policy.steps)}" if verdict.step >= 0 else "shadow"
        of = f"{recorded.model}/{recorded.canary} beside {recorded.stable}, {step}"
        rows = [
            (f.guard, f.says, *map(_number, (f.canary, f.stable, f.against, f.against_at, f.in_favour, f.in_favour_at)))
            for f in verdict.findings
        ]
        headers = ("guard", "says", "canary", "stable", "against", "needs", "in favour", "needs")
        console.print(make_table(*headers, rows=rows, title=f"{verdict.decision}: {of}"))
        for line in (*verdict.reasons, *(f"differs: {d}" for d in replayed.differences)):
            console.print(line, markup=False, highlight=False)
        if not replayed.differences:
            console.print("the recorded verdict, recomputed from its evidence", highlight=False)
    if replayed.differences:
        raise typer.Exit(FAILED)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
