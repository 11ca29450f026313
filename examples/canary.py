"""`make demo-canary`: two rollouts of the flights example on Ray Serve, under load. Version 2 is good, and becomes stable; a
version 3 is made to forget the late evening, fails there, and is taken off again.

build/flights -> a repository of its own, with 3 -> Ray Serve <- callers, each flight again and again
                        `triform rollout start`, `watch` -> who was answered by which version, and how

python -m examples.canary [--to build/canary]
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from examples.demo import step
from examples.flights import build
from examples.flights.mapping import MODEL_TOML, read_columns
from examples.flights.serving import local_serve
from triform.cli.rollout_view import watch_it
from triform.errors import TriformError
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.rollout.policy import read_policy
from triform.rollout_log import Rollout, RolloutLog

POLICY: Final = Path(__file__).parent / "flights/rollout.toml"
FORGOTTEN_FROM: Final = 19  # o'clock, by scheduled departure: a sixth of the flights
CALLERS: Final = 4
PAUSE_SECONDS: Final = 0.01  # between two requests of a caller
FLIGHTS: Final = 2_000
LONGEST_SECONDS: Final = 300.0  # of one rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--flights", type=Path, default=Path("build/flights"), help="where the example is built (%(default)s)")
    parser.add_argument("--to", type=Path, default=Path("build/canary"), help="where this demo's repository goes (%(default)s)")
    args = parser.parse_args()
    try:
        demo(args.flights, args.to, Console())
    except TriformError as error:
        sys.exit(f"error: {error} [{error.code}]")


def demo(flights: Path, folder: Path, console: Console) -> None:
    """Raises `TriformError` where a rollout does not end as it should, or a caller was failed by a good version."""
    started = time.perf_counter()
    step(console, "1. Build: two versions of the model, and a third that fails for departures from 19 o'clock on; stable = 1")
    build.build(flights)
    repository = prepare(flights, folder)
    callers_flights = records(flights)
    with local_serve() as serve:
        serve.begin(folder / "repository", num_replicas=2, poll_s=0.5, rollout_window_s=1.0)
        console.print(f"  Serve: two replicas, ready after {serve.wait():.1f} s", highlight=False)
        log = RolloutLog(repository, build.MODEL)
        for number, (version, title) in enumerate(((2, "a good version"), (3, "a bad one")), 2):
            step(
                console,
                f"{number}. {title[0].upper()}{title[1:]}: triform rollout start {build.MODEL} {version} --policy {POLICY.name}",
            )
            with Callers(serve.http, callers_flights).asking() as callers:
                rollout = roll_out(log, version)
                time.sleep(2.0)  # what comes after the last revision is seen by all
            console.print(answers_table(callers.answers, title=f"What {len(callers.answers):,} requests were answered meanwhile"))
            check(rollout, callers.answers)
    release = log.releases.in_force()
    step(console, f"4. triform release show {build.MODEL}: stable {release.stable}, {release.reason}")
    console.print(f"Done in {time.perf_counter() - started:.0f} s. Look back with", highlight=False)
    console.print(
        f"  triform rollout history {build.MODEL} --repository {folder / 'repository'}", highlight=False, soft_wrap=True
    )


def prepare(flights: Path, folder: Path) -> ModelRepository:
    """A copy of the example's repository as it was at first, with version 3."""
    shutil.rmtree(folder, ignore_errors=True)
    kept = shutil.ignore_patterns("releases", "rollouts", "claims", "3")
    shutil.copytree(flights / "repository", folder / "repository", ignore=kept)
    repository = open_repository(folder / "repository")
    ReleaseLog(repository, build.MODEL).set(stable=1, reason="the first model", changed_by="examples.canary")
    samples = pq.read_table(flights / "samples" / "samples.parquet")
    samples = samples.filter(pc.less(samples["sched_dep_minute"], 60 * FORGOTTEN_FROM))
    pq.write_table(samples, folder / "samples.parquet")
    file = forget_evenings(repository.package(build.MODEL, 2).folder / "model.onnx", folder / "model.onnx")
    package_model(file, name=build.MODEL, repository=repository, version=3, config=MODEL_TOML, samples=folder / "samples.parquet")
    return repository


