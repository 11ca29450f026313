"""A series of windows as bets, one after another: each is placed by what the windows before it have shown.

    counts by window -> expected (stable's probability so far) -> log_evalues -> / design effect so far -> sums from each start

Wealth is a nonnegative supermartingale while the hypothesis holds, so that it ever reaches 1/alpha has a probability of at most
alpha (Ville 1939): looking after every window costs nothing, and one may stop whenever one likes (Johari et al. 2022, Oper. Res.;
Howard, Ramdas et al. 2021, Ann. Stat.).

**Dependence.** Within a window the bets assume that requests are independent given the window. Where they are not (a key that
fails again and again, latencies that stick together) counts vary more than binomially, by the *design effect* k (Kish 1965). The
k-th root of an e-value is one again for clusters of at most k requests and for series in which requests k apart are independent
(Hoelder's inequality over the k subseries), and by the central limit theorem wherever the variance of the counts is at most k
times the binomial. k is estimated from the earlier windows (Cochran's Q of the differences over its degrees of freedom), never
below `least`. What no window can show is a disturbance of one side that outlasts windows: to the gate it is the version's.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from triform.rollout.evalues import Counts, Floats, Line, log_evalues

MEMORY: Final = 0.9  # what a window's counts still weigh one window later in what is expected
PRIOR_EVENTS: Final = 0.5  # before any window: half an event ...
PRIOR_TRIALS: Final = 50.0  # ... in 50 trials
BLOCKS: Final = {1: 6.0, 2: 4.0, 4: 4.0, 8: 4.0}  # windows of a block: how many blocks what was known before weighs as much as


def increments(
    seen: Counts, line: Line, *, beyond: bool, stable: Floats | None = None, assumed: float = 1.0, least: float = 1.0
) -> Floats:
    """Logarithm of what each window multiplies the wealth by, [..., windows, alternatives], for counts [..., windows].

    `stable`: its probability as *earlier* windows tell it, where the caller knows better than its counts. `assumed`: the design
    effect before there are windows to estimate it from; `least`: what it is at least taken to be.
    """
    won = log_evalues(seen, expected(seen.stable, seen.stable_of) if stable is None else stable, line, beyond=beyond)
    effect = design_effect(seen, assumed=assumed, least=least, alone=line.ratio == 0)
    return won / effect[..., None]


def expected(events: Floats, of: Floats, memory: float = MEMORY) -> Floats:
    """The probability of an event as the windows before each one tell it, older ones less and less."""
    made: Floats = np.empty_like(events, dtype=np.float64)
    x = np.zeros(np.shape(events)[:-1])
    n = x
    for t in range(made.shape[-1]):
        made[..., t] = (x + PRIOR_EVENTS) / (n + PRIOR_TRIALS)
        x, n = memory * x + events[..., t], memory * n + of[..., t]
    return made


def design_effect(seen: Counts, *, assumed: float, least: float, alone: bool = False) -> Floats:
    """Variance of the windows' differences over the binomial one, estimated before each window: [..., windows].

    The most that windows and blocks of 2, 4 and 8 of them tell (batch means: what sticks together for longer than a window shows
    there). `alone`: of the canary's share in place of a difference.
    """
    if alone:
        seen = Counts(seen.canary, seen.canary_of, np.zeros_like(seen.canary), np.zeros_like(seen.canary))
    finer = np.full(seen.canary.shape, assumed)
    most = np.full(seen.canary.shape, max(least, 1.0))
    for size, prior in BLOCKS.items():
        finer = _of_blocks(seen, size, finer, prior, alone=alone)
        most = np.maximum(most, finer)
    return most


def _of_blocks(seen: Counts, size: int, finer: Floats, prior: float, *, alone: bool) -> Floats:
    """Cochran's Q of the blocks that ended before each window, over its degrees of freedom: squares around the weighted mean
    difference, so that a canary which differs evenly does not raise it. What is known without, `finer`, weighs as much as `prior`
    blocks."""
    windows = seen.canary.shape[-1]
    blocks = [c[..., : windows // size * size].reshape(*c.shape[:-1], windows // size, size).sum(axis=-1) for c in seen]
    xc, nc, xs, ns = blocks
    both = (nc > 0) & ((ns > 0) | alone)
    pooled = (xc + xs + 1.0) / (nc + ns + 1.0 / expected(xc + xs, nc + ns))  # of the block, as both share what happens in it
    share = _over(xc, nc) - _over(xs, ns)
    weight = np.where(both, _over(1.0, pooled * (1.0 - pooled) * (_over(1.0, nc) + _over(1.0, ns))), 0.0)
    w, wd, wdd, n = (np.cumsum(v, axis=-1) for v in (weight, weight * share, weight * share**2, both.astype(float)))
    q = np.maximum(wdd - _over(wd**2, w), 0.0)
    none = np.zeros((*n.shape[:-1], 1))
    ended = np.arange(windows) // size  # blocks before each window
    q, freedom = (np.concatenate([none, v], axis=-1)[..., ended] for v in (q, np.maximum(n - 1.0, 0.0)))
    found: Floats = (finer * prior + q) / (prior + freedom)
    return found


def _over(a: Floats | float, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


def from_starts(won: Floats, starts: tuple[int, ...]) -> Floats:
    """Log wealth after each window of the bets begun at each of `starts`, [..., windows, starts * alternatives].

    A bet that has not begun has the wealth 1. Bets begun late find a canary that becomes worse late.
    """
    total = np.cumsum(won, axis=-2)
    series = []
    for start in starts:
        before = total[..., start - 1 : start, :] if start else np.zeros_like(total[..., :1, :])
        begun = np.arange(won.shape[-2])[:, None] >= start
        series.append(np.where(begun, total - before, 0.0))
    return np.concatenate(series, axis=-1)
