"""How load goes over time: a shape's name and its seconds -> stages of one level each -> when requests are due.

    steps    rising in ten steps; the run ends after the first that the target did not keep up with
    spike    a fifth of the most, then for a fifth of the time all of it, then a fifth again
    soak     all of it, all the time
    diurnal  a day of twenty-four hours, from a tenth at night to all of it at noon
    burst    a little, nothing for half of the time, then all of it: what was let go must start anew

In an open loop the level is of the rate, in a closed one of the number of callers.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from loadtests.order import Stage
from triform.errors import ConfigurationError

STEPS: Final = 10
HOURS: Final = 24
# By shape: the share of the time and the level of each stage.
SHAPES: Final[Mapping[str, tuple[tuple[float, float], ...]]] = {
    "steps": tuple((1 / STEPS, (step + 1) / STEPS) for step in range(STEPS)),
    "spike": ((0.4, 0.2), (0.2, 1.0), (0.4, 0.2)),
    "soak": ((0.1, 1.0),) * 10,
    "diurnal": tuple((1 / HOURS, 0.55 - 0.45 * math.cos(2 * math.pi * (hour + 0.5) / HOURS)) for hour in range(HOURS)),
    "burst": ((0.15, 0.1), (0.5, 0.0), (0.35, 1.0)),
}
# How long each takes unless told otherwise: a burst's pause must outlast what Serve looks back, and Lambda's idle environments.
SECONDS: Final[Mapping[str, float]] = {"steps": 60.0, "spike": 60.0, "soak": 300.0, "diurnal": 120.0, "burst": 90.0}


def stages(shape: str, seconds: float) -> tuple[Stage, ...]:
    """The shape, stretched over so many seconds. Raises `ConfigurationError` for a shape that is none, or no time."""
    if shape not in SHAPES:
        raise ConfigurationError(f"no such shape: {shape!r}; there are {', '.join(SHAPES)}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigurationError(f"seconds: expected more than 0, got {seconds}")
    made, begin = [], 0.0
    for share, level in SHAPES[shape]:
        made.append(Stage(begin, share * seconds, level))
        begin += share * seconds
    return tuple(made)


def arrivals(over: Sequence[Stage], rate: float, chance: random.Random) -> Iterator[float]:
    """When requests are due, in seconds from the start, rising: Poisson, `rate` times the level a second on average.

    Arrivals forget what was before them, so each stage begins anew; and those of several workers, each with its share of the
    rate, are together those of one.
    """
    for stage in over:
        at = stage.begin
        while stage.level:
            at += chance.expovariate(rate * stage.level)
            if at >= stage.end:
                break
            yield at


def level(over: Sequence[Stage], at: float) -> float:
    """The level at a moment, in seconds from the start; 0 once it is over."""
    number = bisect_right([stage.begin for stage in over], at) - 1
    return over[number].level if number >= 0 and at < over[-1].end else 0.0
