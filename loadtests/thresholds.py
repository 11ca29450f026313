"""What a target must keep, from TOML: [target] for every shape, [target.shape] for one -> checks of a Result -> the exit code.

In `steps`, whose end is meant to be too much, the limits are for the last step before the first that broke one; `minimum_rate`
is what that step must have answered.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests.results import Figures, Result
from loadtests.shapes import SHAPES
from triform.errors import ConfigurationError

FILE: Final = Path(__file__).with_name("thresholds.toml")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most, of `minimum_rate` the least; None: whatever. Latencies in milliseconds, the rate in right answers a second, the
    others as shares of the requests."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    error_rate: float | None = None
    refused_share: float | None = None
    minimum_rate: float | None = None


class Check(msgspec.Struct, frozen=True):
    """`said`: what was found, and what was wanted."""

    name: str
    kept: bool
    said: str


MOST: Final = ("p50_ms", "p99_ms", "p999_ms", "error_rate", "refused_share")


def read_limits(path: Path, target: str, shape: str) -> Limits:
    """The target's limits in that shape. Raises `ConfigurationError`, which names the file and the key."""
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: this is no TOML: {error}") from error
    for name, section in text.items():
        if not isinstance(section, dict):
            raise ConfigurationError(f"{path}: {name}: expected a table of limits")
        _limits(path, name, {key: value for key, value in section.items() if key not in SHAPES})
        for key in section.keys() & SHAPES.keys():
            _limits(path, f"{name}.{key}", section[key])
    if target not in text:
        raise ConfigurationError(f"{path}: there is no [{target}]")
    shared = {key: value for key, value in text[target].items() if key not in SHAPES}
    return _limits(path, f"{target}.{shape}", shared | text[target].get(shape, {}))


def _limits(path: Path, where: str, given: Any) -> Limits:
    try:
        limits = msgspec.convert(given, Limits)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {where}: {str(error).replace('`', chr(39))}") from error
    for name in (*MOST, "minimum_rate"):
        value = getattr(limits, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{path}: {where}.{name}: expected 0 or more, got {value}")
    return limits


def judge(found: Result, limits: Limits) -> list[Check]:
    """All checks of a run, kept or not. A run in which nothing was asked keeps nothing."""
    figures, where = found.total, ""
    if found.shape == "steps":
        figures, where = _sustained(found, limits)
    checks = [Check("something was answered", found.total.ok > 0, f"{found.total.ok:,} of {found.total.requests:,} requests")]
    wrong = found.examples.get("wrong_answer", "")
    said = f"{found.total.wrong:,} of {found.total.requests:,}" + (f"; {wrong}" if found.total.wrong else "")
    checks.append(Check("no answer differs from the batch job's", not found.total.wrong, said))
    for name in MOST:
        if (most := getattr(limits, name)) is not None:
            value = getattr(figures, name)
            checks.append(Check(name, value is not None and value <= most, f"{_shown(value)}, at most {most:g}{where}"))
    if (least := limits.minimum_rate) is not None:
        checks.append(Check("minimum_rate", figures.rate >= least, f"{figures.rate:.1f}/s, at least {least:g}{where}"))
    counters = found.counters
    if counters.exact and (counters.server is not None or counters.prometheus is not None):
        differ = counters.differences()
        ok = f"{counters.client.get('ok', 0):,} answered requests in each"
        checks.append(Check("counters agree", not differ, "; ".join(differ) or ok))
    return checks


def _sustained(found: Result, limits: Limits) -> tuple[Figures, str]:
    """The figures of the last step that kept all limits before one broke some; those of the first where it did."""
    kept = None
    for step in found.stages:
        if not _keeps(step.figures, limits) or (found.saturated is not None and step.begin >= found.saturated):
            break
        kept = step
    if kept is None:
        return (found.stages[0].figures if found.stages else found.total), ", in the first step"
    return kept.figures, f", in the step of {kept.offered:.0f}/s"


def _keeps(figures: Figures, limits: Limits) -> bool:
    for name in MOST:
        most, value = getattr(limits, name), getattr(figures, name)
        if most is not None and (value is None or value > most):
            return False
    return not figures.wrong


def _shown(value: float | None) -> str:
    return "nothing was answered" if value is None else f"{value:.4g}"
