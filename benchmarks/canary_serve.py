"""A canary on Ray Serve: what stable's callers notice of it, and how soon a bad one has no callers left.

    python -m benchmarks.canary_serve [--rounds 100] [--seconds 1] [--breaks 5] [--markdown FILE]

    each placement: one server with the same model under two names ──► wrk, by turns ──► ratios, before there is a canary
                    one of the names has a canary at 10% ────────────► wrk, by turns ──► ratios
                    and what the server takes with nobody asking, before there was a canary and with it
    a rollout of a canary that always fails, two replicas: its first failure -> the last, and the decision to take it off
    a canary that is given its keys and loses them again by revisions: each revision -> the last answer that knows nothing of it

The tiny model of `benchmarks/serving.py`, JSON, a row a request, one worker and 32 clients. Both names are answered by the same
process, so that neither the pace of a process nor the hour counts. What runs beside it because there is a canary (the
controller's process) is there in both turns, and so has a table of its own; replicas of an isolated canary are there from the
start. *nobody's*: before there is a canary, which tells what the two names differ by anyway. *stable's*: each request has the key
of one user who is stable's, and whom the server knows after his first request. *all*: each request has another key, so that a
tenth is the canary's. *the canary's*: the key of one user who is the canary's. The requests to the name without a canary are the
same. Ratios are medians of the rounds, with their 95% confidence interval from order statistics. *All* and *the canary's* are
every fourth round.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import math
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.load import Ask, Load, closed_loop
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, packaged
from benchmarks.servers.running import Running
from benchmarks.servers.ways import MODEL, WAYS, Place
from triform.packaging import package_model
from triform.releases import Canary, Release, ReleaseLog
from triform.repository import open_repository
from triform.rollout.policy import Policy, Step
from triform.rollout_log import RolloutLog
from triform.splitting import KeyRule, TrafficSplit

WEIGHT: Final = 0.1
CLIENTS: Final = 32
RULE: Final = KeyRule(header="x-user-id")
PLACEMENTS: Final[Mapping[str, dict[str, Any]]] = {"in-process": {}, "isolated": {"canary": {"num_replicas": 1, "num_cpus": 0}}}
POLL_SECONDS: Final = 1.0  # between two looks at the release log
CALLERS: Final = 8
FAILS: Final = 3  # what a bad canary's first input must not be
NOBODYS: Final = "nobody's"
STABLES: Final = "stable's"
CANARYS: Final = "the canary's"
ALONE: Final = "standalone"  # the model's other name, which has no canary; as long as the first
OTHERS: Final = 4  # rounds, of which one has the other keys too
WARM_UP: Final = 8  # seconds
IDLE_SECONDS: Final = 20
WAIT_SECONDS: Final = 60.0  # for a revision to be taken up
TOLD: Final = ("median ms", "longest ms")

T = TypeVar("T")


class Seen(NamedTuple):
    """`cpu`: seconds of the server's processes for one request."""

    load: Load
    cpu: float


class Pair(NamedTuple, Generic[T]):
    """Of the name without a canary, and of that with one."""

    alone: T
    beside: T


class Host(NamedTuple):
    """A server, the log of the model whose canary it is, and a request to that."""

    server: Running
    log: ReleaseLog
    ask: Ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each placement")
    parser.add_argument("--seconds", type=int, default=1, help="of each measurement")
    parser.add_argument("--breaks", type=int, default=5, help="canaries that fail")
    parser.add_argument("--root", type=Path, default=Path("build"), help="where models go")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        compare(options, Path(work), report)
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        break_in(options, Path(work), report)
    if options.markdown:
        report.write(options.markdown)


