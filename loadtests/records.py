"""What became of each request, in twenty-odd bytes: Recorder (in each process) -> Collected (from all of them) -> file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

OK: Final = "ok"
REFUSED: Final = "refused"  # 429, RESOURCE_EXHAUSTED: too much was asked for, and that was said
WRONG: Final = "wrong_answer"
TIMEOUT: Final = "timeout"
CONNECTION: Final = "connection"
UNSENT: Final = "unsent"  # all connections were busy until after the end
OTHERS: Final = "other"
MOST: Final = 200  # kinds of outcomes that are told apart
LONGEST: Final = 300  # characters of an example
# By column: the type in `array` and numpy. Times in seconds; `due`: Unix time at which it was to be sent; `late`: until it was
# sent; `waited`: from `due` to the answer's end; `rows`: of the request; the others: places in lists of names.
COLUMNS: Final[Mapping[str, str]] = {"due": "d", "late": "f", "waited": "f", "protocol": "B", "outcome": "B", "rows": "I"}
Columns = dict[str, NDArray[Any]]


class Recorder:
    """Of one process."""

    def __init__(self, protocols: Sequence[str]) -> None:
        self._protocols = {name: number for number, name in enumerate(protocols)}
        self._outcomes: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self._columns = _empty()

    def add(self, due: float, late: float, waited: float, protocol: str, outcome: str, rows: int, told: str = "") -> None:
        """`told`: of what did not go well, why; the first of each outcome is kept."""
        if outcome not in self._outcomes:
            outcome = outcome if len(self._outcomes) < MOST else OTHERS
            self._outcomes.setdefault(outcome, len(self._outcomes))
            self._examples.setdefault(outcome, told[:LONGEST])
        values = (due, late, waited, self._protocols[protocol], self._outcomes[outcome], rows)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def take(self) -> dict[str, Any]:
        """All since the last time, for `Collected.absorb`, as what msgpack can carry."""
        taken, self._columns = self._columns, _empty()
        columns = {name: column.tobytes() for name, column in taken.items()}
        return {"columns": columns, "outcomes": list(self._outcomes), "examples": dict(self._examples)}


class Collected:
    """Of all processes. `outcomes`: names, by the numbers of that column; `examples`: by outcome."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.examples: dict[str, str] = {}
        self._parts: list[Columns] = []

    def absorb(self, taken: Mapping[str, Any]) -> Columns:
        """Adds them; gives them back."""
        self.outcomes += [name for name in taken["outcomes"] if name not in self.outcomes]
        self.examples = {**taken["examples"], **self.examples}
        part = {name: np.frombuffer(taken["columns"][name], kind) for name, kind in COLUMNS.items()}
        numbers = np.array([self.outcomes.index(name) for name in taken["outcomes"]], np.uint8)
        part["outcome"] = numbers[part["outcome"]] if len(part["outcome"]) else part["outcome"]
        self._parts.append(part)
        return part

    def columns(self) -> Columns:
        """All of it, in the order in which it was due."""
        if not self._parts:
            return {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}
        joined = {name: np.concatenate([part[name] for part in self._parts]) for name in COLUMNS}
        order = np.argsort(joined["due"], kind="stable")
        return {name: column[order] for name, column in joined.items()}

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **self.columns())  # type: ignore[arg-type]  # its stub takes them for the option allow_pickle


def load(path: Path) -> Columns:
    """What `Collected.save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in COLUMNS}


def _empty() -> dict[str, array[Any]]:
    return {name: array(kind) for name, kind in COLUMNS.items()}
