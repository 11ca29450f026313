"""Score shift: the population stability index of canary's scores against concurrent stable's, with bounds for every look.

    counts in fixed bins, of one step -> sums after each window -> PSI -> low, high

PSI = sum (c - s) ln(c / s) over the bins' shares. Times the harmonic number of samples it is chi-square with bins - 1 degrees of
freedom where nothing has shifted (Yurdakul 2018, WMU dissertation 3208), and its root moves like a distance; so the bounds are
(sqrt(PSI) -+ sqrt(quantile / samples))^2 with the chi-square tail of Laurent & Massart (2000, Ann. Stat., lemma 1). No martingale
here, so alpha is split over the looks: alpha / (j (j + 1)) at the j-th window. Rows of one request may well be alike: at most as
many samples as requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from triform.rollout.evalues import Floats
from triform.rollout.policy import ScoreShift
from triform.rollout.windows import Window


class Bounds(NamedTuple):
    """`highest_low`: the highest lower bound after any window. `now`: PSI; None where a side has no rows. `blind`: no shift would
    be seen, whatever the index says."""

    highest_low: float
    high: float
    now: float | None
    blind: bool = False
    few: bool = False  # rows, of either side


OUTER: Final = 0.99  # of both sides' scores in one bin that has no end: what moves there is not seen
NOTHING: Final = Bounds(0.0, float("inf"), None)


def bounds(windows: Sequence[Window], guard: ScoreShift, alpha: float, looks: int = 0) -> Bounds:
    """Of the windows of one step, `looks` windows into the rollout. Windows with other bins than the policy's have no scores."""
    bins = len(guard.edges) + 2
    scored = [w for w in windows if len(w.canary.scores) == bins and len(w.stable.scores) == bins]
    if not scored:
        return NOTHING
    canary, stable = (
        np.cumsum([s.scores for s in side], axis=0) for side in ([w.canary for w in scored], [w.stable for w in scored])
    )
    rows = np.stack([canary.sum(axis=1), stable.sum(axis=1)])
    requests = np.stack([np.cumsum([w.canary.requests for w in scored]), np.cumsum([w.stable.requests for w in scored])])
    if rows[:, -1].min() == 0:
        return NOTHING
    samples = 1.0 / (1.0 / np.maximum(np.minimum(rows, requests), 1e-9)).sum(axis=0)
    index = psi(canary, stable)
    j = looks + 1.0 + np.arange(len(scored))
    x = np.log(j * (j + 1.0) / alpha)
    reach = np.sqrt((bins - 1 + 2.0 * np.sqrt((bins - 1) * x) + 2.0 * x) / samples)
    enough = rows.min(axis=0) >= guard.min_rows
    low = np.where(enough, np.maximum(np.sqrt(index) - reach, 0.0) ** 2, 0.0)
    high = float((np.sqrt(index[-1]) + reach[-1]) ** 2) if enough[-1] else float("inf")
    return Bounds(float(low.max()), high, float(index[-1]), _blind(canary[-1], stable[-1]), not enough[-1])


def _blind(canary: npt.NDArray[Any], stable: npt.NDArray[Any]) -> bool:
    """Whether nearly all lie below the first edge on both sides, or from the last one on (the bin after that counts NaN)."""
    return any(min(side[outer] / side.sum() for side in (canary, stable)) > OUTER for outer in (0, -2))


def psi(canary: npt.NDArray[Any], stable: npt.NDArray[Any]) -> Floats:
    """The index of counts [..., bins]; half a row is added to each bin, so that an empty one says little."""
    c, s = ((n + 0.5) / (n + 0.5).sum(axis=-1, keepdims=True) for n in (canary, stable))
    index: Floats = ((c - s) * np.log(c / s)).sum(axis=-1)
    return index
