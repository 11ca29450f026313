"""How a run goes on, where there is no terminal: lines, not too many, that say everything."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from batch.progress import RunProgress


class Run:
    """A run of ten parts of 1,000 rows, on a clock that is moved by hand."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.now = 100.0
        self.under_way = 0
        self.file = io.StringIO()
        console = Console(file=self.file, width=160, force_terminal=terminal, color_system=None)
        self.progress = RunProgress(
            console, rows=10_000, parts=10, under_way=lambda: self.under_way, clock=lambda: self.now, every=None
        )

    def part(self, seconds: float, dead: int = 0) -> None:
        self.now += seconds
        self.progress.advance(1000, dead, seconds)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_line_says_rows_speed_parts_dead_letters_and_time_left() -> None:
    run = Run()
    with run.progress:
        run.now += 30  # Ray starts
        run.part(2, dead=1500)
        assert run.lines == ["1,000 of 10,000 rows, 500 rows/s, 1 of 10 parts, 1,500 dead letters, 18 s left"]
        assert run.progress.seconds == 2


def test_lines_come_every_ten_seconds_and_at_the_end() -> None:
    run = Run()
    with run.progress:
        for _ in range(10):
            run.part(4)
    assert [line.split(",")[-3:-1] for line in run.lines] == [
        [" 3 of 10 parts", " 0 dead letters"],
        [" 6 of 10 parts", " 0 dead letters"],
        [" 9 of 10 parts", " 0 dead letters"],
        [" 10 of 10 parts", " 0 dead letters"],
    ]
    assert run.lines[-1].endswith("0 s left")


def test_no_part_no_line_no_division_by_zero() -> None:
    run = Run()
    with run.progress:
        assert run.progress.seconds == 0
        assert run.progress.line() == "starting Ray and loading the model: 0 s"
    assert run.lines == []


def test_a_terminal_gets_a_bar() -> None:
    run = Run(terminal=True)
    with run.progress:
        run.part(2, dead=7)
    assert "10%" in run.file.getvalue()
    assert "1,000 of 10,000 rows, 500 rows/s, 1 of 10 parts, 7 dead letters" in run.file.getvalue()


@pytest.mark.parametrize("elapsed", [0.0, 1e-12])
def test_a_part_that_took_no_time(elapsed: float) -> None:
    run = Run()
    with run.progress:
        for _ in range(10):
            run.part(elapsed)
    assert "10,000 of 10,000 rows" in run.lines[-1]


def test_rows_of_unfinished_parts_count_and_silence_is_broken_every_ten_seconds() -> None:
    run = Run()
    with run.progress:
        run.now += 10
        run.progress.tick()
        run.now += 5
        run.under_way = 100
        run.progress.tick()  # too soon for a line, but the first row is seen
        run.now += 5
        run.under_way = 1000
        run.progress.tick()
    assert run.lines == [
        "starting Ray and loading the model: 10 s",
        "1,000 of 10,000 rows, 200 rows/s, 0 of 10 parts, 0 dead letters, 45 s left",
    ]
