"""Bars for the tables: numbers that people compare are also drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl


def bars(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> None:
    """An SVG with a group of bars for each of `groups`, one bar for each of `series`."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "triform"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        drawn = axes.bar([g + i * width for g in range(len(groups))], values, width, label=name)
        axes.bar_label(drawn, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks([g + width * (len(series) - 1) / 2 for g in range(len(groups))], groups)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