def compare(options: argparse.Namespace, work: Path, report: Report) -> None:
    rows, idle = [], []
    for placement, args in PLACEMENTS.items():
        # short, as the path of a socket may have some hundred characters
        with hosted(options.root, work / placement[:2], args) as host:
            before = idle_cpu(host)
            pairs = by_turns(options, host, {NOBODYS: pair_of(with_user(host.ask, "anybody"))}, work)
            asks = shared(host)
            idle.append([placement, *(f"{share:.1%}" for share in (before, idle_cpu(host)))])
            pairs |= by_turns(options, host, asks, work)
        rows += [[placement, whose, *told(seen)] for whose, seen in pairs.items()]
    columns = ["canary", "keys", "none: req/s", "p50 ms", "CPU us", "at 10%: req/s", "p50 ms", "CPU us"]
    columns += ["req/s, times", "95%", "p50, times", "95%", "CPU, times", "95%"]
    report.table(f"A name with a canary at 10% beside one without, {CLIENTS} clients", columns, rows)
    report.table("CPU time with nobody asking, of one core", ["canary", "none", "at 10%"], idle)


def by_turns(options: argparse.Namespace, host: Host, asks: Mapping[str, Pair[Ask]], work: Path) -> dict[str, list[Pair[Seen]]]:
    """What was seen, by whose keys."""
    seen: dict[str, list[Pair[Seen]]] = {whose: [] for whose in asks}
    first = next(iter(asks))
    for ask in asks[first]:
        measured(host, ask, WARM_UP, work)
    for number in range(options.rounds):
        for whose, pair in asks.items():
            if whose != first and number % OTHERS:
                continue
            turns = [(i, pair[i]) for i in ((0, 1) if len(seen[whose]) % 2 else (1, 0))]
            found = {i: measured(host, ask, options.seconds, work) for i, ask in turns}
            seen[whose].append(Pair(found[0], found[1]))
        print(f"round {number + 1} of {options.rounds}", flush=True)
    return seen


@contextmanager
def hosted(root: Path, work: Path, args: Mapping[str, Any]) -> Iterator[Host]:
    """A server with two versions of the model, and one of it under the other name."""
    model, repository = packaged(root, "tiny", TINY)
    models = Path(shutil.copytree(repository, work / "models"))
    for name in MODEL, ALONE:
        package_model(model, name=name, repository=open_repository(models), config=model.with_suffix(".toml"))
    log = ReleaseLog(open_repository(models), MODEL)
    log.set(stable=1)
    x, y = example(model)
    with WAYS["triform"].started(sys.executable, Place(model, models, work, {"poll_s": POLL_SECONDS, **args}), x, y) as server:
        yield Host(server, log, WAYS["triform"].encodings["JSON"].ask(x))


def shared(host: Host) -> dict[str, Pair[Ask]]:
    """Requests by whose they are, once the model has a canary that answers its keys: to the name without one, and to this."""
    release = host.log.set(canary=Canary(2, WEIGHT, RULE))
    asks = {STABLES: with_key(host.ask, release, 1), "all": host.ask, CANARYS: with_key(host.ask, release, 2)}
    until_answered_by(host.server.address, asks[CANARYS], 2)
    return {whose: pair_of(ask) for whose, ask in asks.items()}


def pair_of(ask: Ask) -> Pair[Ask]:
    """The same request to either name."""
    return Pair(ask._replace(path=ask.path.replace(MODEL, ALONE)), ask)


def idle_cpu(host: Host) -> float:
    """The share of one core that the server's processes take with nobody asking."""
    time.sleep(WARM_UP)  # the first canary starts the controller's process
    _, cpu = host.server.measured(partial(time.sleep, IDLE_SECONDS))
    return cpu / IDLE_SECONDS


def measured(host: Host, ask: Ask, seconds: int, work: Path) -> Seen:
    load, cpu = host.server.measured(partial(closed_loop, host.server.address, ask, clients=CLIENTS, seconds=seconds, work=work))
    return Seen(load, cpu / load.requests)


