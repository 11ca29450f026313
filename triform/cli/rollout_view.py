"""A rollout for people: where it is, both sides beside each other, the guards and the verdict; once, or live.

Rollout -> in_words -> a table      its entries, one by one -> in_a_line -> a log
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from triform.cli.output import make_table, printable
from triform.rollout.gate import Verdict
from triform.rollout.machine import State
from triform.rollout.policy import Policy
from triform.rollout.windows import SHADOW, Arm, Window, merge_arms
from triform.rollout_log import Rollout, RolloutLog

Z: Final = 1.96  # of a 95% interval
QUIET_SECONDS: Final = 90.0  # without an entry, that nothing seems to look at a rollout


def told(rollout: Rollout) -> dict[str, Any]:
    """The same for programs."""
    verdict = _verdict(rollout)
    return {
        "model": rollout.model,
        "rollout": rollout.number,
        "state": rollout.state,
        "share": share(rollout.policy, rollout.state),
        "begun_at": rollout.entries[0].at,
        "begun_by": rollout.entries[0].by,
        "last_seen_at": rollout.entries[-1].at,
        "entries": len(rollout.entries),
        "sides": {name: _figures(arm) for name, arm in _sides(rollout)},
        "verdict": verdict,
    }


def in_words(rollout: Rollout) -> Group:
    """All that a person wants to see at once."""
    state, first = rollout.state, rollout.entries[0]
    versions = {"stable": state.stable, "canary": state.canary}
    rows = [(name, versions[name], *_cells(arm)) for name, arm in _sides(rollout)]
    of = f"rollout {rollout.number} of {rollout.model}: version {state.canary} beside {state.stable}"
    lines = [
        f"{of}, {_where(rollout.policy, state)}",
        f"begun {first.at[:19]} UTC by {first.by}{': ' if first.reason else ''}{first.reason}; watched {state.watched:.0f} s of "
        f"{rollout.policy.longest_seconds:.0f}",
    ]
    if state.reason:
        lines.append(f"{state.phase.replace('_', ' ')}: {state.reason}")
    parts: list[Any] = [Text(printable(line)) for line in lines]
    headers = ("side", "version", "requests", "errors", "errors, % (95%)", "p50 ms", "p99 ms")
    parts.append(make_table(*headers, rows=rows))
    verdict = _verdict(rollout)
    if verdict is not None:
        findings = [(f.guard, f.says, _bet(f.against, f.against_at), _bet(f.in_favour, f.in_favour_at)) for f in verdict.findings]
        parts.append(make_table("guard", "says", "bet against", "bet in favour", rows=findings))
        parts += [Text(printable(f"#{rollout.judged[-1]} {_said(verdict)}"))]
    if not rollout.ended and (quiet := _quiet_seconds(rollout)) > QUIET_SECONDS:
        parts.append(Text(f"nothing has looked at it for {quiet:.0f} s: does a Ray Serve application serve {rollout.model}?"))
    return Group(*parts)


def _said(verdict: Verdict) -> str:
    return f"{verdict.decision}: {'; '.join(verdict.reasons)}"


def in_a_line(rollout: Rollout, number: int) -> str:
    """One entry."""
    entry = rollout.entries[number]
    canary, stable = (merge_arms([getattr(w, side) for w in entry.windows]) for side in ("canary", "stable"))
    seen = f"canary {_rate(canary)}, stable {_rate(stable)}; " if canary.requests or stable.requests else ""
    verdict = entry.verdict
    says = _said(verdict) if verdict is not None else entry.state.reason or "begun"
    if entry.command:
        says = f"{entry.command} by {entry.by}: {entry.state.reason}"
    elif entry.cut:
        says = entry.state.reason
    return printable(f"{entry.at[11:19]} #{number} {_where(rollout.policy, entry.state)}: {seen}{says}")


def watch_it(log: RolloutLog, rollout: Rollout, every: float, until: float | None) -> Rollout:
    """Shows the rollout until it is over, or `until` (`time.monotonic()`): live on a terminal, elsewhere a line an entry."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        shown = 0
        while _goes_on(log, rollout, every if shown else 0.0, until) or shown < len(rollout.entries):
            for number in range(shown, len(rollout.entries)):
                console.print(in_a_line(rollout, number), markup=False, highlight=False)
            shown = len(rollout.entries)
        return rollout
    with Live(in_words(rollout), console=console, auto_refresh=False) as live:
        while _goes_on(log, rollout, every, until):
            live.update(in_words(rollout), refresh=True)
        live.update(in_words(rollout), refresh=True)
    return rollout


