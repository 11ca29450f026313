"""One load run from its options to its report: Options, checked -> target -> drive -> Result -> checks -> files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from examples.flights.scoring import MODEL
from examples.flights.serving import local_serve
from loadtests import flights, targets
from loadtests.driving import drive
from loadtests.junit import junit
from loadtests.metrics import prometheus
from loadtests.options import Checked, Options
from loadtests.payloads import Payloads
from loadtests.report import pictures, report
from loadtests.results import Counters, Result, client_counters, result
from loadtests.targets import Target
from loadtests.thresholds import Check, judge
from loadtests.watching import watching
from triform.errors import ConfigurationError
from triform.stores import durable

SETTLE_SECONDS: Final = 60.0  # that counters may lag behind: replicas tell Ray every 5 s, Ray its page every 10


def run(options: Options, checked: Checked, secret: str | None, console: Console) -> bool:
    """Whether all limits were kept. Raises `ConfigurationError` where something is not there, `TriformError` where it fails."""
    for name, folder in {"--output": options.output, "--pictures": options.pictures}.items():
        if folder is not None:
            _make(name, folder)
    with ExitStack() as stack:
        target, payloads = stack.enter_context(_target(options, checked, console))
        found = _asked(options, checked, target, payloads, secret, console)
    checks = judge(found, checked.limits)
    _write(options, found, checks)
    _say(options, found, checks, console)
    return all(check.kept for check in checks)


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
            given = {name: source for name, source in sources.items() if source is not None}
            counted = _settled(given, before, client_counters(driven))
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


def _settled(sources: Mapping[str, Any], before: Mapping[str, int], client: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What each source has counted since `before`, once none lags behind the client, or behind another; else what they have."""
    deadline = time.monotonic() + SETTLE_SECONDS
    counted: dict[str, dict[str, int]] = {}
    while True:
        for name, source in sources.items():
            with suppress(OSError):
                now = {code: count - before.get(code, 0) for code, count in source().items()}
                counted[name] = {code: count for code, count in sorted(now.items()) if count}
        together = Counters(client={**client}, server=counted.get("server"), prometheus=counted.get("prometheus"))
        settled = len(counted) == len(sources) and not together.differences()
        if settled or time.monotonic() > deadline:
            return counted
        time.sleep(0.5)


def _make(option: str, folder: Path) -> None:
    """So that a run does not end in vain."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigurationError(f"{option}: {folder} cannot be written to: {error.strerror}") from error


def _write(options: Options, found: Result, checks: list[Check]) -> None:
    at = options.output / f"{options.target}-{options.shape}"
    content = {"checks": checks, **msgspec.structs.asdict(found)}
    durable.replace(at.with_suffix(".html"), report(found, checks))
    durable.replace(at.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(content), indent=1))
    durable.replace(at.with_suffix(".xml"), junit(found, checks))
    if options.pictures is not None:
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
