"""What a committed run was like, on one page of HTML: how fast, where the time went, what came out, what did not, who worked.

    manifest (counts, times by part) ─┬─> page.py: headings, tables ───> <run>/_report.html
    excerpts.py (a bounded sample) ───┴─> plots.py: SVG, inside it ─┘

Everything is read from the run's folder: a report can be made at any time, and made again.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from batch import page
from batch.canary import canarys_share
from batch.excerpts import EXAMPLES, SAMPLE_ROWS, Answer, Sample, examples, sample
from batch.timeline import Timeline, timeline
from triform.errors import ConfigurationError
from triform.runs.commit import RunManifest, committed
from triform.runs.folder import RunFolder
from triform.runs.plan import Plan
from triform.scoring import STAGES, ScoredPart
from triform.stores import durable

NAME: Final = "_report.html"  # no reader looks at names like this
SLOWEST: Final = 20
BARS: Final = 20
BINS: Final = 40
QUANTILES: Final = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "greatest": 1.0}
STAGE_MEANINGS: Final = {
    "read": "the input file into record batches",
    "decode": "record batches into tensors",
    "predict": "ONNX Runtime",
    "encode": "tensors into columns",
    "write": "columns into the part's file, and dead letters",
}


def require_plots() -> ModuleType:
    """`batch.plots`; raises `ConfigurationError` where matplotlib is missing."""
    try:
        return importlib.import_module("batch.plots")
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"a report needs {error.name}: install triform[report]") from error


def write_report(folder: RunFolder, target: Path | None = None) -> str:
    """Writes the report, whole: a reader sees the one before or this one. Returns where.

    `target`: a file in a folder that exists; None: NAME in the run's folder, wherever that is.

    Raises `JobError` for a run that is not committed, `NotReconciled` where its files are gone or damaged,
    `ConfigurationError` where matplotlib is missing.
    """
    page = render(folder)
    if target is not None:
        durable.replace(target, page)
        return str(target)
    name = f"{folder.name}/{NAME}"
    folder.files.replace(name, page)
    return folder.where(name)


def render(folder: RunFolder) -> bytes:
    """The report's HTML."""
    plots = require_plots()
    plan, done = committed(folder)
    timed = [part for part in done.parts if part.elapsed > 0]
    time = timeline(timed)
    sections = [
        *_overview(plan, done, time),
        *_speed(plots, plan, done, timed),
        *_stages(plots, timed),
        *_answers(plots, folder, plan, done),
        *_dead_letters(plots, folder, done),
        *_actors(plots, time, timed),
    ]
    return page.page(f"Run {done.run} of {done.pinned.ref}", sections)


def _overview(plan: Plan, done: RunManifest, time: Timeline) -> Iterator[str]:
    yield page.heading(1, f"{done.pinned.ref}: run {done.run}")
    yield page.paragraph(
        f"{done.rows_in:,} rows in = {done.rows_out:,} answered + {done.rows_dead:,} dead letters"
        + (f" ({done.rows_dead / done.rows_in:.2%})" if done.rows_in else "")
    )
    rows: list[tuple[str, object]] = [
        ("run", done.run),
        ("model", f"{done.pinned.ref} (asked for as {done.model})"),
        ("digest", done.pinned.digest),
        *([("canary", canarys_share(done)), ("its digest", done.split.canary.digest)] if done.split else []),
        ("input", f"{len(plan.files):,} file(s), {len(plan.parts):,} part(s)"),
        ("rows in", done.rows_in),
        ("rows answered", done.rows_out),
        ("dead letters", done.rows_dead),
        ("key", ", ".join(done.key) or "none"),
        ("begun", done.scored_at),
        ("committed", done.committed_at),
    ]
    if time.seconds:
        rows.append(("scored in", f"{_duration(time.seconds)}, by {len(time.lanes):,} worker(s)"))
    yield page.facts("The run", rows)