def told(pairs: Sequence[Pair[Seen]]) -> list[str]:
    """Medians of either side, then of the ratios, each with its interval."""
    cells = []
    for side in "alone", "beside":
        seen: list[Seen] = [getattr(pair, side) for pair in pairs]
        cells.append(f"{statistics.median(one.load.rate for one in seen):,.0f}")
        cells.append(f"{statistics.median(one.load.p50 for one in seen) * 1e3:.2f}")
        cells.append(f"{statistics.median(one.cpu for one in seen) * 1e6:,.0f}")
    values: list[Callable[[Seen], float]] = [lambda one: one.load.rate, lambda one: one.load.p50, lambda one: one.cpu]
    for value in values:
        ratios = [value(pair.beside) / value(pair.alone) for pair in pairs]
        cells += [f"{statistics.median(ratios):.3f}", interval(ratios)]
    return cells


def interval(values: Sequence[float]) -> str:
    """In which the median is with 95% confidence, if there are enough: the ranks that a fair coin's throws leave out on either
    side with 2.5% at most."""
    ranked, below, out = sorted(values), 0.0, -1
    for k in range(len(values)):
        below += math.comb(len(values), k) / 2 ** len(values)
        if below > 0.025:
            break
        out = k
    return "" if out < 0 else f"{ranked[out]:.3f} to {ranked[-1 - out]:.3f}"


def with_key(ask: Ask, release: Release, version: int) -> Ask:
    """The request of a user whom the version answers."""
    split, users = TrafficSplit.of(release), map("user-{}".format, range(10_000))
    return with_user(ask, next(user for user in users if split.choose(user.encode()) == version))


def with_user(ask: Ask, user: str) -> Ask:
    return ask._replace(headers={**ask.headers, str(RULE.header): user})


def until_answered_by(address: tuple[str, int], ask: Ask, version: int) -> None:
    """For a second, so that all replicas have taken the revision up."""
    deadline, since = time.monotonic() + WAIT_SECONDS, None
    connection = http.client.HTTPConnection(*address, timeout=WAIT_SECONDS)
    while since is None or time.monotonic() < since + 1.0:
        connection.request("POST", ask.path, ask.body, dict(ask.headers))
        answer = connection.getresponse()
        answer.read()
        if answer.getheader("x-triform-model") != f"{MODEL}/{version}":
            since = None
        elif since is None:
            since = time.monotonic()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{MODEL}/{version} did not answer within {WAIT_SECONDS:g} s")
    connection.close()


def break_in(options: argparse.Namespace, work: Path, report: Report) -> None:
    model, repository = packaged(options.root, "tiny", TINY)
    models = open_repository(shutil.copytree(repository, work / "models"))
    samples = work / "samples.npz"
    np.savez(samples, x=np.zeros((4, TINY[0]), np.float32))
    package_model(failing(model, work / "failing.onnx"), name=MODEL, repository=models, samples=samples)
    rollouts = RolloutLog(models, MODEL)
    rollouts.releases.set(stable=1)
    x, y = example(model)
    ask = WAYS["triform"].encodings["JSON"].ask(np.full_like(x, FAILS))
    policy = Policy(steps=(Step(weight=WEIGHT),), key=RULE)
    failed, back = list[float](), list[float]()
    place = Place(model, work / "models", work, {"poll_s": POLL_SECONDS, "num_replicas": 2, "num_cpus": 0})
    with WAYS["triform"].started(sys.executable, place, x, y) as server:
        for number in range(options.breaks):
            rollout = rollouts.start(policy, 2)
            callers = Callers(server.address, with_key(ask, rollouts.releases.in_force(), 2))
            with callers.asking():
                deadline = time.monotonic() + WAIT_SECONDS
                while not rollouts.follow(rollout).ended and time.monotonic() < deadline:
                    time.sleep(0.05)
                time.sleep(2 * POLL_SECONDS)  # until all replicas know
            if not rollout.ended or not callers.failures:
                raise TimeoutError(f"the bad canary was not taken off within {WAIT_SECONDS:g} s")
            failed.append(max(callers.failures) - min(callers.failures))
            ended = datetime.datetime.fromisoformat(rollout.entries[-1].at).timestamp()
            back.append(ended - min(callers.failures))
            print(f"a bad canary, round {number + 1} of {options.breaks}: {len(callers.failures)} failures", flush=True)
        given, taken = taken_up(server.address, rollouts.releases, WAYS["triform"].encodings["JSON"].ask(x), options.breaks)
    title = f"A canary that always fails: from the first failure on, {options.breaks} times, two replicas, {CALLERS} callers"
    report.table(title, ["until", *TOLD], of_times({"the last failure": failed, "the decision to take it off": back}))
    title = f"Revisions, {options.breaks} times each, two replicas that look every {POLL_SECONDS:g} s, {CALLERS} callers"
    rows = of_times({"it gives the canary keys": given, "it takes them away": taken})
    report.table(title, ["until the last answer without the revision", *TOLD], rows)


