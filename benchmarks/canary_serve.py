"""A canary on Ray Serve: what stable's callers notice of it, and how soon a bad one has no callers left.

    python -m benchmarks.canary_serve [--rounds 5] [--seconds 4] [--markdown FILE]

    each placement, each round: no canary -> wrk; a canary at 10% -> wrk, in the same replica -> their ratios
    a rollout of a canary that always fails, two replicas: its first failure -> the last, and the decision to take it off

The tiny model of `benchmarks/serving.py`, JSON, a row a request, one worker and 32 clients. *stable's*: each request has a key
that is stable's. *all*: each request has another key, so that a tenth is the canary's. *the canary's*: each has a key that is
the canary's, and is compared with the same requests when stable answered them. Medians; spread: largest minus smallest of the
rounds' ratios, over their median.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.load import Ask, Load, closed_loop
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, packaged
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
WAIT_SECONDS: Final = 60.0  # for a revision to be taken up


class Round(NamedTuple):
    """Loads by whose keys they are; `before`: without a canary."""

    before: dict[str, Load]
    beside: dict[str, Load]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
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
    model, repository = packaged(options.root, "tiny", TINY)
    models = Path(shutil.copytree(repository, work / "models"))
    package_model(model, name=MODEL, repository=open_repository(models), config=model.with_suffix(".toml"))
    log = ReleaseLog(open_repository(models), MODEL)
    x, y = example(model)
    ask = WAYS["triform"].encodings["JSON"].ask(x)
    rows = []
    for placement, args in PLACEMENTS.items():
        log.set(stable=1)
        place = Place(model, models, work, {"poll_s": POLL_SECONDS, **args})
        with WAYS["triform"].started(sys.executable, place, x, y) as server:
            rounds = []
            for number in range(options.rounds):
                order = (True, False) if number % 2 else (False, True)
                seen = {beside: loads(server.address, log, ask, options.seconds, work, beside=beside) for beside in order}
                rounds.append(Round(seen[False], seen[True]))
                print(f"{placement}, round {number + 1} of {options.rounds}", flush=True)
        rows += [[placement, whose, *told([(r.before[whose], r.beside[whose]) for r in rounds])] for whose in rounds[0].before]
    columns = ["canary", "keys", "none: req/s", "p50 ms", "at 10%: req/s", "p50 ms"]
    columns += ["req/s, times", "spread", "p50, times", "spread"]
    report.table(f"A canary at 10% beside none, {CLIENTS} clients", columns, rows)


def loads(address: tuple[str, int], log: ReleaseLog, ask: Ask, seconds: int, work: Path, *, beside: bool) -> dict[str, Load]:
    """With a canary, or (`beside=False`) the same requests without: then stable answers all of them."""
    release = log.set(canary=Canary(2, WEIGHT, RULE))  # whose keys these are
    keyed = {"stable's": with_key(ask, release, 1), "all": ask, "the canary's": with_key(ask, release, 2)}
    if not beside:
        log.set()
    until_answered_by(address, keyed["the canary's"], 2 if beside else 1)
    return {whose: closed_loop(address, it, clients=CLIENTS, seconds=seconds, work=work) for whose, it in keyed.items()}


def told(pairs: list[tuple[Load, Load]]) -> list[str]:
    cells = []
    for side in 0, 1:
        cells.append(f"{statistics.median(pair[side].rate for pair in pairs):,.0f}")
        cells.append(f"{statistics.median(pair[side].p50 for pair in pairs) * 1e3:.2f}")
    for ratios in [b.rate / a.rate for a, b in pairs], [b.p50 / a.p50 for a, b in pairs]:
        middle = statistics.median(ratios)
        cells += [f"{middle:.3f}", f"{(max(ratios) - min(ratios)) / middle:.0%}"]
    return cells


def with_key(ask: Ask, release: Release, version: int) -> Ask:
    """The request of a user whom the version answers."""
    split, users = TrafficSplit.of(release), map("user-{}".format, range(10_000))
    user = next(user for user in users if split.choose(user.encode()) == version)
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
    failed, back = [], []
    place = Place(model, work / "models", work, {"poll_s": POLL_SECONDS, "num_replicas": 2, "num_cpus": 0})
    with WAYS["triform"].started(sys.executable, place, x, y) as server:
        for number in range(options.rounds):
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
            print(f"a bad canary, round {number + 1} of {options.rounds}: {len(callers.failures)} failures", flush=True)
    rows = [
        [until, *(f"{1e3 * of(seconds):.0f}" for of in (statistics.median, max))]
        for until, seconds in (("the last failure", failed), ("the decision to take it off", back))
    ]
    title = f"A canary that always fails: from the first failure on, {options.rounds} times, two replicas, {CALLERS} callers"
    report.table(title, ["until", "median ms", "longest ms"], rows)


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
    """Each asks the same again and again. `failures`: when answers came that were none, in Unix time."""

    def __init__(self, address: tuple[str, int], ask: Ask) -> None:
        self.failures: list[float] = []
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
            time.sleep(0.001)
        connection.close()


if __name__ == "__main__":
    main()
