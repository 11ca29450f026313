"""One load run from its options to its report: Options -> check -> target -> drive -> Result -> checks -> files."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, get_args

import msgspec
from rich.console import Console

from examples.flights.online import MODEL
from examples.flights.serving import local_serve
from loadtests import flights, targets
from loadtests.credentials import check_wire
from loadtests.driving import drive
from loadtests.junit import junit
from loadtests.metrics import prometheus
from loadtests.order import OVER_HTTP, PROTOCOLS, Loop, Order, Protocol
from loadtests.payloads import Payloads
from loadtests.report import pictures, report
from loadtests.records import OK
from loadtests.results import Counters, Result, result
from loadtests.shapes import SECONDS, stages
from loadtests.targets import Target
from loadtests.thresholds import Check, Limits, judge, read_limits
from loadtests.watching import watching
from triform.errors import ConfigurationError
from triform.stores import durable

TARGETS: Final = ("serve", "lambda")
# Requests a second at the most: in steps more than two cores answer, else what they do.
RATES: Final[Mapping[str, float]] = {"serve": 60.0, "lambda": 30.0}
STEP_RATES: Final[Mapping[str, float]] = {"serve": 600.0, "lambda": 200.0}
SETTLE_SECONDS: Final = 60.0  # that counters may lag behind: replicas tell Ray every 5 s, Ray its page every 10


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


def run(options: Options, secret: str | None, console: Console) -> bool:
    """Whether all limits were kept. Raises `ConfigurationError` for options that cannot be meant, `TriformError` where it fails."""
    checked = check(options)
    with ExitStack() as stack:
        target, payloads = stack.enter_context(_target(options, checked, console))
        found = _asked(options, checked, target, payloads, secret, console)
    checks = judge(found, checked.limits)
    _write(options, found, checks)
    _say(options, found, checks, console)
    return all(check.kept for check in checks)


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


@contextmanager
def _target(options: Options, checked: Checked, console: Console) -> Iterator[tuple[Target, Payloads]]:
    """The target, for as long as the block lasts, and what to ask it."""
    root, model = options.example, MODEL.partition("@")[0]

    def payloads() -> Payloads:
        return flights.payloads(root, flights.scored(root, console), checked.protocols, options.seed)

    if options.host is not None:
        target = targets.deployed(options.host, options.grpc, options.metrics, model)
        yield target, payloads()
    elif options.target == "lambda":
        made = payloads()
        with targets.function(root / "repository", options.environments, options.shape) as target:
            yield target, made
    else:
        with local_serve() as serve:
            made = payloads()
            serve.begin(root / "repository", **targets.serve_arguments(checked.replicas, options.shape))
            console.print(f"Ray Serve is ready after {serve.wait():.1f} s", highlight=False)
            yield targets.serving(serve, model), made


def _asked(
    options: Options, checked: Checked, target: Target, payloads: Payloads, secret: str | None, console: Console
) -> Result:
    order = msgspec.structs.replace(checked.order, host=target.host, grpc=target.grpc)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        (folder / "order").mkdir()
        scraping = None
        if options.prometheus and target.metrics is not None:
            scraping = stack.enter_context(prometheus(target.metrics, payloads.model, folder))
        before = target.counted() if target.counted is not None else {}
        load = f"{order.users} callers" if order.loop == "closed" else f"{order.rate:g} requests/s"
        console.print(f"Asking {target.title} ({target.host}): {options.shape}, {load}, {order.seconds:g} s", highlight=False)
        with watching(target) as watched:
            driven = drive(order, payloads, folder / "order", secret)
            sources: dict[str, Any] = {"server": target.counted, "prometheus": scraping.requests if scraping else None}
            lowest = {OK: int((driven.records["outcome"] == _number(driven.generated.outcomes, OK)).sum())}
            counted = _settled({name: source for name, source in sources.items() if source is not None}, before, lowest)
        return result(
            order,
            driven,
            watched,
            {**counted, "exact": target.exact()},
            target=options.target,
            title=target.title,
            unit=target.unit,
            shape=options.shape,
        )


def _number(outcomes: list[str], name: str) -> int:
    return outcomes.index(name) if name in outcomes else -1


def _settled(sources: Mapping[str, Any], before: Mapping[str, int], client: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What each source has counted since `before`, once none lags behind the client, or behind another; else what they have."""
    deadline = time.monotonic() + SETTLE_SECONDS
    counted: dict[str, dict[str, int]] = {}
    while True:
        for name, source in sources.items():
            with suppress(OSError):
                now = {code: count - before.get(code, 0) for code, count in source().items()}
                counted[name] = {code: count for code, count in sorted(now.items()) if count}
        settled = not Counters(client=dict(client), **counted).differences() if len(counted) == len(sources) else False
        if settled or time.monotonic() > deadline:
            return counted
        time.sleep(0.5)


def _write(options: Options, found: Result, checks: list[Check]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    at = options.output / f"{options.target}-{options.shape}"
    content = {"checks": checks, **msgspec.structs.asdict(found)}
    durable.replace(at.with_suffix(".html"), report(found, checks))
    durable.replace(at.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(content), indent=1))
    durable.replace(at.with_suffix(".xml"), junit(found, checks))
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, svg in pictures(found).items():
            durable.replace(options.pictures / f"load-{options.target}-{options.shape}-{name}.svg", svg)


def _say(options: Options, found: Result, checks: list[Check], console: Console) -> None:
    total = found.total
    console.print(
        f"{total.requests:,} requests in {found.seconds:.1f} s: {total.ok:,} right, {total.refused:,} refused, "
        f"{total.errors:,} errors, {total.wrong:,} wrong",
        highlight=False,
    )
    for one in checks:
        line = f"  {'ok ' if one.kept else 'NOT'} {one.name}: {one.said}"
        console.print(line, highlight=False, markup=False, soft_wrap=True, style=None if one.kept else "red")
    console.print(f"The report: {options.output / f'{options.target}-{options.shape}'}.html", highlight=False, soft_wrap=True)