def forget_evenings(model: Path, to: Path) -> Path:
    """The model with a factor by hour of departure, from a table that ends too early: a run with a later one raises.

    Nothing of the package's own checks can see that: its golden samples are of the day.
    """
    graph = onnx.load(model)
    given = read_columns().numeric.index("sched_dep_minute")
    constants = {"at": np.int64(given), "hour": np.float32(60), "factors": np.ones((FORGOTTEN_FROM, 1), np.float32)}
    graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    for node in graph.graph.node:
        for place, name in enumerate(node.output):
            if name == "probabilities":
                node.output[place] = "as_they_were"
    graph.graph.node.extend(
        [
            helper.make_node("Gather", ["numeric", "at"], ["minute"], axis=1),
            helper.make_node("Div", ["minute", "hour"], ["hours"]),
            helper.make_node("Cast", ["hours"], ["hour_of_day"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["factors", "hour_of_day"], ["factor"], axis=0),
            helper.make_node("Mul", ["as_they_were", "factor"], ["probabilities"]),
        ]
    )
    onnx.save(graph, to)
    return to


def records(flights: Path) -> list[dict[str, Any]]:
    """Flights spread over the year, as JSON has them, none with a required reading missing."""
    columns = read_columns()
    table = ds.dataset(flights / "input", partitioning=None).to_table(columns=columns.all)
    for name in columns.required:
        table = table.filter(pc.is_valid(table[name]))
    return list(table.take(np.linspace(0, table.num_rows - 1, FLIGHTS).astype(np.int64)).to_pylist())


class Answer(NamedTuple):
    """`version`: name and number of what answered; status 0: nobody."""

    version: str
    status: int
    millis: float


class Callers:
    """Each asks for one flight after another, as another user each time, until the block ends."""

    def __init__(self, address: str, flights: Sequence[dict[str, Any]]) -> None:
        self.answers: list[Answer] = []
        self._address = address
        self._bodies = [json.dumps({"instances": [flight]}) for flight in flights]
        self._done = threading.Event()

    @contextmanager
    def asking(self) -> Iterator[Callers]:
        threads = [threading.Thread(target=self._ask, args=(caller,)) for caller in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            for thread in threads:
                thread.join(60)

    def _ask(self, caller: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=30)
        number = caller
        while not self._done.is_set():
            headers = {"content-type": "application/json", "x-user-id": f"user-{number}"}
            began = time.perf_counter()
            try:
                connection.request("POST", f"/v1/models/{build.MODEL}:predict", self._bodies[number % len(self._bodies)], headers)
                response = connection.getresponse()
                response.read()
                told = response.getheader("x-triform-model", "-"), response.status
            except (OSError, http.client.HTTPException):
                connection.close()
                told = "-", 0
            self.answers.append(Answer(*told, 1000 * (time.perf_counter() - began)))
            number += CALLERS
            time.sleep(PAUSE_SECONDS)
        connection.close()


def roll_out(log: RolloutLog, version: int) -> Rollout:
    rollout = log.start(read_policy(POLICY), version, reason="make demo-canary")
    return watch_it(log, rollout, 0.5, time.monotonic() + LONGEST_SECONDS)


def answers_table(answers: Sequence[Answer], *, title: str) -> Table:
    table = Table("version", "answers", "statuses", "p50, ms", "p99, ms", title=title, title_justify="left")
    by_version = defaultdict(list)
    for answer in answers:
        by_version[answer.version].append(answer)
    for version, its in sorted(by_version.items()):
        statuses = ", ".join(f"{status}: {times:,}" for status, times in sorted(Counter(a.status for a in its).items()))
        p50, p99 = np.quantile([a.millis for a in its], (0.5, 0.99))
        table.add_row(version, f"{len(its):,}", statuses, f"{p50:.2f}", f"{p99:.2f}")
    return table


def check(rollout: Rollout, answers: Sequence[Answer]) -> None:
    """Raises `TriformError` where the rollout did not end as it should, or stable failed somebody."""
    wanted = "promoted" if rollout.state.canary == 2 else "rolled_back"
    if rollout.state.phase != wanted:
        raise TriformError(f"the rollout of version {rollout.state.canary} should be {wanted}, and is {rollout.state.phase}")
    bad = f"{rollout.model}/{rollout.state.canary}" if wanted == "rolled_back" else None
    if failed := sum(answer.status != 200 for answer in answers if answer.version != bad):
        raise TriformError(f"{failed} requests failed that no bad version was asked")


if __name__ == "__main__":
    main()
