"""Parts -> windows -> a verdict: neighbours together, none lost, and none counted that was not compared."""

from __future__ import annotations

from triform.disagreement import ComparedPart
from triform.rollout.windows import SHADOW, Arm, Shadowed, Sketch, Window
from triform.runs.comparison import DEFAULT, MOST_WINDOWS, Comparison, windows
from triform.runs.folder import RunFolder
from triform.runs.plan import Pinned


def part(number: int, rows: int = 10, disagreed: int = 0) -> ComparedPart:
    arm = Arm(requests=rows, execute={8: Sketch.of([0.01])}, scores=(rows, 0))
    shadowed = Shadowed(requests=rows, rows=rows, disagreed=disagreed)
    return ComparedPart(part=number, windows=(Window(step=SHADOW, seconds=2.0, stable=arm, canary=arm, shadowed=shadowed),))


def test_few_parts_are_a_window_each() -> None:
    made = windows([part(0), part(1)])
    assert [(w.seconds, w.shadowed.rows, w.complete) for w in made] == [(2.0, 10, True)] * 2
    assert windows([]) == ()


def test_many_parts_are_put_together_and_none_is_lost() -> None:
    parts = [part(i, disagreed=i % 2) for i in range(5 * MOST_WINDOWS + 3)]
    made = windows(parts)
    assert len(made) <= MOST_WINDOWS
    assert sum(w.shadowed.rows for w in made) == 10 * len(parts)
    assert sum(w.shadowed.disagreed for w in made) == len(parts) // 2
    assert sum(w.seconds for w in made) == 2.0 * len(parts)
    assert sum(w.stable.execute[8].total for w in made) == len(parts)
    assert all(w.complete and w.reported == w.expected for w in made)


def test_a_part_that_was_not_compared_makes_its_window_incomplete() -> None:
    first, second, third = windows([part(0), None, part(2)])
    assert (first.complete, second.complete, third.complete) == (True, False, True)
    many = windows([*(part(i) for i in range(2 * MOST_WINDOWS)), None])
    assert [w.complete for w in many][-1] is False
    assert all(w.complete for w in many[:-1])


def test_a_window_without_any_part_is_sound() -> None:
    (window,) = windows([None])
    assert window.fault() is None
    assert (window.reported, window.expected) == (0, 1)


def test_other_bins_or_another_version_are_another_comparison() -> None:
    folder = RunFolder("output", "abc")
    names = [
        Comparison(folder, Pinned("m/2", "d2"), DEFAULT).name,
        Comparison(folder, Pinned("m/3", "d3"), DEFAULT).name,
    ]
    assert names[0].startswith("run=abc/_compare/2-")
    assert names[1].startswith("run=abc/_compare/3-")
    assert Comparison(folder, Pinned("m/2", "other"), DEFAULT).name != names[0]
