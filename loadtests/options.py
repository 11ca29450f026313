"""What the command is given, and whether it can be meant: Options -> check -> Checked, an order without its addresses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, cast, get_args

from loadtests.credentials import check_wire
from loadtests.order import OVER_HTTP, PROTOCOLS, Loop, Order, Protocol
from loadtests.shapes import SECONDS, stages
from loadtests.thresholds import Limits, read_limits
from triform.errors import ConfigurationError

TARGETS: Final = ("serve", "lambda")
# Requests a second at the most: in steps more than two cores answer, else what they do.
RATES: Final[Mapping[str, float]] = {"serve": 60.0, "lambda": 30.0}
STEP_RATES: Final[Mapping[str, float]] = {"serve": 600.0, "lambda": 200.0}


class Options(NamedTuple):
    """Those of the command; see __main__.py."""

    target: str
    shape: str
    loop: str
    rate: float | None
    users: int
    seconds: float | None
    workers: int
    protocols: str | None
    host: str | None
    grpc: str | None
    grpc_metadata: tuple[str, ...]
    metrics: str | None
    prometheus: bool
    auth: str
    region: str | None
    insecure: bool
    thresholds: Path
    timeout: float
    replicas: str
    environments: int
    example: Path
    output: Path
    pictures: Path | None
    seed: int


class Checked(NamedTuple):
    """What the options mean; `order` without the target's addresses."""

    order: Order
    limits: Limits
    protocols: tuple[Protocol, ...]
    replicas: tuple[int, int]


def check(options: Options) -> Checked:
    """Raises `ConfigurationError`, which names the option."""
    if options.target not in TARGETS:
        raise ConfigurationError(f"--target: no such target: {options.target!r}; there are {', '.join(TARGETS)}")
    if options.loop not in get_args(Loop):
        raise ConfigurationError(f"--loop: no such loop: {options.loop!r}; there are {', '.join(get_args(Loop))}")
    if options.host is None:
        for name in "grpc", "metrics":
            if getattr(options, name) is not None:
                raise ConfigurationError(f"--{name} belongs to a deployment: give its --host")
        if options.auth != "none":
            raise ConfigurationError(f"--auth {options.auth}: what is started here lets everybody in; it is for a --host")
    else:
        check_wire(options.auth, options.host, insecure=options.insecure)
        if options.grpc is not None:
            scheme = "" if options.grpc.startswith("https://") else "http://"
            check_wire(options.auth, f"{scheme}{options.grpc}", insecure=options.insecure)
    if options.prometheus and (options.target == "lambda" if options.host is None else options.metrics is None):
        raise ConfigurationError("--prometheus: this target has no page to scrape" + (": give --metrics" if options.host else ""))
    over = stages(options.shape, SECONDS.get(options.shape, 1.0) if options.seconds is None else options.seconds)
    rates = STEP_RATES if options.shape == "steps" else RATES
    rate = rates[options.target] if options.rate is None else options.rate
    for name, value in {"rate": rate, "users": options.users, "workers": options.workers, "timeout": options.timeout}.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"--{name}: expected more than 0, got {value}")
    if options.environments < 1:
        raise ConfigurationError(f"--environments: expected 1 or more, got {options.environments}")
    if options.loop == "closed" and options.users < options.workers:
        raise ConfigurationError(f"--users: {options.users} callers are fewer than {options.workers} workers")
    order = Order(
        host=options.host or "",
        grpc_metadata=_metadata(options.grpc_metadata),
        stages=over,
        loop=cast(Loop, options.loop),
        rate=float(rate),
        users=options.users,
        workers=options.workers,
        saturates=options.shape == "steps" and options.loop == "open",
        timeout=options.timeout,
        seed=options.seed,
        auth=options.auth,
        region=options.region,
    )
    limits = read_limits(options.thresholds, options.target, options.shape)
    return Checked(order, limits, _protocols(options), _replicas(options.replicas))


def _protocols(options: Options) -> tuple[Protocol, ...]:
    has_grpc = options.target == "serve" if options.host is None else options.grpc is not None
    there: tuple[Protocol, ...] = PROTOCOLS if has_grpc else OVER_HTTP
    if options.protocols is None:
        return there
    given = tuple(dict.fromkeys(name.strip() for name in options.protocols.split(",")))
    for name in given:
        if name not in PROTOCOLS:
            raise ConfigurationError(f"--protocols: no such protocol: {name!r}; there are {', '.join(PROTOCOLS)}")
        if name not in there:
            raise ConfigurationError(
                f"--protocols: {name}: this target speaks no gRPC" + (": give --grpc" if options.host else "")
            )
    return cast(tuple[Protocol, ...], given)


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 0 <= int(least) <= int(most or least) and int(most or least)):
        raise ConfigurationError(f"--replicas: expected a number or MIN:MAX, got {text!r}")
    return int(least), int(most or least)


def _metadata(given: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    for text in given:
        if "=" not in text:
            raise ConfigurationError(f"--grpc-metadata: expected name=value, got {text!r}")
    return tuple((name, value) for name, _, value in (text.partition("=") for text in given))