def _speed(plots: ModuleType, plan: Plan, done: RunManifest, timed: Sequence[ScoredPart]) -> Iterator[str]:
    yield page.heading(2, "Throughput by part")
    if adopted := len(done.parts) - len(timed):
        yield page.paragraph(f"{adopted:,} part(s) were adopted from an earlier attempt: no times.", "note")
    if not timed:
        return
    speeds = [part.rows_in / part.elapsed for part in timed]
    low, median, high = min(speeds), float(np.median(speeds)), max(speeds)
    says = f"{len(timed):,} part(s): the slowest {low:,.0f} rows/s, the median {median:,.0f}, the fastest {high:,.0f}."
    yield page.paragraph(f"{says} One worker scores a part; workers side by side add up.")
    yield page.picture(plots.throughput([p.part for p in timed], speeds, median), f"Rows a second of each part. {says}")
    slowest = sorted(timed, key=lambda p: p.rows_in / p.elapsed)[:SLOWEST]
    shown = "Every part" if len(slowest) == len(timed) else f"The {len(slowest)} slowest parts"
    rows = [
        (p.part, plan.parts[p.part].path, p.rows_in, p.rows_out, p.rows_dead, round(p.elapsed, 3), round(p.rows_in / p.elapsed))
        for p in slowest
    ]
    headers = ("part", "file", "rows", "answered", "dead letters", "seconds", "rows/s")
    yield page.folded(f"{shown}, the slowest first", page.table("Rows in, answered and refused", headers, rows))


def _stages(plots: ModuleType, timed: Sequence[ScoredPart]) -> Iterator[str]:
    yield page.heading(2, "Stage times")
    if not timed:
        yield page.paragraph("No part has times.", "soft")
        return
    yield page.paragraph(
        "Reading and writing have threads of their own beside the one that decodes, predicts and encodes, so the stages of "
        "a part overlap: stacked, they can come to more than the time that the part took."
    )
    seconds = {stage: [part.seconds.get(stage, 0.0) for part in timed] for stage in STAGES}
    total = sum(map(sum, seconds.values())) or 1.0
    says = ", ".join(f"{stage} {sum(values) / total:.0%}" for stage, values in seconds.items())
    yield page.picture(plots.stages([p.part for p in timed], seconds), f"Seconds of each part by stage, stacked. Of all: {says}.")
    if len(timed) > plots.MANY:
        yield page.paragraph(f"A bar is the mean of about {-(-len(timed) // plots.MANY)} neighbouring parts.", "soft")
    rows = [
        (stage, STAGE_MEANINGS[stage], round(sum(values), 3), f"{sum(values) / total:.1%}", round(float(np.median(values)), 4))
        for stage, values in seconds.items()
    ]
    rows.append(("wall time", "of the parts, one after the other", round(sum(p.elapsed for p in timed), 3), "", ""))  # type: ignore[arg-type]
    yield page.table("Seconds, summed over the parts", ("stage", "of what", "seconds", "share", "median of a part"), rows)


def _answers(plots: ModuleType, folder: RunFolder, plan: Plan, done: RunManifest) -> Iterator[str]:
    yield page.heading(2, "Scores")
    if not done.rows_out:
        yield page.paragraph("No row was answered.", "soft")
        return
    taken = sample(folder, plan, done)
    if taken.answers:
        yield page.paragraph(_extent(taken, len(done.parts)))
    for answer in taken.answers:
        yield page.heading(3, answer.name)
        yield from _classes(plots, answer) if answer.values is None else _numbers(plots, answer, answer.values)
    for column in taken.skipped:
        yield page.paragraph(f"Left out: {column}.", "soft")


def _extent(taken: Sample, parts: int) -> str:
    if taken.rows == taken.of:
        return f"All {taken.of:,} answered rows."
    return (
        f"A sample of {taken.rows:,} of {taken.of:,} answered rows, evenly from {taken.parts:,} of {parts:,} part(s); "
        f"at most {SAMPLE_ROWS:,} are read."
    )


