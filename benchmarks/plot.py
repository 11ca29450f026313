"""Bars for the tables: numbers that people compare are also drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl


def bars(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> None:
    """An SVG (or PNG, by the name) with a group of bars for each of `groups`, one bar for each of `series`."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "triform"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        drawn = axes.bar([g + i * width for g in range(len(groups))], values, width, label=name)
        axes.bar_label(drawn, labels=[_short(value) for value in values], fontsize=8)
    axes.set_xticks([g + width * (len(series) - 1) / 2 for g in range(len(groups))], groups)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _short(value: float) -> str:
    """Three digits, which fit over a bar: 1.44M, 254k."""
    for size, letter in (1e6, "M"), (1e3, "k"):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def lines(path: Path, title: str, x: Sequence[float], y: Sequence[float], unit: str) -> None:
    """One line over millions of rows, from zero, so that flat looks flat."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(x, y, marker="o")
    axes.set_xlim(0)
    axes.set_ylim(0, max(y) * 1.15)
    axes.set_xlabel("million rows")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
