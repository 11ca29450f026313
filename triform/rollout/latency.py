"""Latency as shares of runs that take longer than a threshold: a non-inferiority test without any assumption on distributions.

    sketches by window -> stable's quantile q in the windows before -> runs of stable > q, of canary > ratio q + margin -> Counts

"The canary takes at most `ratio` times as long as stable, plus `margin`" means P(canary > ratio q + margin) <= P(stable > q) for
every q. Since q comes from earlier windows, the two shares of a window are those of one comparison of probabilities (evalues.py
with the line p_canary = p_stable), whatever load does to both sides. Sketches know times to 2.2%: where the canary is accused its
threshold is rounded up to the next edge, where it is to be acquitted down, so that rounding never helps either claim.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from triform.rollout.comparison import MEMORY
from triform.rollout.evalues import Counts, Floats, Line
from triform.rollout.windows import STEPS_PER_OCTAVE

EQUAL: Final = Line(1.0, 0.0)
FEWEST: Final = 20.0  # runs of stable that a quantile is taken from


class Exceeding(NamedTuple):
    """Counts of runs beyond the thresholds, [..., windows], and stable's share as the windows before tell it."""

    counts: Counts
    expected: Floats


def exceeding(
    canary: Floats, stable: Floats, first_bin: int, *, quantile: float, ratio: float, margin: float, beyond: bool
) -> Exceeding:
    """From histograms [..., windows, bins] whose first bin is `first_bin`; `margin` in seconds.

    `beyond`: for the claim that the canary is too slow (True) or that it is not (False). Windows before which stable has fewer
    than FEWEST runs count nothing.
    """
    bins = stable.shape[-1]
    above_c, above_s = _above(canary), _above(stable)
    past = np.zeros((*stable.shape[:-2], bins))
    columns = {name: np.zeros(stable.shape[:-1]) for name in ("xc", "nc", "xs", "ns", "p")}
    for t in range(stable.shape[-2]):
        total = past.sum(axis=-1)
        known = total >= FEWEST
        at = np.minimum((np.cumsum(past, axis=-1) < quantile * total[..., None]).sum(axis=-1) + 1, bins)  # its upper edge
        wanted = STEPS_PER_OCTAVE * np.log2(ratio * 2.0 ** ((at + first_bin) / STEPS_PER_OCTAVE) + margin) - first_bin
        limit = np.clip(np.ceil(wanted - 1e-9) if beyond else np.floor(wanted + 1e-9), 0, bins).astype(np.intp)
        share = _at(_above(past[..., None, :])[..., 0, :], at) / np.maximum(total, 1.0)
        values = (_at(above_c[..., t, :], limit), above_c[..., t, 0], _at(above_s[..., t, :], at), above_s[..., t, 0], share)
        for column, value in zip(columns.values(), values, strict=True):
            column[..., t] = np.where(known, value, 0.0)
        past = MEMORY * past + stable[..., t, :]
    return Exceeding(Counts(columns["xc"], columns["nc"], columns["xs"], columns["ns"]), columns["p"])


def _above(histogram: Floats) -> Floats:
    """How many are in bin i or beyond, for i from 0 to the number of bins: those longer than edge i."""
    sums = np.cumsum(histogram[..., ::-1], axis=-1, dtype=np.float64)[..., ::-1]
    return np.concatenate([sums, np.zeros((*sums.shape[:-1], 1))], axis=-1)


def _at(sums: Floats, index: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> Floats:
    taken: Floats = np.take_along_axis(sums, index[..., None], axis=-1)[..., 0]
    return taken
