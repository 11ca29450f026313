"""What a load run came to: records + what was watched -> Result, which is also the JSON file.

A latency is that of a right answer, and counts from when its request was due; what was refused or failed is counted, not timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadtests.driving import Driven
from loadtests.order import Order
from loadtests.records import OK, REFUSED, WRONG, Columns
from loadtests.watching import Seen, Watched

MOMENTS: Final = 240  # at most, in a timeline
SHORTEST: Final = 1.0  # second, of a moment
LATE: Final = 0.05  # seconds: a generator that is later than this with one request in a hundred is told of


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of some requests. `rate`: right answers a second; latencies in milliseconds, None where nothing was answered."""

    requests: int
    rows: int  # of right answers
    ok: int
    refused: int
    wrong: int
    errors: int  # what is none of these
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None

    @property
    def error_rate(self) -> float:
        """Errors and wrong answers, as a share of the requests."""
        return (self.errors + self.wrong) / self.requests if self.requests else 0.0

    @property
    def refused_share(self) -> float:
        return self.refused / self.requests if self.requests else 0.0


class StageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that were due in a stage. `begin`, `seconds`: from the run's start; `offered`: requests a second."""

    begin: float
    seconds: float
    offered: float
    figures: Figures


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of the time, `at` seconds from the start: requests a second, latencies of those that were due in it, and how many
    were out at its end."""

    at: float
    offered: float
    answered: float
    refused: float
    failed: float
    p50_ms: float | None
    p99_ms: float | None
    outstanding: int


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by code, as those count them who took part; None: not asked. The client calls right and wrong answers alike `ok`,
    since the server cannot know. `exact`: whether the server's counters cannot have missed any."""

    client: dict[str, int]
    server: dict[str, int] | None = None
    prometheus: dict[str, int] | None = None
    exact: bool = True

    def differences(self) -> list[str]:
        """Where they do not agree, in words.

        Answers are counted alike to the last one. What the client gave up on (a timeout, a broken connection), the server may
        have answered all the same; what it was refused, something before the server may have refused.
        """
        said = []
        ok, refused = self.client.get(OK, 0), self.client.get(REFUSED, 0)
        lost = sum(self.client.values()) - ok - refused
        for name, counted in ("server", self.server), ("Prometheus", self.prometheus):
            if counted is None:
                continue
            theirs = counted.get(OK, 0)
            if not ok <= theirs <= ok + lost:
                said.append(f"ok: {ok:,} by the client, {theirs:,} by the {name}")
            if sum(counted.values()) > sum(self.client.values()):
                said.append(f"all: {sum(self.client.values()):,} by the client, {sum(counted.values()):,} by the {name}")
        if self.server is not None and self.prometheus is not None and self.server != self.prometheus:
            said.append(f"{self.server} by the server, {self.prometheus} by Prometheus")
        return said


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """How the side that asks did. `late_p99_ms`: how much later than due requests were sent, in the open loop."""

    workers: int
    late_p99_ms: float
    locust_requests: int
    locust_failures: int
    locust_warned: bool


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`began`: Unix time; `seconds`: of the run, until its last answer; `saturated`: when the stage began that the target did not
    keep up with; `examples`: of each outcome but `ok`, what was said."""

    target: str
    title: str
    unit: str
    shape: str
    loop: str
    host: str
    began: float
    seconds: float
    asked: dict[str, float]  # of the order: rate, users, workers, seconds
    total: Figures
    stages: list[StageFigures]
    protocols: dict[str, Figures]
    sizes: dict[int, Figures]
    timeline: list[Moment]
    watched: list[Seen]
    missed_looks: int
    outcomes: dict[str, int]
    examples: dict[str, str]
    counters: Counters
    generator: Generator
    saturated: float | None


def result(
    order: Order, driven: Driven, watched: Watched, counters: Mapping[str, Any], *, target: str, title: str, unit: str, shape: str
) -> Result:
    """`counters`: what `Counters` has beside the client's."""
    records, told = driven.records, driven.generated
    began = told.began
    at, done = records["due"] - began, records["due"] - began + records["waited"]
    seconds = max(order.seconds if told.saturated is None else 0.0, float(done.max(initial=0.0)))
    names = told.outcomes

    def figures(which: NDArray[np.bool_], over: float, answered: int | None = None) -> Figures:
        return _figures({name: column[which] for name, column in records.items()}, names, over, answered)

    stages = []
    for stage in order.stages:
        within = (at >= stage.begin) & (at < stage.end)
        if (told.saturated is not None and stage.begin > told.saturated) or (not within.any() and stage.level):
            break  # the run ended before, or in it
        in_time = (done >= stage.begin) & (done < stage.end) & _is(records, names, OK)
        offered = float(within.sum()) / stage.seconds
        measured = figures(within, stage.seconds, int(in_time.sum()))
        stages.append(StageFigures(begin=stage.begin, seconds=stage.seconds, offered=offered, figures=measured))
    everything = np.ones(len(at), bool)
    outcomes = {name: int(_is(records, names, name).sum()) for name in names}
    late = records["late"] if order.loop == "open" else np.zeros(1, np.float32)
    return Result(
        target=target,
        title=title,
        unit=unit,
        shape=shape,
        loop=order.loop,
        host=order.host,
        began=began,
        seconds=seconds,
        asked={"rate": order.rate, "users": order.users, "workers": order.workers, "seconds": order.seconds},
        total=figures(everything, seconds or 1.0),
        stages=stages,
        protocols={p: figures(records["protocol"] == number, seconds or 1.0) for number, p in enumerate(told.protocols)},
        sizes={int(rows): figures(records["rows"] == rows, seconds or 1.0) for rows in np.unique(records["rows"])},
        timeline=_timeline(records, names, at, done, seconds),
        watched=[msgspec.structs.replace(seen, at=seen.at - began) for seen in watched.seen],
        missed_looks=watched.missed,
        outcomes=outcomes,
        examples={name: text for name, text in told.examples.items() if name != OK},
        counters=Counters(client=client_counters(driven), **counters),
        generator=Generator(
            workers=told.workers,
            late_p99_ms=float(np.quantile(late, 0.99)) * 1e3 if len(late) else 0.0,
            locust_requests=told.locust_requests,
            locust_failures=told.locust_failures,
            locust_warned=told.locust_warned,
        ),
        saturated=told.saturated,
    )


