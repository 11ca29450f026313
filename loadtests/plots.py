"""The curves of a load run: numbers in, an SVG file out, drawn as the batch report's are (batch/plots.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from batch.plots import BLUE, GREEN, ORANGE, RED, SKY, blank, drawn

COLOURS: Final = (BLUE, ORANGE, RED, GREEN, SKY)
HEIGHT: Final = 2.6  # inches


class Curve(NamedTuple):
    """`y`: None where nothing is known; the line has a gap there."""

    x: Sequence[float]
    y: Sequence[float | None]


class Look(NamedTuple):
    """How curves are drawn. `steps`: a value holds until the next; `logarithmic`: the upward axis; `whole`: it counts things."""

    across: str
    up: str
    marks: bool = False
    steps: bool = False
    logarithmic: bool = False
    whole: bool = False


@drawn
def curves(named: Mapping[str, Curve], look: Look, marked: float | None = None) -> Figure:
    """A line for each curve. `marked`: where a dotted line stands across, such as when the target was saturated."""
    figure, axes = blank(HEIGHT)
    for (name, curve), colour in zip(named.items(), COLOURS, strict=False):
        y = [float("nan") if value is None else value for value in curve.y]
        style = "steps-post" if look.steps else "default"
        axes.plot(
            curve.x, y, color=colour, label=name, linewidth=1.4, drawstyle=style, marker="o" if look.marks else None, markersize=3
        )
    if marked is not None:
        axes.axvline(marked, color=RED, linewidth=1.2, linestyle=":", label="saturated")
    known = [value for curve in named.values() for value in curve.y if value is not None]
    if look.logarithmic and known and min(known) > 0:
        axes.set_yscale("log")
        axes.set_ylim(top=max(known) * (max(known) / min(known)) ** 0.25 * 1.5)  # room for the legend
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, (max(known, default=0.0) or 1.0) * 1.22)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=look.whole))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel(look.across)
    axes.set_ylabel(look.up)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper left", frameon=False, ncols=4)
    return figure
