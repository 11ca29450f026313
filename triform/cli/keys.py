"""`triform keys new|list|revoke`: the API keys of a key file, which hosts read again when it changes."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer
from rich.console import Console

from triform.api_keys import ApiKey, KeyRing, Role, new_key, read_file
from triform.cli.audit import on_record
from triform.cli.model import Json
from triform.cli.output import make_table, print_json
from triform.errors import ConfigurationError, InvalidRequest, NotFound, StoreError
from triform.package import NAME
from triform.settings import Settings
from triform.stores import durable

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke the API keys of the online forms.")

File = Annotated[Path | None, typer.Option("--file", help="the key file [TRIFORM_API_KEYS_FILE]")]
DAYS = 365.0


@keys.command()
def new(
    role: Annotated[list[str] | None, typer.Option(help="infer or operate; may be given again [infer]")] = None,
    model: Annotated[list[str] | None, typer.Option(help="a model that it is good for; may be given again [every model]")] = None,
    days: Annotated[float, typer.Option(help="until it expires; 0: never")] = DAYS,
    note: Annotated[str, typer.Option(help="whose it is, for the list")] = "",
    file: File = None,
    json: Json = False,
) -> None:
    """Make a key and print it, this once: the file keeps a hash."""
    for name in model or []:
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"--model: {name[:80]!r} is no name of a model")
    if unknown := sorted(set(role or []) - {"infer", "operate"}):
        raise InvalidRequest(f"--role: expected infer or operate, got {unknown[0][:80]!r}")
    if not 0 <= days < 1e5:
        raise InvalidRequest(f"--days: expected a number of days, 0 for ever, got {days:g}")
    now = datetime.now(UTC).replace(microsecond=0)
    roles = cast("list[Role]", role or ["infer"])
    text, kept = new_key(roles, models=model, expires=now + timedelta(days=days) if days else None, created=now, note=note)
    with on_record("keys.new", kept.id, note=note), _changing(_where(file)) as change:
        change(lambda before: [*before, kept])
    if json:
        print_json({"key": text, **_told(kept)})
        return
    sys.stdout.write(f"{text}\n")
    until = f"until {kept.expires:%Y-%m-%d}" if kept.expires else "for ever"
    what = f"{', '.join(sorted(kept.roles))} on {', '.join(sorted(kept.models)) if kept.models else 'every model'}, {until}"
    Console(stderr=True, soft_wrap=True).print(f"key {kept.id}: {what}; it is not shown again", markup=False, highlight=False)


@keys.command("list")
def list_keys(file: File = None, json: Json = False) -> None:
    """The keys of the file: ids, never secrets."""
    now = datetime.now(UTC).timestamp()
    found = read_file(_where(file)).values()
    if json:
        print_json([_told(key) | {"expired": key.expired(now)} for key in found])
        return
    rows = [
        (key.id, ", ".join(sorted(key.roles)), ", ".join(sorted(key.models or {"every"})), _expiry(key, now), key.note)
        for key in found
    ]
    Console(soft_wrap=True).print(make_table("id", "roles", "models", "expires", "note", rows=rows, unfolded=1))


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="the key's id")],
    file: File = None,
) -> None:
    """Remove a key from the file: hosts refuse it from a second later on."""
    with on_record("keys.revoke", key), _changing(_where(file)) as change:
        change(lambda before: [other for other in before if other.id != key])
    Console(stderr=True, soft_wrap=True).print(f"revoked {key}", markup=False, highlight=False)


def _where(file: Path | None) -> Path:
    found = Settings.from_env(os.environ, api_keys_file=str(file) if file else None).api_keys_file
    if found is None:
        raise ConfigurationError("no key file: give --file, or set TRIFORM_API_KEYS_FILE")
    return Path(found)


Change = Callable[[Callable[[list[ApiKey]], list[ApiKey]]], None]


@contextmanager
def _changing(path: Path) -> Iterator[Change]:
    """Holds the file against others who change it; a reader sees it as it was or as it is, and its mode stays."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path} cannot be changed: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = list(read_file(path).values()) if path.exists() else []

        def change(to: Callable[[list[ApiKey]], list[ApiKey]]) -> None:
            after = to(before)
            if len(after) == len(before):
                raise NotFound(f"no such key (there are: {', '.join(key.id for key in before) or 'none'})")
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
            try:
                durable.replace(path, msgspec.json.format(msgspec.json.encode(KeyRing(after)), indent=2) + b"\n", mode=mode)
            except OSError as error:
                raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error

        yield change
    finally:
        os.close(lock)


def _told(key: ApiKey) -> dict[str, Any]:
    return {"id": key.id, "roles": sorted(key.roles), "models": sorted(key.models) if key.models else None} | {
        "expires": key.expires, "created": key.created, "note": key.note,
    }  # fmt: skip


def _expiry(key: ApiKey, now: float) -> str:
    if key.expires is None:
        return "never"
    return f"{key.expires:%Y-%m-%d}{' (expired)' if key.expired(now) else ''}"
