"""What the command lines share: results for people or as JSON, errors in one line, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import orjson
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from triform.errors import ConfigurationError, InvalidRequest, TriformError

FAILED = 1
WRONG_USE = 2


def exit_code(error: TriformError) -> int:
    """2 where the command was given something that cannot be right, 1 where what it was asked to do failed."""
    return WRONG_USE if isinstance(error, ConfigurationError | InvalidRequest) else FAILED


def run_app(app: Callable[[], object]) -> None:
    """Runs a command line; one of our errors is told in one line (with `--json` as JSON), and ends it with its exit code."""
    try:
        app()
    except TriformError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(exit_code(error))


def print_json(value: Any) -> None:
    """The value on standard output as indented JSON."""
    content = msgspec.to_builtins(value)
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    sys.stdout.buffer.write(orjson.dumps(content, option=options, default=str) + b"\n")
    sys.stdout.buffer.flush()


def print_error(error: TriformError, *, as_json: bool = False) -> None:
    """One line on standard error; with `as_json` the error's shape on standard output."""
    if as_json:
        print_json({"error": str(error), "code": error.code})
    else:
        message = "\n".join(map(printable, str(error).split("\n")))
        Console(stderr=True, soft_wrap=True).print(f"error: {message} [{error.code}]", style="red", markup=False, highlight=False)


def printable(value: object) -> str:
    """The value's text with control characters escaped: names and reasons are other people's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def make_table(
    *headers: str, rows: Iterable[Iterable[object]], title: str | None = None, unfolded: int = 0, **settings: Any
) -> Table:
    """A table that folds what is too wide (digests are for copying), but for the first `unfolded` columns, and shows text as it
    is, without rich's markup."""
    columns = (Column(Text(printable(h)), overflow="fold", no_wrap=i < unfolded) for i, h in enumerate(headers))
    table = Table(*columns, title=Text(title) if title else None, title_justify="left", **settings)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
