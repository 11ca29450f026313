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


class Compared(NamedTuple):
    """For the claim that the canary is too slow, and for the claim that it is not."""

    beyond: Exceeding
    within: Exceeding


def exceeding(canary: Floats, stable: Floats, first_bin: int, *, quantile: float, ratio: float, margin: float) -> Compared:
    """From histograms [..., windows, bins] whose first bin is `first_bin`; `margin` in seconds.

    Windows before which stable has fewer than FEWEST runs count nothing.
    """
    bins = stable.shape[-1]
    above_c, above_s = _above(canary), _above(stable)
    past = np.zeros((*stable.shape[:-2], bins))
    up, down, nc, xs, ns, expected = (np.zeros(stable.shape[:-1]) for _ in range(6))
    for t in range(stable.shape[-2]):
        sums = np.cumsum(past, axis=-1)
        total = sums[..., -1]
        known = total >= FEWEST
        at = np.minimum((sums < quantile * total[..., None]).sum(axis=-1) + 1, bins)  # the upper edge of the quantile's bin
        share = 1.0 - _at(sums, at - 1) / np.maximum(total, 1.0)
        limit = STEPS_PER_OCTAVE * np.log2(ratio * 2.0 ** ((at + first_bin) / STEPS_PER_OCTAVE) + margin) - first_bin
        for column, edge in (up, np.ceil(limit - 1e-9)), (down, np.floor(limit + 1e-9)):
            column[..., t] = known * _at(above_c[..., t, :], np.clip(edge, 0, bins).astype(np.intp))
        nc[..., t], ns[..., t] = known * above_c[..., t, 0], known * above_s[..., t, 0]
        xs[..., t], expected[..., t] = known * _at(above_s[..., t, :], at), share
        past = MEMORY * past + stable[..., t, :]
    return Compared(*(Exceeding(Counts(column, nc, xs, ns), expected) for column in (up, down)))


def _above(histogram: Floats) -> Floats:
    """How many are in bin i or beyond, for i from 0 to the number of bins: those longer than edge i."""
    sums = np.cumsum(histogram[..., ::-1], axis=-1, dtype=np.float64)[..., ::-1]
    return np.concatenate([sums, np.zeros((*sums.shape[:-1], 1))], axis=-1)


def _at(sums: Floats, index: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> Floats:
    taken: Floats = np.take_along_axis(sums, index[..., None], axis=-1)[..., 0]
    return taken