def share(policy: Policy, state: State) -> float:
    """Of the requests or keys that the canary gets, 0 to 1; in the shadow step, that it sees."""
    if state.phase in ("rolled_back", "superseded"):
        return 0.0
    if state.phase == "promoted":
        return 1.0
    if state.step == SHADOW:
        return policy.shadow.sample if policy.shadow else 0.0
    return policy.steps[state.step].weight


def interval(events: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson (1927); (0, 1) of nothing. For one look: the gate does not decide by it."""
    if not of:
        return 0.0, 1.0
    p, z2 = events / of, Z * Z
    middle, half = p + z2 / (2 * of), Z * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    return max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of))


def _goes_on(log: RolloutLog, rollout: Rollout, wait: float, until: float | None) -> bool:
    """Whether there may be more to see, after the wait."""
    if rollout.ended or (until is not None and time.monotonic() >= until):
        return False
    time.sleep(wait)
    log.follow(rollout)
    return True


def _verdict(rollout: Rollout) -> Verdict | None:
    return next((entry.verdict for entry in reversed(rollout.entries) if entry.verdict is not None), None)


def _sides(rollout: Rollout) -> list[tuple[str, Arm]]:
    """What both sides did in the latest step that has windows."""
    step = rollout.windows[-1].step if rollout.windows else 0
    seen: Sequence[Window] = [w for w in rollout.windows if w.step == step]
    return [("stable", merge_arms([w.stable for w in seen])), ("canary", merge_arms([w.canary for w in seen]))]


def _figures(arm: Arm) -> dict[str, Any]:
    low, high = interval(arm.errors, arm.requests)
    times = {f"p{100 * q:.0f}_ms": None if (t := arm.request_seconds.quantile(q)) is None else 1e3 * t for q in (0.5, 0.99)}
    return {"requests": arm.requests, "errors": arm.errors, "error_rate_95": [low, high], **times}


def _cells(arm: Arm) -> list[str]:
    figures = _figures(arm)
    low, high = figures["error_rate_95"]
    rate = f"{100 * arm.errors / arm.requests:.2f} ({100 * low:.2f}-{100 * high:.2f})" if arm.requests else "-"
    times = ("-" if (t := figures[name]) is None else f"{t:.2f}" for name in ("p50_ms", "p99_ms"))
    return [f"{arm.requests:,}", f"{arm.errors:,}", rate, *times]


def _rate(arm: Arm) -> str:
    return f"{arm.errors} errors of {arm.requests}"


def _bet(got: float, needs: float) -> str:
    return f"{got:.2f} of {needs:.2f}"


def _where(policy: Policy, state: State) -> str:
    percent = f"{100 * share(policy, state):.4g}%"
    if state.phase in ("promoted", "rolled_back", "superseded"):
        return state.phase.replace("_", " ")
    at = (
        f"shadow of {percent} of the requests"
        if state.step == SHADOW
        else f"step {state.step + 1} of {len(policy.steps)}, {percent} of the keys"
    )
    return at if state.phase == "running" else f"{at}, {state.phase}"


def _quiet_seconds(rollout: Rollout) -> float:
    last = datetime.datetime.fromisoformat(rollout.entries[-1].at)
    return (datetime.datetime.now(datetime.UTC) - last).total_seconds()
