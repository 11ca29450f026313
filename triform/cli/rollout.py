"""`triform rollout start|status|watch|pause|resume|promote|abort|history|evidence|replay`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from triform.cli.audit import on_record
from triform.cli.model import Json, Repository, given_repository
from triform.cli.output import FAILED, make_table, print_json
from triform.cli.releases import By, Name, Reason
from triform.cli.rollout_view import in_words, told, watch_it
from triform.errors import InvalidRequest, VersionNotFound
from triform.releases import no_such_model
from triform.rollout.evidence import Evidence, decode
from triform.rollout.evidence import encode as encode_evidence
from triform.rollout.evidence import replay as replay_evidence
from triform.rollout.machine import Command
from triform.rollout.policy import Policy, read_policy
from triform.rollout_log import Rollout, RolloutLog

rollout = typer.Typer(no_args_is_help=True, help="Release a version step by step, and look into how versions were released.")

Number = Annotated[int | None, typer.Option("--rollout", min=1, help="the number of an earlier one [the latest]")]


@rollout.command()
def start(
    model: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="the version that is to become stable")],
    policy: Annotated[Path | None, typer.Option(help="a rollout.toml; without it the defaults")] = None,
    shadowed: Annotated[
        Path | None, typer.Option(help="the evidence.json of `batch run --compare`, in place of the policy's shadow step")
    ] = None,
    reason: Reason = "",
    by: By = None,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """Verify the version in full, and give it the first step's share. What serves the model judges it, and goes on or back."""
    rules = Policy() if policy is None else read_policy(policy)
    compared = None if shadowed is None else _read(shadowed)
    log = _log(model, repository)
    note = f"version {version}{f', shadowed by {shadowed}' if shadowed else ''}{', ' if reason else ''}{reason}"
    with on_record("rollout.start", model, by=by, note=note):
        made = log.start(rules, version, shadowed=compared, reason=reason, by=by)
    _show(made, json=json)


@rollout.command()
def status(model: Name, number: Number = None, repository: Repository = None, json: Json = False) -> None:
    """Where a rollout is, what was seen of both sides in its step, and the latest verdict."""
    _show(_given(_log(model, repository), number), json=json)


@rollout.command()
def watch(
    model: Name,
    every: Annotated[float, typer.Option(min=0.1, max=60.0, help="seconds between two looks")] = 1.0,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, help="seconds to watch for at most [until the rollout is over]")
    ] = None,
    repository: Repository = None,
) -> None:
    """Follow the latest rollout to its end, live on a terminal; exit code 1 if it does not end with the version promoted."""
    log = _log(model, repository)
    until = time.monotonic() + timeout if timeout is not None else None
    if watch_it(log, _given(log, None), every, until).state.phase != "promoted":
        raise typer.Exit(FAILED)


@rollout.command()
def pause(model: Name, reason: Reason = "", by: By = None, repository: Repository = None, json: Json = False) -> None:
    """Keep the canary at its share. A canary that is clearly worse is rolled back all the same."""
    _command("pause", model, reason, by, repository, json=json)


@rollout.command()
def resume(model: Name, reason: Reason = "", by: By = None, repository: Repository = None, json: Json = False) -> None:
    """Go on after a pause, or after time was up."""
    _command("resume", model, reason, by, repository, json=json)


@rollout.command()
def promote(model: Name, reason: Reason = "", by: By = None, repository: Repository = None, json: Json = False) -> None:
    """Go one step further now, without waiting for what the step asks for; from the last one to stable."""
    _command("promote", model, reason, by, repository, json=json)


@rollout.command()
def abort(model: Name, reason: Reason = "", by: By = None, repository: Repository = None, json: Json = False) -> None:
    """Take the canary off now. Needs nothing that runs, neither the version nor a controller."""
    _command("abort", model, reason, by, repository, json=json)


@rollout.command()
def history(
    model: Name,
    limit: Annotated[int, typer.Option(min=1, help="how many, the newest first")] = 20,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """The latest rollouts of a model, newest first: which version, how it ended, and why."""
    log = _log(model, repository)
    latest = log.latest()
    last = latest.number if latest is not None else 0
    rollouts = [latest] if latest is not None else []
    rollouts += [log.read(number) for number in range(last - 1, max(0, last - limit), -1)]
    if json:
        print_json([told(one) for one in rollouts])
        return
    rows = [
        (
            one.number,
            f"{one.state.canary} beside {one.state.stable}",
            one.state.phase.replace("_", " "),
            one.entries[0].at[:16],
            f"{one.entries[0].by}: {one.state.reason or one.entries[0].reason or '-'}",
        )
        for one in rollouts
    ]
    headers = ("#", "versions", "state", "begun (UTC)", "who and why")
    Console(soft_wrap=True).print(make_table(*headers, rows=rows, unfolded=len(headers) - 1))


@rollout.command()
def evidence(
    model: Name,
    entry: Annotated[int | None, typer.Option(min=0, help="the verdict's entry, as `watch` numbers them [the latest]")] = None,
    number: Number = None,
    repository: Repository = None,
) -> None:
    """Print a verdict with the policy and all windows that it rests on, as JSON for `triform rollout replay`."""
    found = _given(_log(model, repository), number)
    if not found.judged:
        raise InvalidRequest(
            f"rollout {found.number} of '{model}' was not judged yet: nothing that serves the model has reported"
        )
    if entry is not None and entry not in found.judged:
        raise InvalidRequest(
            f"entry {entry} of rollout {found.number} of '{model}' has no verdict; the latest verdict is in {found.judged[-1]}"
        )
    sys.stdout.buffer.write(encode_evidence(found.evidence(found.judged[-1] if entry is None else entry)) + b"\n")
    sys.stdout.buffer.flush()


@rollout.command()
def replay(
    evidence: Annotated[Path, typer.Argument(metavar="EVIDENCE", help="the evidence of a verdict, as recorded")],
    json: Json = False,
) -> None:
    """Judge the recorded windows again, by the recorded policy; exit code 1 if the verdict is not the recorded one."""
    recorded = _read(evidence)
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


def _log(model: str, repository: str | None) -> RolloutLog:
    found = given_repository(repository)
    if not found.versions(model):
        raise no_such_model(found, model)
    return RolloutLog(found, model)


def _read(path: Path) -> Evidence:
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror})") from error


def _given(log: RolloutLog, number: int | None) -> Rollout:
    found = log.latest() if number is None else log.read(number)
    if found is None:
        raise VersionNotFound(f"'{log.model}' has had no rollout: begin one with `triform rollout start {log.model} VERSION`")
    return found


def _command(command: Command, model: str, reason: str, by: str | None, repository: str | None, *, json: bool) -> None:
    log = _log(model, repository)
    with on_record(f"rollout.{command}", model, by=by, note=reason):
        found = _given(log, None)
        log.look(found, command=command, reason=reason, by=by)
    _show(found, json=json)


def _show(found: Rollout, *, json: bool) -> None:
    if json:
        print_json(told(found))
    else:
        Console(soft_wrap=True).print(in_words(found))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