def client_counters(driven: Driven) -> dict[str, int]:
    """Requests by outcome, as `Counters` has them."""
    counted = np.bincount(driven.records["outcome"], minlength=len(driven.generated.outcomes)).tolist()
    client = {OK: 0}
    for name, count in zip(driven.generated.outcomes, counted, strict=True):
        code = OK if name == WRONG else name
        client[code] = client.get(code, 0) + count
    return client


def _is(records: Columns, names: Sequence[str], name: str) -> NDArray[np.bool_]:
    number = names.index(name) if name in names else -1
    found: NDArray[np.bool_] = records["outcome"].astype(np.int16) == number
    return found


def _figures(records: Columns, names: Sequence[str], seconds: float, answered: int | None) -> Figures:
    """`answered`: how many right answers the rate is of, where it is not all of them."""
    right = _is(records, names, OK)
    ok, refused, wrong = (int(_is(records, names, name).sum()) for name in (OK, REFUSED, WRONG))
    p50, p99, p999 = _quantiles(records["waited"][right], (0.5, 0.99, 0.999))
    return Figures(
        requests=len(right),
        rows=int(records["rows"][right].sum()),
        ok=ok,
        refused=refused,
        wrong=wrong,
        errors=len(right) - ok - refused - wrong,
        rate=(ok if answered is None else answered) / seconds,
        p50_ms=p50,
        p99_ms=p99,
        p999_ms=p999,
    )


def _quantiles(waited: NDArray[Any], at: Sequence[float]) -> list[float | None]:
    """In milliseconds."""
    if not len(waited):
        return [None] * len(at)
    return [float(q) * 1e3 for q in np.quantile(waited.astype(np.float64), at)]


def _timeline(records: Columns, names: Sequence[str], at: NDArray[Any], done: NDArray[Any], seconds: float) -> list[Moment]:
    width = max(SHORTEST, seconds / MOMENTS)
    right, refused = _is(records, names, OK), _is(records, names, REFUSED)
    failed = ~right & ~refused
    ended, moments = np.sort(done), []
    for begin in np.arange(0.0, seconds, width):
        due = (at >= begin) & (at < begin + width)
        over = (done >= begin) & (done < begin + width)
        p50, p99 = _quantiles(records["waited"][due & right], (0.5, 0.99))
        out = np.searchsorted(at, begin + width) - np.searchsorted(ended, begin + width)
        moments.append(
            Moment(
                at=float(begin),
                offered=float(due.sum()) / width,
                answered=float((over & right).sum()) / width,
                refused=float((over & refused).sum()) / width,
                failed=float((over & failed).sum()) / width,
                p50_ms=p50,
                p99_ms=p99,
                outstanding=int(out),
            )
        )
    return moments
