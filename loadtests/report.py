"""A load run on one page of HTML that stands alone: Result + checks -> batch/page.py (tables) + plots.py (curves, inside it)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from batch import page
from loadtests.plots import Curve, Look, curves
from loadtests.results import LATE, Figures, Result
from loadtests.thresholds import Check

SECONDS: Final = "seconds since the start"
COLUMNS: Final = ("requests", "right", "refused", "errors", "wrong", "right/s", "p50, ms", "p99, ms", "p99.9, ms")
RATES: Final = 12  # points of the curve where the load has no steps


def report(found: Result, checks: Sequence[Check]) -> bytes:
    """The page."""
    drawn = pictures(found)
    sections = [
        *_overview(found, checks),
        *_by_rate(found, drawn),
        *_over_time(found, drawn),
        *_tables(found),
    ]
    return page.page(f"Load: {found.title}, {found.shape}", sections)


def pictures(found: Result) -> dict[str, bytes]:
    """The curves as SVG, by name; those of which nothing is known are left out."""
    return {
        "latency-by-rate": curves(_latency_by_rate(found), Look(_rate_axis(found), "ms", marks=True, logarithmic=True)),
        "rate": curves(_rates(found), Look(SECONDS, "requests/s"), found.saturated),
        "latency": curves(_latencies(found), Look(SECONDS, "ms", marks=True, logarithmic=True), found.saturated),
        "queue": curves(_queues(found), Look(SECONDS, "requests out", whole=True), found.saturated),
        **_watched(found),
    }


def _watched(found: Result) -> dict[str, bytes]:
    if not found.watched:
        return {}
    at = [seen.at for seen in found.watched]
    serving = Curve(at, [seen.serving for seen in found.watched])
    starts = Curve(at, [seen.starts for seen in found.watched])
    named = {found.unit: serving, "cold starts so far": starts}
    drawn = {"serving": curves(named, Look(SECONDS, found.unit, steps=True, whole=True), found.saturated)}
    if any(seen.queue_ms is not None for seen in found.watched):
        waited = {"mean wait for the model": Curve(at, [seen.queue_ms for seen in found.watched])}
        drawn["wait"] = curves(waited, Look(SECONDS, "ms", marks=True), found.saturated)
    return drawn


def _rate_axis(found: Result) -> str:
    return "requests/s offered" if found.loop == "open" else "right answers/s"


def _latency_by_rate(found: Result) -> dict[str, Curve]:
    """Each step is a point; where there are none, moments of like rates are."""
    points: list[tuple[float, float | None, float | None, float | None]]
    if found.shape == "steps":
        given = [(s.offered if found.loop == "open" else s.figures.rate, s.figures) for s in found.stages]
        points = sorted((rate, f.p50_ms, f.p99_ms, f.p999_ms) for rate, f in given if f.p50_ms is not None)
        names = ("p50", "p99", "p99.9")
    else:
        timed = [m for m in found.timeline if m.p50_ms is not None]
        moments = sorted(((m.offered if found.loop == "open" else m.answered, m) for m in timed), key=lambda pair: pair[0])
        size = -(-len(moments) // RATES) or 1
        groups = [moments[i : i + size] for i in range(0, len(moments), size)]
        points = [
            (
                statistics.fmean(rate for rate, _ in group),
                statistics.median(m.p50_ms or 0.0 for _, m in group),
                statistics.median(m.p99_ms or 0.0 for _, m in group),
                None,
            )
            for group in groups
        ]
        names = ("p50", "p99", "")
    across = [point[0] for point in points]
    return {name: Curve(across, [point[i + 1] for point in points]) for i, name in enumerate(names) if name}


def _rates(found: Result) -> dict[str, Curve]:
    at = [m.at for m in found.timeline]
    named = {
        "offered": Curve(at, [m.offered for m in found.timeline]),
        "right answers": Curve(at, [m.answered for m in found.timeline]),
        "refused": Curve(at, [m.refused for m in found.timeline]),
        "failed": Curve(at, [m.failed for m in found.timeline]),
    }
    return {name: curve for name, curve in named.items() if name in ("offered", "right answers", "refused") or any(curve.y)}


def _latencies(found: Result) -> dict[str, Curve]:
    at = [m.at for m in found.timeline]
    return {"p50": Curve(at, [m.p50_ms for m in found.timeline]), "p99": Curve(at, [m.p99_ms for m in found.timeline])}


def _queues(found: Result) -> dict[str, Curve]:
    return {"sent or due, not answered": Curve([m.at for m in found.timeline], [m.outstanding for m in found.timeline])}


def _overview(found: Result, checks: Sequence[Check]) -> Iterator[str]:
    kept = all(check.kept for check in checks)
    yield page.heading(1, f"{found.title}: {found.shape}, {found.loop} loop")
    yield page.paragraph(
        f"{'Kept all limits' if kept else 'Limits were broken'}. {found.total.requests:,} requests in {found.seconds:.1f} s: "
        f"{found.total.ok:,} right answers, {found.total.refused:,} refused, {found.total.errors:,} errors, "
        f"{found.total.wrong:,} wrong.",
        "" if kept else "note",
    )
    yield page.table("Limits", ("limit", "kept", "found"), [(c.name, "yes" if c.kept else "NO", c.said) for c in checks])
    began = datetime.fromtimestamp(found.began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    load = f"{found.asked['users']:.0f} callers" if found.loop == "closed" else f"{found.asked['rate']:g} requests/s"
    rows: list[tuple[str, object]] = [
        ("begun", began),
        ("asked", found.host),
        ("load", f"{load} at most, by {found.generator.workers} Locust process(es)"),
        ("requests sent late, 99th percentile", f"{found.generator.late_p99_ms:.1f} ms"),
        ("requests by Locust's own count", found.generator.locust_requests),
    ]
    yield page.facts("The run", rows)
    if found.saturated is not None:
        yield page.paragraph(f"The target did not keep up with the stage that began at {found.saturated:.0f} s; the run ended.")
    if found.generator.late_p99_ms > LATE * 1e3 or found.generator.locust_warned:
        yield page.paragraph(
            "The side that asks had too little CPU, or all its connections were busy: part of the latencies is its own. "
            "Ask from another machine, or with more --workers.",
            "note",
        )


def _by_rate(found: Result, drawn: dict[str, bytes]) -> Iterator[str]:
    yield page.heading(2, "Latency against rate")
    yield page.paragraph("Of right answers" + (", from the moment that a request was due." if found.loop == "open" else "."))
    yield page.picture(drawn["latency-by-rate"], "Latency by rate; the table below has the numbers of each stage.")
    rows = [(round(s.begin, 1), round(s.offered, 1), *_cells(s.figures)) for s in found.stages]
    yield page.folded("Each stage", page.table("By when requests were due", ("from, s", "offered/s", *COLUMNS), rows))


def _over_time(found: Result, drawn: dict[str, bytes]) -> Iterator[str]:
    yield page.heading(2, "Over time")
    yield page.picture(drawn["rate"], "Requests offered, answered and refused a second.")
    yield page.picture(drawn["latency"], "Latency of the requests that were due in each moment.")
    most = max((m.outstanding for m in found.timeline), default=0)
    yield page.picture(drawn["queue"], f"Requests that were out, at most {most:,}.")
    if "serving" in drawn:
        high, starts = max(seen.serving for seen in found.watched), found.watched[-1].starts
        yield page.picture(drawn["serving"], f"At most {high} {found.unit}; {starts} cold starts.")
    if "wait" in drawn:
        yield page.paragraph(
            "How long requests waited for their model inside the target, as its metrics tell, every few seconds:"
        )
        yield page.picture(drawn["wait"], "Mean wait for the model.")
    if found.missed_looks:
        yield page.paragraph(f"{found.missed_looks:,} looks at the target did not succeed: its curves have gaps.", "note")


def _tables(found: Result) -> Iterator[str]:
    yield page.heading(2, "Requests")
    yield page.table("By protocol", ("protocol", *COLUMNS), [(name, *_cells(f)) for name, f in found.protocols.items()])
    yield page.table("By rows of a request", ("rows", *COLUMNS), [(f"{rows:,}", *_cells(f)) for rows, f in found.sizes.items()])
    outcomes = [(name, count, found.examples.get(name, "")) for name, count in found.outcomes.items()]
    yield page.table("By outcome", ("outcome", "requests", "the first of them"), outcomes)
    counted = {"client": found.counters.client, "server": found.counters.server, "Prometheus": found.counters.prometheus}
    rows = [(name, code, count) for name, counts in counted.items() for code, count in (counts or {}).items()]
    yield page.table("Counted by", ("who", "code", "requests"), rows)


def _cells(figures: Figures) -> list[object]:
    latencies = ["" if value is None else round(value, 2) for value in (figures.p50_ms, figures.p99_ms, figures.p999_ms)]
    return [figures.requests, figures.ok, figures.refused, figures.errors, figures.wrong, round(figures.rate, 1), *latencies]
