"""Who scored when, from the parts' records: a lane per worker, and how many were at work at once.

A run that was killed and taken up hours later has a pause in which nobody worked: times are moved together over it, so that the
work stays visible, and the pauses are told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from triform.scoring import ScoredPart

PAUSE_SECONDS: Final = 30.0


class Span(NamedTuple):
    """A part's time, in seconds since the first part was begun, less the pauses before it."""

    part: int
    start: float
    end: float


class Pause(NamedTuple):
    at: float  # on the shortened axis
    seconds: float


class Timeline(NamedTuple):
    lanes: dict[str, list[Span]]  # by worker, the earliest first
    pauses: list[Pause]
    active: list[tuple[float, int]]  # from when on how many were at work
    seconds: float  # on the shortened axis

    @property
    def most_active(self) -> int:
        return max((count for _, count in self.active), default=0)


def timeline(parts: Iterable[ScoredPart]) -> Timeline:
    """Of the parts that have times; empty if none has."""
    timed = sorted((p for p in parts if p.began > 0 and p.elapsed > 0), key=lambda p: p.began)
    if not timed:
        return Timeline({}, [], [], 0.0)
    longest_pause = max(PAUSE_SECONDS, _busy(timed) / 2)
    lanes: dict[str, list[Span]] = {}
    pauses: list[Pause] = []
    origin = reached = timed[0].began
    for part in timed:
        if (gap := part.began - reached) > longest_pause:
            pauses.append(Pause(reached - origin, gap))
            origin += gap
        reached = max(reached, part.began + part.elapsed)
        start = part.began - origin
        lanes.setdefault(part.worker or "unknown", []).append(Span(part.part, start, start + part.elapsed))
    return Timeline(lanes, pauses, _active(lanes.values()), reached - origin)


def _busy(timed: Sequence[ScoredPart]) -> float:
    """The seconds in which anybody worked."""
    busy, reached = 0.0, timed[0].began
    for part in timed:
        end = part.began + part.elapsed
        busy += max(0.0, end - max(reached, part.began))
        reached = max(reached, end)
    return busy


def _active(lanes: Iterable[list[Span]]) -> list[tuple[float, int]]:
    changes = sorted((at, change) for lane in lanes for span in lane for at, change in ((span.start, 1), (span.end, -1)))
    active: list[tuple[float, int]] = []
    count = 0
    for at, change in changes:
        count += change
        if active and active[-1][0] == at:
            active.pop()
        active.append((at, count))
    return active
