"""What the command lines share: results for people or as JSON, errors in one line, exit codes."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import orjson
from rich.console import Console

from triform.errors import ConfigurationError, InvalidRequest, TriformError

FAILED = 1
WRONG_USE = 2


def exit_code(error: TriformError) -> int:
    """2 where the command was given something that cannot be right, 1 where what it was asked to do failed."""
    return WRONG_USE if isinstance(error, ConfigurationError | InvalidRequest) else FAILED


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
        Console(stderr=True, soft_wrap=True).print(f"error: {error} [{error.code}]", style="red", markup=False, highlight=False)
