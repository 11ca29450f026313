"""How a run goes on: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between lines


class RunProgress:
    """Rows, rows/s, parts, dead letters and the time left.

    Use as a context manager; call `advance` after each part. `under_way` tells the rows of parts that are not finished yet;
    a thread looks every second (`every`; None: nobody does but the caller of `tick`).
    """

    def __init__(
        self,
        console: Console,
        *,
        rows: int,
        parts: int,
        under_way: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        every: float | None = 1.0,
    ) -> None:
        self.console = console
        self.rows_total, self.parts_total = rows, parts
        self.rows = self.parts = self.dead = 0
        self._under_way = under_way
        self._clock = clock
        self._every = every
        self._bar: Progress | None = None
        self._first: float | None = None  # when the first row was scored: Ray's start is no measure of speed
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._ticker = threading.Thread(target=self._tick_on, name="batch-progress", daemon=True)

    def __enter__(self) -> RunProgress:
        self._entered = self._said = self._clock()
        if self.console.is_terminal:
            columns: list[Any] = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.line(), total=self.rows_total)
        if self._every is not None:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._ticker.is_alive():
            self._ticker.join()
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int, dead: int, elapsed: float, ago: float = 0.0) -> None:
        """A part is done, after `elapsed` seconds; it was begun `ago` seconds ago, where its record says when."""
        with self._lock:
            begun = max(self._entered, self._clock() - max(elapsed, ago))
            self._first = begun if self._first is None else min(self._first, begun)
            self.rows += rows
            self.parts += 1
            self.dead += dead
            self._show(now=self.parts == self.parts_total)

    def tick(self) -> None:
        """Shows how far it is, if it is time to."""
        with self._lock:
            self._show(now=False)

    def _tick_on(self) -> None:
        while not self._over.wait(self._every):
            self.tick()

    def _show(self, *, now: bool) -> None:
        done = self._rows_now()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self.line(with_time_left=False))
        elif now or self._clock() - self._said >= INTERVAL:
            self._said = self._clock()
            self.console.print(self.line(), highlight=False, soft_wrap=True)

    def _rows_now(self) -> int:
        under_way = self._under_way() if self.parts < self.parts_total else 0
        if under_way and self._first is None:
            self._first = self._clock()
        return min(self.rows + under_way, self.rows_total)

    @property
    def seconds(self) -> float:
        """Since the first row was scored; 0 before."""
        return self._clock() - self._first if self._first is not None else 0.0

    def line(self, *, with_time_left: bool = True) -> str:
        done = self._rows_now()
        if self._first is None:
            return f"starting Ray and loading the model: {self._clock() - self._entered:.0f} s"
        rate = done / max(self.seconds, 1e-9)
        rows = f"{done:,} of {self.rows_total:,} rows, {rate:,.0f} rows/s"
        said = f"{rows}, {self.parts} of {self.parts_total} parts, {self.dead:,} dead letters"
        left = (self.rows_total - done) / rate if rate else 0.0
        return f"{said}, {left:.0f} s left" if with_time_left else said
