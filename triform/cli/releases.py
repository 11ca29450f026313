"""`triform repo list` and `triform release set|show|log|rollback`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from triform.cli.audit import on_record
from triform.cli.model import Json, Repository, given_repository
from triform.cli.output import make_table, print_json
from triform.errors import AliasNotFound, InvalidRequest
from triform.releases import Canary, Release, ReleaseLog, Shadow, no_such_model
from triform.splitting import KeyRule

repo = typer.Typer(no_args_is_help=True, help="Look into a model repository, and clear it.")
release = typer.Typer(no_args_is_help=True, help="Say which version is stable, and see who said what when.")

Name = Annotated[str, typer.Argument(metavar="MODEL", help="the model's name")]
Reason = Annotated[str, typer.Option(help="why, for the log")]
By = Annotated[str | None, typer.Option("--by", help="who, for the log [user@host]")]


def _log(model: str, repository: str | None) -> ReleaseLog:
    found = given_repository(repository)
    if not found.versions(model):
        raise no_such_model(found, model)
    return ReleaseLog(found, model)


@repo.command("list")
def list_models(repository: Repository = None, json: Json = False) -> None:
    """The models with their versions and what is released."""
    found = given_repository(repository)
    models = [(name, found.versions(name), ReleaseLog(found, name).current()) for name in found.models()]
    if json:
        entries = [{"model": name, "versions": versions, "release": now} for name, versions, now in models]
        print_json({"repository": found.location, "models": entries})
        return
    rows = [(name, ", ".join(map(str, versions)), *(_cells(now) if now else "----")) for name, versions, now in models]
    Console(soft_wrap=True).print(make_table("model", "versions", "stable", "canary", "shadow", "revision", rows=rows))


def _cells(now: Release) -> list[str]:
    canary = f"{now.canary.version} ({100 * now.canary.weight:.4g}%)" if now.canary else "-"
    shadow = f"{now.shadow.version} ({100 * now.shadow.sample:.4g}%)" if now.shadow else "-"
    return [str(now.stable), canary, shadow, str(now.revision)]


@release.command("set")
def set_release(
    model: Name,
    stable: Annotated[int | None, typer.Option(help="the stable version; without it the present one stays")] = None,
    canary: Annotated[int | None, typer.Option(help="a version that gets --weight of the keys; without it there is none")] = None,
    weight: Annotated[float | None, typer.Option(help="0 to 1")] = None,
    key_header: Annotated[str | None, typer.Option(help="the header that keeps a caller on a version")] = None,
    key_column: Annotated[str | None, typer.Option(help="the records' column that does, where there is no such header")] = None,
    shadow: Annotated[
        int | None, typer.Option(help="a version that sees --sample of the requests; without it there is none")
    ] = None,
    sample: Annotated[float | None, typer.Option(help="0 to 1")] = None,
    reason: Reason = "",
    by: By = None,
    expect: Annotated[int | None, typer.Option(help="the revision you looked at: refuse if it is not the latest")] = None,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """Write the next revision, after verifying in full every version it newly names."""
    for version, share, names in (canary, weight, "--canary and --weight"), (shadow, sample, "--shadow and --sample"):
        if (version is None) != (share is None):
            raise InvalidRequest(f"{names} go together")
    key = KeyRule(key_header, key_column) if key_header is not None or key_column is not None else None
    if key is not None and canary is None:
        raise InvalidRequest("--key-header and --key-column are a canary's: name it with --canary")
    asked = {"stable": stable, "canary": canary, "weight": weight, "shadow": shadow, "sample": sample, "reason": reason or None}
    note = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    with on_record("release.set", model, by=by, note=note):
        made = _log(model, repository).set(
            stable=stable,
            canary=Canary(canary, weight, key) if canary is not None and weight is not None else None,
            shadow=Shadow(shadow, sample) if shadow is not None and sample is not None else None,
            reason=reason,
            changed_by=by,
            expect=expect,
        )
    _show([made], json=json)


@release.command()
def show(model: Name, repository: Repository = None, json: Json = False) -> None:
    """The release in force."""
    now = _log(model, repository).current()
    if now is None:
        raise AliasNotFound(f"'{model}' was never released")
    _show([now], json=json)


@release.command()
def log(
    model: Name,
    limit: Annotated[int, typer.Option(min=1, help="how many, the newest first")] = 20,
    repository: Repository = None,
    json: Json = False,
) -> None:
    """The latest revisions, newest first."""
    history = _log(model, repository).history(limit)
    if json:
        print_json(history)
    else:
        _show(history, json=False)


@release.command()
def rollback(model: Name, reason: Reason = "rollback", by: By = None, repository: Repository = None, json: Json = False) -> None:
    """Take a canary or shadow off; without one, make the previous stable version stable again."""
    with on_record("release.rollback", model, by=by, note=reason):
        made = _log(model, repository).rollback(reason=reason, changed_by=by)
    _show([made], json=json)


def _show(releases: list[Release], *, json: bool) -> None:
    if json:
        print_json(releases[0])
        return
    rows = []
    for one in releases:
        stable, canary, shadow, revision = _cells(one)
        who_and_why = f"{one.changed_by}: {one.reason}" if one.reason else one.changed_by
        rows.append((revision, stable, one.previous or "-", canary, shadow, one.changed_at[:16], who_and_why))
    headers = ("rev", "stable", "prev", "canary", "shadow", "at (UTC)", "who and why")
    Console(soft_wrap=True).print(make_table(*headers, rows=rows, unfolded=len(headers) - 1))
