"""The gate's operating characteristics, from simulation: how often it rolls back a canary that is as good as stable, and how many
requests it takes to find one that is not.

    python -m benchmarks.rollout --to docs/img          # 10,000 rollouts where both are the same, 300 where not

Rollouts are simulated together, as arrays; each goes through the same `increments`, `exceeding` and `from_starts` that the gate
uses, with its default policy's limits and shares of alpha: errors and latency, the latter at p50 and p95. Latencies are
lognormal; where they are autocorrelated each side is an autoregressive series from run to run, on its own, which is the worst
case: on one loaded machine both sides would feel the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.report import Report
from triform.rollout.comparison import from_starts, increments
from triform.rollout.evalues import Counts, Line, log_mean
from triform.rollout.guards import ASSUMED_ERRORS, ASSUMED_RUNS
from triform.rollout.latency import EQUAL, exceeding
from triform.rollout.policy import Policy
from triform.rollout.windows import BUCKETS, STEPS_PER_OCTAVE

Floats = npt.NDArray[np.float64]

POLICY = Policy()
GUARDS = 2  # errors and latency: the default policy
SHORT, LONG = (8, 12, 20), (8, 12, 100)  # windows of each step: where nothing is to be found, and where something is
FIRST_BIN, BINS = -8 * STEPS_PER_OCTAVE - 16, 4 * STEPS_PER_OCTAVE  # 3 ms to 44 ms: all that any threshold asks for
CHUNK = 200  # rollouts that are in memory at once
REQUESTS = 200  # requests of both sides in a window


class Scenario(NamedTuple):
    """A canary beside stable. `slow`: how many times stable's time; `phi`: autocorrelation of log times from run to run; `load`:
    spread of log time from window to window, the same on both sides; `outages`: share of windows in which 20% of both sides fail;
    `cluster`: failures come in groups of so many; `spread`: of log time."""

    name: str
    stable: float = 0.01
    canary: float = 0.01
    slow: float = 1.0
    phi: float = 0.0
    load: float = 0.0
    outages: float = 0.0
    cluster: int = 1
    spread: float = 0.5
    design_effect: float = 1.0


class Found(NamedTuple):
    """For each rollout: the window of the rollback (or a number beyond the last) by either guard, and whether the last step shows
    the canary to be within its limits."""

    errors: Floats
    latency: Floats
    promoted: npt.NDArray[np.bool_]

    def by(self, window: int) -> float:
        """Share of the rollouts that were rolled back after so many windows."""
        return float((np.minimum(self.errors, self.latency) < window).mean())


SAME = (
    Scenario("independent, 1% errors"),
    Scenario("outages and load that hit both", outages=0.05, load=0.3),
    Scenario("failures in threes, latency autocorrelated 0.9", cluster=3, phi=0.9),
)
BEYOND = (  # a tenth of the rollouts: other rates, then what the assumption on dependence is worth, and what the setting is for
    Scenario("no errors at all", 0.0, 0.0),
    Scenario("10% errors", 0.1, 0.1),
    Scenario("failures in tens", cluster=10),
    Scenario("failures in tens, design_effect = 10", cluster=10, design_effect=10.0),
    Scenario("latency autocorrelated 0.98", phi=0.98),
    Scenario("latency autocorrelated 0.98, design_effect = 50", phi=0.98, design_effect=50.0),
)
WORSE = (
    Scenario("the same"),
    Scenario("the same, no errors at all", 0.0, 0.0),
    Scenario("errors 1% -> 1.5% (the limit)", canary=0.015),
    Scenario("errors 1% -> 2%", canary=0.02),
    Scenario("errors 1% -> 3%", canary=0.03),
    Scenario("errors 1% -> 10%", canary=0.1),
    Scenario("latency x 1.2 (the limit)", slow=1.2),
    Scenario("latency x 1.5", slow=1.5),
    Scenario("latency x 1.5, autocorrelated 0.9", slow=1.5, phi=0.9),
    Scenario("latency x 2", slow=2.0),
)


def sizes(seed: int, rollouts: int, windows: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Requests of canary and stable, [rollouts, windows]."""
    weights = np.repeat([step.weight for step in POLICY.steps], windows)
    canary = np.random.default_rng(seed).binomial(REQUESTS, weights, size=(rollouts, len(weights))).astype(float)
    return canary, REQUESTS - canary


