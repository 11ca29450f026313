"""E-values of one window's counts: what a bet against "the canary is within its limit" would have paid.

    events and trials of canary and *concurrent* stable  ->  factors on a wealth that starts at 1  ->  comparison.py

The limit is a line, `p_canary = ratio * p_stable + increase`. A bet is made of each request, 1 + a (y - tc) for the canary's and
1 - b (y - ts) for stable's (y is 1 for an event), where (ts, tc) lies on the line and b * n_stable = ratio * a * n_canary. Then,
whatever the two probabilities are in this window,

    E[product] = (1 + a (pc - tc))^nc * (1 - b (ps - ts))^ns <= exp(a nc ((pc - ratio ps) - increase)),    as 1 + x <= e^x,

which is at most 1 for a > 0 if the canary is within the limit, and for a < 0 if it is beyond: an e-value for either hypothesis,
without any assumption on how the probabilities move from window to window. The point (ts, tc) is the reverse information
projection of the alternative onto the line, which makes the bet the one that grows fastest (Turner, Ly & Gruenwald 2024,
arXiv:2106.02693; in strata: Turner & Gruenwald 2023, arXiv:2302.11401; e-values as bets: Waudby-Smith & Ramdas 2024, JRSS B).

With `ratio` 0 stable plays no part: a test of one probability against `increase`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SHIFTS: Final = (0.2, 0.45, 0.9, 1.8, 3.6)  # log odds between the limit and the alternatives that are bet on
PACES: Final = (0.9, 0.7, 0.4, 0.1)  # of a rate, the same
LEAST: Final = 1e-5  # no probability is taken to be nearer to 0 or 1
_HALVINGS: Final = 20


class Line(NamedTuple):
    """How much the canary may differ: p_canary <= ratio * p_stable + increase."""

    ratio: float
    increase: float

    def at(self, stable: Floats) -> Floats:
        return _inside(self.ratio * stable + self.increase)


class Counts(NamedTuple):
    """Events of trials, arrays of equal shape: whole numbers, though nothing minds fractions."""

    canary: Floats
    canary_of: Floats
    stable: Floats
    stable_of: Floats


def log_evalues(seen: Counts, expected: Floats, line: Line, *, beyond: bool) -> Floats:
    """The logarithm of each window's e-value, shape [..., alternatives], for counts of shape [...].

    `beyond`: True bets that the canary is beyond the line (what is rejected is that it is within), False the reverse.
    `expected`: stable's probability as *earlier* windows tell it; what it is changes the power, never the validity.
    A window without canary, or (ratio > 0) without stable, says nothing: 0.
    """
    nc, ns = seen.canary_of[..., None], seen.stable_of[..., None]
    ps = _inside(expected)[..., None]
    shifts = np.asarray(SHIFTS) * (1.0 if beyond else -1.0)
    pc = _inside(_expit(_logit(line.at(ps)) + shifts))
    ts = _projection(pc, nc, ps, ns, line)
    tc = _inside(line.ratio * ts + line.increase)
    a = np.where((ns > 0) | (line.ratio == 0), (pc - tc) / (tc * (1 - tc)), 0.0)
    b = line.ratio * a * nc / np.maximum(ns, 1e-300)
    bold = np.abs(b) * np.where(a > 0, 1 - ts, ts)  # the share of the wealth that one request of stable's may cost
    tame = np.minimum(1.0, 0.98 / np.maximum(bold, 1e-300))
    a, b = a * tame, b * tame
    won = _log_factors(seen.canary[..., None], nc, a, tc) + _log_factors(seen.stable[..., None], ns, -b, ts)
    return np.where(nc > 0, won, 0.0)


def log_pace_evalues(count: Floats, seconds: Floats, pace: float, *, beyond: bool) -> Floats:
    """The same for a rate: events in `seconds` of a Poisson process whose limit from below is `pace` a second.

    `beyond` bets that it is slower. E[m^N exp((1 - m) pace s)] <= 1 for N ~ Poisson(rate s), m < 1 and rate >= pace.
    """
    paces = np.asarray(PACES) if beyond else 1.0 / np.asarray(PACES)
    won: Floats = count[..., None] * np.log(paces) + (1.0 - paces) * (pace * seconds)[..., None]
    return won


def log_mean(logs: Floats, axis: int | tuple[int, ...]) -> Floats:
    """The logarithm of the mean of e-values, which is one itself whatever their dependence (Vovk & Wang 2021, Ann. Stat.)."""
    top = np.max(logs, axis=axis, keepdims=True)
    mean: Floats = np.log(np.mean(np.exp(logs - top), axis=axis)) + np.squeeze(top, axis=axis)
    return mean


def _projection(pc: Floats, nc: Floats, ps: Floats, ns: Floats, line: Line) -> Floats:
    """ts that minimises nc KL(pc || ratio ts + increase) + ns KL(ps || ts), by bisection: its derivative rises in ts."""
    if line == (1.0, 0.0):
        pooled: Floats = _inside((nc * pc + ns * ps) / np.maximum(nc + ns, 1e-300))
        return pooled
    most = (1.0 - LEAST - line.increase) / line.ratio if line.ratio > 0 else 1.0
    on_line = (pc - line.increase) / line.ratio if line.ratio > 0 else ps  # it lies between stable's own and where tc = pc
    low, high = (np.clip(end(ps, on_line) + 0.0 * nc, LEAST, min(1.0 - LEAST, most)) for end in (np.minimum, np.maximum))
    for _ in range(_HALVINGS):
        ts = 0.5 * (low + high)
        tc = _inside(line.ratio * ts + line.increase)
        rises = nc * line.ratio * (tc - pc) / (tc * (1 - tc)) + ns * (ts - ps) / (ts * (1 - ts)) > 0
        high, low = np.where(rises, ts, high), np.where(rises, low, ts)
    return 0.5 * (low + high)


def _log_factors(events: Floats, of: Floats, bet: Floats, centre: Floats) -> Floats:
    won: Floats = events * np.log1p(bet * (1 - centre)) + (of - events) * np.log1p(-bet * centre)
    return won


def _inside(p: Any) -> Floats:
    inside: Floats = np.clip(p, LEAST, 1.0 - LEAST)
    return inside


def _logit(p: Floats) -> Floats:
    logs: Floats = np.log(p) - np.log1p(-p)
    return logs


def _expit(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))