def _numbers(plots: ModuleType, answer: Answer, values: NDArray[np.float64]) -> Iterator[str]:
    """A column of quantities; `values` are the finite ones."""
    cells: list[tuple[str, object]] = [("rows", answer.rows), *_not_finite(answer)]
    if len(values):
        with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the end of a float's range
            quantiles = [float(q) for q in np.quantile(values, list(QUANTILES.values()))]
            cells += [*zip(QUANTILES, quantiles, strict=True), ("mean", float(values.mean()))]
        says = f"From {quantiles[0]:.6g} to {quantiles[-1]:.6g}, the median {quantiles[3]:.6g}; {_not_finite_text(answer)}."
        yield page.paragraph(says)
        try:
            with np.errstate(over="raise"):
                counts, edges = np.histogram(values, bins=BINS)
        except (ValueError, FloatingPointError):
            yield page.paragraph("They cannot be drawn: the range is too narrow or too wide for a float.", "soft")
        else:
            yield page.picture(plots.histogram(counts, edges), f"Histogram of the finite values. {says}")
    else:
        yield page.paragraph(f"No finite value: {_not_finite_text(answer)}.")
    names, row = zip(*cells, strict=True)
    yield page.table(f"Values ({answer.kind})", names, [row])


def _not_finite(answer: Answer) -> list[tuple[str, object]]:
    return [("null", answer.null), ("NaN", answer.nan), ("+infinity", answer.above), ("-infinity", answer.below)]


def _not_finite_text(answer: Answer) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in _not_finite(answer) if count) or "none null, NaN or infinite"


def _classes(plots: ModuleType, answer: Answer) -> Iterator[str]:
    """A column of few values or texts."""
    shown = {word or "(empty)": count for word, count in islice(answer.words.items(), BARS)}
    others = sum(answer.words.values()) - sum(shown.values()) + answer.others
    if shown:
        says = "; ".join(f"{name}: {count:,}" for name, count in islice(shown.items(), 5))
        yield page.picture(plots.bars(shown), f"Rows by value, the commonest first. {says}.")
    rows = [*shown.items(), *([("(others)", others)] if others else []), *([("(null)", answer.null)] if answer.null else [])]
    yield page.table(f"Rows by value ({answer.kind})", ("value", "rows"), rows)


def _dead_letters(plots: ModuleType, folder: RunFolder, done: RunManifest) -> Iterator[str]:
    yield page.heading(2, "Dead letters")
    if not done.dead:
        yield page.paragraph("None: every row was answered.")
        return
    shown = dict(islice(done.dead.items(), BARS))
    says = "; ".join(f"{code}: {count:,}" for code, count in shown.items())
    yield page.picture(plots.bars(shown, plots.RED), f"Dead letters by reason. {says}.")
    rows = [(code, count, f"{count / done.rows_in:.3%}") for code, count in done.dead.items()]
    yield page.table("Dead letters by reason", ("code", "rows", "of all rows"), rows)
    found = [(e.file, e.row, e.code, e.reason) for e in examples(folder, done)]
    yield page.table(f"Up to {EXAMPLES} examples of each reason; rows count from 0", ("file", "row", "code", "reason"), found)


def _actors(plots: ModuleType, time: Timeline, timed: Sequence[ScoredPart]) -> Iterator[str]:
    yield page.heading(2, "Actors over time")
    if not time.lanes:
        yield page.paragraph("No part says when it was scored.", "soft")
        return
    parts = sum(map(len, time.lanes.values()))
    if older := len(timed) - parts:
        yield page.paragraph(f"{older:,} part(s) do not say when they were scored: an older version wrote their records.", "note")
    says = f"{len(time.lanes):,} worker(s), at most {time.most_active:,} at once; {parts:,} part(s) in {_duration(time.seconds)}."
    yield page.paragraph(f"{says} A lane is a worker (host and process), a bar a part; times are by each machine's own clock.")
    for pause in time.pauses:
        gone = f"A pause of {_duration(pause.seconds)}, after {_duration(pause.at)}, is left out (dotted line)"
        yield page.paragraph(f"{gone}: nobody worked, as after a kill.", "note")
    yield page.picture(plots.actors(time), f"Each worker's parts over time, and the number of active workers. {says}")
    rows = [
        (worker, len(spans), round(spans[0].start, 3), round(spans[-1].end, 3), round(sum(s.end - s.start for s in spans), 3))
        for worker, spans in islice(time.lanes.items(), plots.LANES)
    ]
    caption = "Workers" if len(rows) == len(time.lanes) else f"The first {len(rows)} of {len(time.lanes):,} workers"
    headers = ("worker", "parts", "first begun (s)", "last done (s)", "busy (s)")
    yield page.folded("The workers in numbers", page.table(caption, headers, rows))


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 120 else str(datetime.timedelta(seconds=round(seconds)))