def simulate(scenario: Scenario, rollouts: int, windows: tuple[int, ...] = SHORT, seed: int = 1) -> Found:
    """Rollouts of one scenario through both guards."""
    chunks = [_chunk(scenario, min(CHUNK, rollouts - i), windows, seed + i) for i in range(0, rollouts, CHUNK)]
    return Found(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


def _chunk(scenario: Scenario, rollouts: int, windows: tuple[int, ...], seed: int) -> Found:
    rng = np.random.default_rng(seed)
    of_canary, of_stable = sizes(seed, rollouts, windows)
    errors = _errors(rng, scenario, of_canary, of_stable)
    alpha, beta = POLICY.alpha / GUARDS, POLICY.beta
    line = Line(POLICY.guards.errors.ratio, POLICY.guards.errors.increase)
    won = [increments(errors, line, beyond=b, assumed=ASSUMED_ERRORS, least=scenario.design_effect) for b in (True, False)]
    beyond, within = first(won[0], windows, alpha), last_step(won[1], windows) >= -np.log(beta)
    late = np.full(rollouts, float(sum(windows)))
    canary, stable = _latencies(rng, scenario, of_canary), _latencies(rng, scenario._replace(slow=1.0), of_stable)
    latency = POLICY.guards.latency
    assert latency is not None
    for quantile in latency.quantiles:
        found = exceeding(canary, stable, FIRST_BIN, quantile=quantile, ratio=latency.ratio, margin=latency.margin_ms / 1e3)
        won = [
            increments(e.counts, EQUAL, beyond=b, stable=e.expected, assumed=ASSUMED_RUNS, least=scenario.design_effect)
            for e, b in ((found.beyond, True), (found.within, False))
        ]
        # One of the buckets of rows that the gate gives alpha to; the others stay empty, with a wealth of 1.
        late = np.minimum(late, first(won[0], windows, alpha / len(latency.quantiles), buckets=BUCKETS))
        within &= last_step(won[1], windows) >= -np.log(beta)
    return Found(beyond, late, within & (np.minimum(beyond, late) >= sum(windows)))


def first(won: Floats, windows: tuple[int, ...], alpha: float, buckets: int = 1) -> Floats:
    """The window in which the bets are won, or the number of windows."""
    starts = tuple(int(s) for s in np.cumsum([0, *windows[:-1]]))
    wealth = np.exp(np.minimum(log_mean(from_starts(won, starts), -1), 600.0))
    won_by = (wealth + buckets - 1.0) / buckets >= 1.0 / alpha
    return np.where(won_by.any(axis=-1), won_by.argmax(axis=-1), won.shape[-2]).astype(float)


def last_step(won: Floats, windows: tuple[int, ...]) -> Floats:
    return log_mean(won[..., -windows[-1] :, :].sum(axis=-2), -1)


def _errors(rng: np.random.Generator, scenario: Scenario, of_canary: Floats, of_stable: Floats) -> Counts:
    outage = rng.random(of_canary.shape) < scenario.outages
    sides = []
    for of, rate in (of_canary, scenario.canary), (of_stable, scenario.stable):
        groups = np.round(of / scenario.cluster)
        failed = rng.binomial(groups.astype(np.int64), np.where(outage, 0.2, rate))
        sides += [np.minimum(failed * float(scenario.cluster), of), of]
    return Counts(*sides)


def _latencies(rng: np.random.Generator, scenario: Scenario, of: Floats) -> Floats:
    """Histograms [rollouts, windows, bins]; each rollout's series goes on from window to window."""
    rollouts = of.shape[0]
    made = np.zeros((*of.shape, BINS), dtype=np.float32)
    common = np.random.default_rng(rollouts).standard_normal(of.shape) * scenario.load  # the same for both sides
    state = rng.standard_normal(rollouts).astype(np.float32)
    offsets = np.arange(rollouts) * BINS
    for t in range(of.shape[1]):
        runs = int(of[:, t].max())
        noise = rng.standard_normal((runs, rollouts), dtype=np.float32)
        if scenario.phi:
            for i in range(runs):
                noise[i] = state = scenario.phi * state + np.sqrt(1 - scenario.phi**2).astype(np.float32) * noise[i]
        octaves = np.log2(0.01 * scenario.slow) + (scenario.spread * noise + common[:, t]) / np.log(2.0)
        index = np.clip(np.ceil(STEPS_PER_OCTAVE * octaves) - 1 - FIRST_BIN, 0, BINS - 1).astype(np.int64) + offsets
        taken = index[np.arange(runs)[:, None] < of[:, t]]
        made[:, t] = np.bincount(taken, minlength=rollouts * BINS).reshape(rollouts, BINS)
    return made


def upper(share: float, of: int) -> float:
    """The upper end of the 95% interval of a share (Wilson 1927)."""
    z = 1.96
    middle, reach = share + z * z / (2 * of), z * np.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return float((middle + reach) / (1 + z * z / of))


def draw(same: Sequence[tuple[str, float, float]], powers: dict[str, Floats], folder: Path) -> None:
    """Two plots: false rollbacks by scenario, and power by requests of the canary."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "triform"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.42 * len(same) + 1.1), layout="constrained")
    y = np.arange(len(same))[::-1]
    axes.barh(y, [100 * share for _, share, _ in same], xerr=[[0] * len(same), [100 * (u - s) for _, s, u in same]], height=0.6)
    axes.axvline(100 * POLICY.alpha, color="tab:red", linestyle="--", label="alpha")
    axes.set_yticks(y, [name for name, _, _ in same], fontsize=8)
    axes.set_xlabel("rollouts rolled back, % (with 95% interval)")
    axes.set_title("Canary and stable are the same: false rollbacks")
    axes.legend(frameon=False)
    _save(figure, folder / "rollout-same.svg")
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    requests = np.cumsum(sizes(0, 1, LONG)[0][0])
    for name, share in powers.items():
        axes.plot(requests, 100 * share, label=name, linestyle="--" if "same" in name or "limit" in name else "-")
    axes.set_xscale("log")
    axes.set_xlabel("requests that the canary has had")
    axes.set_ylabel("rolled back, %")
    axes.set_title("Power: how soon a worse canary is found")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, folder / "rollout-power.svg")


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.axes[0].spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]  # matplotlib has no stubs here
    figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=10_000, help="of each A/A scenario; a tenth or less of the others")
    parser.add_argument("--table", type=Path, help="a file for the tables, as Markdown")
    parser.add_argument("--to", type=Path, default=Path("build/rollout"), help="the folder for the plots")
    given = parser.parse_args()
    report, same, powers, rows = Report(), list[tuple[str, float, float]](), dict[str, Floats](), list[list[str]]()
    for scenario in SAME + BEYOND:
        number = given.rollouts if scenario in SAME else given.rollouts // 10
        started, found = time.process_time(), simulate(scenario, number)
        share = found.by(sum(SHORT))
        same.append((scenario.name, share, upper(share, number)))
        cells = [f"{100 * v:.2f}%" for v in (share, same[-1][2], found.promoted.mean())]
        rows.append([scenario.name, f"{number:,}", *cells, f"{time.process_time() - started:.0f}"])
        print(*rows[-1], flush=True)
    report.table(
        "Canary the same as stable",
        ["scenario", "rollouts", "rolled back", "at most", "promoted", "CPU s"],
        rows,
    )
    rows = []
    requests = np.cumsum(sizes(0, 1, LONG)[0][0])
    for scenario in WORSE:
        found = simulate(scenario, max(100, given.rollouts // 33), LONG)
        powers[scenario.name] = share_by = np.array([found.by(t + 1) for t in range(sum(LONG))])
        needed = [f"{requests[np.argmax(share_by >= p)]:,.0f}" if share_by[-1] >= p else "-" for p in (0.5, 0.8, 0.95)]
        rows.append([scenario.name, *needed, f"{100 * share_by[-1]:.1f}%", f"{100 * found.promoted.mean():.2f}%"])
    columns = ["canary", "50%", "80%", "95%", f"by {requests[-1]:,.0f}", "promoted"]
    report.table("Requests of the canary until so many rollouts are rolled back", columns, rows)
    draw(same, powers, given.to)
    if given.table:
        report.write(given.table)


if __name__ == "__main__":
    main()
