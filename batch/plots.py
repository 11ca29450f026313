"""The report's pictures: numbers in, an SVG file out. Needs matplotlib, of which it uses figures without pyplot's global state.

Text in a picture may be a stranger's (classes, reasons): it is shortened and never read as a formula.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from batch.timeline import Timeline

P = ParamSpec("P")
# Okabe and Ito's colours, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
STAGE_COLOURS: Final = (SKY, GREEN, BLUE, ORANGE, RED)
WIDTH: Final = 8.0  # inches
MANY: Final = 60  # bars that can be told apart
LANES: Final = 40  # workers with a name beside their lane
LABEL: Final = 28  # characters
RASTER: Final = 1000  # marks from which on they are drawn as pixels, so that the file stays small
SETTINGS: Final[Any] = {
    "font.family": "sans-serif", "font.size": 9.0, "svg.fonttype": "none", "svg.hashsalt": "triform", "text.parse_math": False,
}  # fmt: skip


def drawn(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """The figure as SVG: the same bytes for the same numbers."""

    @functools.wraps(draw)
    def svg(*args: P.args, **kwargs: P.kwargs) -> bytes:
        buffer = io.BytesIO()
        with mpl.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # the browser has more letters
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
        return buffer.getvalue()

    return svg


@drawn
def throughput(numbers: Sequence[int], speeds: Sequence[float], median: float) -> Figure:
    """Rows a second of each part: bars, or points where they are many."""
    figure, axes = blank(2.6)
    if len(numbers) <= MANY:
        axes.bar(numbers, speeds, color=BLUE, width=0.8)
    else:
        axes.scatter(numbers, speeds, s=8, color=BLUE, linewidths=0, alpha=0.7, rasterized=len(numbers) > RASTER)
    _level(axes, median, RED, f"median {median:,.0f} rows/s", top=max(speeds) or 1.0)
    _part_axis(axes, numbers)
    axes.set_ylabel("rows/s")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


@drawn
def stages(numbers: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Figure:
    """Seconds by stage, stacked: a bar for each part, or the mean of neighbouring parts where they are many."""
    figure, axes = blank(2.8)
    groups = np.array_split(np.arange(len(numbers)), min(len(numbers), MANY))
    at = np.array([numbers[group[0]] for group in groups], dtype=float)
    width = 0.8 * (float(np.diff(at).min()) if len(at) > 1 else 1.0)
    below = np.zeros(len(groups))
    for (stage, values), colour in zip(seconds.items(), STAGE_COLOURS, strict=False):
        height = np.array([np.mean(np.asarray(values)[group]) for group in groups])
        axes.bar(at, height, width, bottom=below, color=colour, label=stage, align="center")
        below += height
    axes.set_ylim(0, (below.max() or 1.0) * 1.22)
    axes.legend(loc="upper right", frameon=False, ncols=len(seconds))
    _part_axis(axes, numbers)
    axes.set_ylabel("seconds of a part")
    return figure


@drawn
def histogram(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> Figure:
    figure, axes = blank(2.2)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rows")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


@drawn
def two_histograms(edges: Sequence[float], first: Sequence[int], second: Sequence[int], names: Sequence[str]) -> Figure:
    """Shares of two versions' rows in the same bins, beside each other; the last bin is NaN, the outer ones are open."""
    figure, axes = blank(2.4)
    at = np.arange(len(first))
    for move, counts, name, colour in zip((-0.2, 0.2), (first, second), names, (BLUE, ORANGE), strict=True):
        axes.bar(at + move, np.asarray(counts) / max(1, sum(counts)), 0.4, color=colour, label=_label(name))
    labels = [f"< {edges[0]:g}", *(f"{edge:g}" for edge in edges), "NaN"]
    axes.set_xticks(at, labels=labels, rotation=90 if len(at) > 12 else 0)
    axes.set_xlabel("score, from")
    axes.set_ylabel("share of rows")
    axes.legend(loc="upper right", frameon=False)
    return figure


@drawn
def disagreement(numbers: Sequence[int], shares: Sequence[float], mean: float) -> Figure:
    """The share of each part's rows in which the versions disagree."""
    figure, axes = blank(2.2)
    axes.scatter(numbers, shares, s=20, color=RED, linewidths=0, alpha=0.7, rasterized=len(numbers) > RASTER)
    _level(axes, mean, BLUE, f"all parts {mean:.3%}", top=max(shares) or 0.01)
    _part_axis(axes, numbers)
    axes.set_ylabel("share of rows")
    return figure


@drawn
def bars(counts: Mapping[str, int], colour: str = BLUE) -> Figure:
    """Counts by name, the first on top."""
    figure, axes = blank(0.55 + 0.28 * len(counts))
    at = range(len(counts))
    axes.barh(at, list(counts.values()), color=colour, height=0.7)
    axes.set_yticks(at, labels=[_label(name) for name in counts])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    for y, count in zip(at, counts.values(), strict=True):
        axes.annotate(f"{count:,}", (count, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, max(counts.values()) * 1.15)
    axes.set_xlabel("rows")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


@drawn
def actors(time: Timeline) -> Figure:
    """A lane for each worker with its parts, and below it how many were at work."""
    lanes = list(time.lanes.items())
    many = sum(map(len, time.lanes.values())) > RASTER
    height = float(np.clip(0.24 * len(lanes), 0.6, 7.0))
    figure = Figure(figsize=(WIDTH, height + 1.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height, 0.9])
    for y, (_, spans) in enumerate(lanes):
        widths = [(span.start, span.end - span.start) for span in spans]
        edge = "none" if many else "white"
        above.broken_barh(widths, (y - 0.4, 0.8), facecolor=BLUE, edgecolor=edge, linewidth=0.5, rasterized=many)
    if len(lanes) <= LANES:
        above.set_yticks(range(len(lanes)), labels=[_label(worker) for worker, _ in lanes])
    else:
        above.set_yticks([])
        above.set_ylabel(f"{len(lanes)} workers")
    above.set_ylim(len(lanes) - 0.4, -0.6)
    at, counts = zip(*time.active, strict=True)
    below.fill_between(at, counts, step="post", color=SKY, rasterized=many)
    below.step(at, counts, where="post", color=BLUE, linewidth=1.0, rasterized=many)
    below.set_ylim(0, time.most_active * 1.15)
    below.set_ylabel("active")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    below.set_xlim(0, time.seconds)
    below.set_xlabel("seconds since the first part was begun" + (", pauses left out" if time.pauses else ""))
    for axes in above, below:
        _plain(axes)
        for pause in time.pauses:
            axes.axvline(pause.at, color=RED, linewidth=1.2, linestyle=":")
    return figure


def blank(height: float) -> tuple[Figure, Any]:
    """A figure of the usual width and its axes. `height`: in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _level(axes: Any, level: float, colour: str, label: str, *, top: float) -> None:
    """A line at the level of all, with room for the legend above the highest value."""
    axes.axhline(level, color=colour, linewidth=1.2, linestyle="--", label=label)
    axes.set_ylim(0, top * 1.22)
    axes.legend(loc="upper right", frameon=False)


def _part_axis(axes: Any, numbers: Sequence[int]) -> None:
    margin = 0.6 + 0.01 * (numbers[-1] - numbers[0])
    axes.set_xlim(numbers[0] - margin, numbers[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.set_xlabel("part")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _label(text: str) -> str:
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= LABEL:
        return text
    return f"{text[: LABEL // 2]}…{text[1 - LABEL // 2 :]}"  # its end tells a worker from others
