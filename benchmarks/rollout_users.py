"""How often score shift rolls back a canary that is the same as stable where each user has a typical score of his own.

    python -m benchmarks.rollout_users          # a table, in a minute

Keys are shared by `TrafficSplit`, with a salt for each rollout, and stay: the canary has the scores of its users, however many
requests they send. The index, its bounds and its share of alpha are the gate's own, with errors and latency beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks.report import Report
from benchmarks.rollout import upper
from triform.rollout.policy import Policy, ScoreShift
from triform.rollout.shift import bounds
from triform.rollout.windows import Arm, Window, score_bins
from triform.splitting import TrafficSplit, basis_points

WEIGHT: Final = 0.1
REQUESTS: Final = 1000  # of both sides in a window
WINDOWS: Final = (40, 400)
USERS: Final = (100, 300, 1_000, 3_000, 10_000)
GUARD: Final = ScoreShift()
ALPHA: Final = Policy().alpha / 3  # errors, latency and this


class Kind(NamedTuple):
    """Normal spreads of the log-odds: of users' typical scores, and of one user's scores around his."""

    name: str
    typical: float
    around: float


KINDS: Final = (Kind("vary", 1.0, 0.3), Kind("hardly vary", 1.5, 0.05))


def rolled_back(users: int | None, kind: Kind, number: int, seed: int) -> bool:
    """Whether a rollout of so many windows ends so. `users` ask equally often; None: a key a request, its id."""
    rng = np.random.default_rng(seed)
    split = TrafficSplit(1, 2, basis_points(WEIGHT), rng.bytes(8).hex().encode())
    return bounds([*_windows(rng, split, users, kind, number)], GUARD, ALPHA).highest_low > GUARD.limit


def _windows(rng: np.random.Generator, split: TrafficSplit, users: int | None, kind: Kind, number: int) -> Iterator[Window]:
    typical = kind.typical * rng.standard_normal(users or 0)
    theirs = np.array([split.choose(f"user-{user}".encode()) == split.canary for user in range(users or 0)])
    for _ in range(number):
        who = rng.integers(0, users, REQUESTS) if users else np.zeros(0)
        at = typical[who] if users else kind.typical * rng.standard_normal(REQUESTS)
        scores = 1.0 / (1.0 + np.exp(-at - kind.around * rng.standard_normal(REQUESTS)))
        of_canary = theirs[who] if users else rng.random(REQUESTS) < WEIGHT
        canary, stable = (
            Arm(requests=len(some), scores=score_bins(some, GUARD.edges)) for some in (scores[of_canary], scores[~of_canary])
        )
        yield Window(step=0, seconds=30.0, canary=canary, stable=stable)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=200, help="of each kind")
    parser.add_argument("--table", type=Path, help="a file for the table, as Markdown")
    given = parser.parse_args()
    report, rows = Report(), list[list[str]]()
    for users in (*USERS, None):
        rows.append([f"{users:,} users" if users else "the request's id"])
        for kind in KINDS:
            for number in WINDOWS:
                share = float(np.mean([rolled_back(users, kind, number, seed) for seed in range(given.rollouts)]))
                rows[-1].append(f"{100 * share:.1f}% (up to {100 * upper(share, given.rollouts):.1f}%)")
        print(*rows[-1], flush=True)
    columns = [f"users' scores {kind.name}, {number} windows" for kind in KINDS for number in WINDOWS]
    report.table(f"Canary the same as stable: rolled back, of {given.rollouts:,}", ["keys", *columns], rows)
    if given.table:
        report.write(given.table)


if __name__ == "__main__":
    main()