def of_times(seconds: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """As `TOLD` has it."""
    return [[name, *(f"{1e3 * of(values):.0f}" for of in (statistics.median, max))] for name, values in seconds.items()]


def taken_up(address: tuple[str, int], releases: ReleaseLog, ask: Ask, times: int) -> tuple[list[float], list[float]]:
    """Seconds from a revision on until the last answer of the version that its key no longer means: of the canary's beginning,
    and of its end. The answers come from both replicas."""
    seen: tuple[list[float], list[float]] = [], []
    for number in range(times):
        begun = time.time()
        release = releases.set(canary=Canary(2, WEIGHT, RULE))
        for after, (wanted, write) in enumerate([(2, None), (1, releases.rollback)]):
            callers = Callers(address, with_key(ask, release, 2))
            with callers.asking():
                if write is not None:
                    time.sleep(POLL_SECONDS)
                    begun = time.time()
                    write()
                time.sleep(3 * POLL_SECONDS)
            late = [at for at, version in callers.answers if version != wanted and at >= begun]
            seen[after].append(max(late, default=begun) - begun)
            if callers.answers[-1][1] != wanted:
                raise TimeoutError(f"a revision was not taken up within {3 * POLL_SECONDS:g} s")
        print(f"revisions, round {number + 1} of {times}", flush=True)
    return seen


def failing(model: Path, to: Path) -> Path:
    """The model with a table that ends before `FAILS`, where it looks up the first input: a run with that raises."""
    made = onnx.load(model)
    constants = {"first": np.int64(0), "table": np.ones((FAILS, 1), np.float32)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    for node in made.graph.node:
        node.output[:] = ["sound" if name == "y" else name for name in node.output]
    made.graph.node.extend(
        [
            helper.make_node("Gather", ["x", "first"], ["place"], axis=1),
            helper.make_node("Cast", ["place"], ["index"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["factor"], axis=0),
            helper.make_node("Mul", ["sound", "factor"], ["y"]),
        ]
    )
    onnx.save(made, to)
    return to


class Callers:
    """Each asks the same again and again. `failures`: when answers came that were none, in Unix time; `answers`: when others did,
    and of which version."""

    def __init__(self, address: tuple[str, int], ask: Ask) -> None:
        self.failures: list[float] = []
        self.answers: list[tuple[float, int]] = []
        self._address = address
        self._ask = ask
        self._done = threading.Event()

    @contextmanager
    def asking(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join(WAIT_SECONDS)

    def _run(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=WAIT_SECONDS)
        while not self._done.is_set():
            connection.request("POST", self._ask.path, self._ask.body, dict(self._ask.headers))
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                self.failures.append(time.time())
            else:
                self.answers.append((time.time(), int(answer.getheader("x-triform-model", "").rpartition("/")[2])))
            time.sleep(0.001)
        connection.close()


if __name__ == "__main__":
    main()
