"""How a run goes on: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between lines


class RunProgress:
    """Rows, rows/s, parts, dead letters and the time left. Use as a context manager; `advance` after each part."""

    def __init__(self, console: Console, *, rows: int, parts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.rows_total, self.parts_total = rows, parts
        self.rows = self.parts = self.dead = 0
        self._clock = clock
        self._bar: Progress | None = None

    def __enter__(self) -> RunProgress:
        self._started = self._said = self._clock()
        if self.console.is_terminal:
            columns: list[Any] = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("starting Ray and loading the model", total=self.rows_total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int, dead: int, elapsed: float) -> None:
        """A part is done, after `elapsed` seconds. The clock starts with the first part: Ray's start is no measure of speed."""
        if self.parts == 0:
            self._started = self._clock() - elapsed
        self.rows += rows
        self.parts += 1
        self.dead += dead
        if self._bar is not None:
            self._bar.update(self._task, completed=self.rows, description=self.line(with_time_left=False))
        elif self._clock() - self._said >= INTERVAL or self.parts == self.parts_total:
            self._said = self._clock()
            self.console.print(self.line(), highlight=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Since the first part was begun; 0 before one is done."""
        return self._clock() - self._started if self.parts else 0.0

    def line(self, *, with_time_left: bool = True) -> str:
        rate = self.rows / max(self.seconds, 1e-9)
        rows = f"{self.rows:,} of {self.rows_total:,} rows, {rate:,.0f} rows/s"
        said = f"{rows}, part {self.parts} of {self.parts_total}, {self.dead:,} dead letters"
        left = (self.rows_total - self.rows) / rate if rate else 0.0
        return f"{said}, {left:.0f} s left" if with_time_left else said
