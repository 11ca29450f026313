"""The exception tree: what the module's docstring draws is what there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

from triform import errors
from triform.errors import InvalidInput, TriformError, by_code


def _tree(kind: type[TriformError] = TriformError, depth: int = 0) -> Iterator[tuple[int, str, str]]:
    yield depth, kind.__name__, kind.code
    for child in kind.__subclasses__():
        yield from _tree(child, depth + 1)


def _drawn() -> list[tuple[int, str, str]]:
    """The docstring's tree as (depth, class, code); its first line is the root."""
    lines = re.findall(r"^    ([│ ]*(?:[├└]── )?)(\w+) +\S.*? {2,}(\w+)$", str(errors.__doc__), re.MULTILINE)
    return [(len(indent) // 4, name, code) for indent, name, code in lines]


def test_the_docstring_draws_the_tree() -> None:
    assert _drawn() == list(_tree())


def test_every_error_class_is_in_the_tree() -> None:
    defined = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)}
    assert defined == {name for _, name, _ in _tree()}


def test_a_code_names_one_class() -> None:
    codes = [code for _, _, code in _tree()]
    assert len(codes) == len(set(codes))
    assert {by_code(code).__name__ for code in codes} == {name for _, name, _ in _tree()}
    assert all(by_code(code).code == code for code in codes)
    assert by_code("of a later version") is TriformError


@pytest.mark.parametrize("name", [name for _, name, _ in _tree()])
def test_statuses_tell_whose_fault_it_is(name: str) -> None:
    """A client's mistake is never a 5xx, and what a client cannot mend is never a 4xx."""
    kind = getattr(errors, name)
    # RunFailed: their rows made it fail; Overloaded: they came too many at once
    whom = (errors.Unauthenticated, errors.Forbidden)
    clients = (errors.InvalidRequest, errors.NotFound, errors.Conflict, errors.RunFailed, errors.Overloaded, *whom)
    theirs = issubclass(kind, clients) and kind is not errors.RowsNotKept
    assert (400 <= kind.http_status < 500) == theirs
    assert kind.grpc_status.isupper()
    assert not (kind.retryable and kind.http_status in (400, 404, 422))


def test_invalid_input_says_where() -> None:
    error = InvalidInput("too large", input="x", row=3)
    assert (str(error), error.input, error.row) == ("too large", "x", 3)
