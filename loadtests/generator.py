"""What asks: `python -m loadtests.generator FOLDER [--master PORT | --worker PORT]`, started by driving.py.

    order.json, payloads.msgpack -> Locust's runner (local, or a master and its workers) -> users.py
    records, every second, as Locust's messages -> Conductor -> records.npz, generated.json

The conductor ends a run that rises until the target does not keep up.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Final

# isort: split
from locust.env import Environment  # patches what blocks: before anything else is imported that could block
from locust.log import setup_logging
from locust.runners import MasterRunner, Runner

# isort: split
import gevent
import msgspec
import numpy as np
from gevent.event import Event
from grpc.experimental.gevent import init_gevent

from loadtests.credentials import SECRET, signer
from loadtests.order import GENERATED, RECORDS, Generated, Order, Stage
from loadtests.payloads import Payloads
from loadtests.records import OK, Collected
from loadtests.users import Work, user_classes
from triform.errors import TriformError

LOOPBACK: Final = "127.0.0.1"
SECONDS: Final = 1.0  # between two messages of a worker
SETTLED: Final = 2.0  # seconds after a stage in which its last answers come
KEEPS_UP: Final = 0.9  # of what was offered in a stage must be answered
MOST_LATE: Final = 120.0  # seconds after the end, and a request's timeout, that workers may need
log = logging.getLogger("loadtests")


class Conductor:
    """Where all workers' records come together."""

    def __init__(self, order: Order, runner: Runner) -> None:
        self.collected = Collected()
        self.saturated: float | None = None
        self.began = math.inf
        self.done = 0
        self.ended = Event()
        self._order = order
        self._runner = runner
        self._answered = np.zeros(len(order.stages))
        self._begins = np.array([stage.begin for stage in order.stages])
        runner.register_message("triform_records", self._on_records)

    def _on_records(self, environment: Environment, msg: Any, **_: Any) -> None:  # noqa: ARG002 - Locust gives it by name
        part = self.collected.absorb(msg.data)
        self.began = min(self.began, msg.data["began"] or math.inf)
        if OK in self.collected.outcomes:
            due = part["due"][part["outcome"] == self.collected.outcomes.index(OK)] - msg.data["began"]
            at = np.searchsorted(self._begins, due, side="right") - 1
            np.add.at(self._answered, np.maximum(at, 0), 1)
        self.done += msg.data["done"]
        if self.done >= self._order.workers:
            self.ended.set()

    def watch(self) -> None:
        """Ends the run after the first stage that is not kept up with."""
        began = gevent.get_hub().loop.now()
        for number, stage in enumerate(self._order.stages):
            gevent.sleep(max(0.0, began + stage.end + SETTLED - gevent.get_hub().loop.now()))
            if kept_up(stage, self._order.rate, self._answered[number]):
                continue
            self.saturated = stage.begin
            self._runner.send_message("triform_stop")
            return


def kept_up(stage: Stage, rate: float, answered: float) -> bool:
    """Whether so many answers are what the stage offered, as far as chance (Poisson, three deviations) lets one tell."""
    offered = rate * stage.level * stage.seconds
    return answered >= KEEPS_UP * offered - 3 * math.sqrt(offered)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.generator")
    parser.add_argument("folder", type=Path)
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--master", type=int, metavar="PORT")
    role.add_argument("--worker", type=int, metavar="PORT")
    given = parser.parse_args()
    setup_logging("WARNING")  # type: ignore[no-untyped-call]  # Locust's
    init_gevent()  # else a gRPC call holds up all greenlets
    try:
        order = Order.read(given.folder)
        if given.worker is not None:
            work(order, given.folder, given.worker)
        else:
            conduct(order, given.folder, given.master)
    except TriformError as error:
        sys.exit(f"error: {error}")


def work(order: Order, folder: Path, port: int) -> None:
    """One of several workers, until its master lets it go."""
    working: list[Work] = []
    environment = Environment(user_classes=user_classes(order, working))
    runner = environment.create_worker_runner(LOOPBACK, port)
    _work_for(order, folder, environment, runner, runner.worker_index, working)
    runner.greenlet.join()
    runner.client.close(linger=0)  # type: ignore[no-untyped-call]  # else ZeroMQ waits, at the end, for a master that is gone


def conduct(order: Order, folder: Path, port: int | None) -> None:
    """The master of `order.workers` workers, or with no port all that there is. Writes what came of it into the folder."""
    working: list[Work] = []
    environment = Environment(user_classes=user_classes(order, working))
    runner: Runner
    if port is None:
        runner = environment.create_local_runner()
    else:
        runner = environment.create_master_runner(LOOPBACK, port)
        _await_workers(runner, order.workers)
    conductor = Conductor(order, runner)
    if port is None:
        _work_for(order, folder, environment, runner, 0, working)
    users = order.workers if order.loop == "open" else order.users
    runner.start(users, spawn_rate=max(users, 100))
    watching = gevent.spawn(conductor.watch) if order.saturates else None
    ended = conductor.ended.wait(order.seconds + order.timeout + MOST_LATE)
    if watching is not None:
        watching.kill()
    if not ended:
        raise TriformError(f"{order.workers - conductor.done} of {order.workers} workers did not end in time")
    gevent.sleep(0 if port is None else 3.5)  # Locust's workers tell their statistics every three seconds
    _write(conductor, environment, folder, order)
    runner.quit()


def _await_workers(runner: MasterRunner, count: int) -> None:
    with gevent.Timeout(60, TriformError(f"fewer than {count} workers came within 60 s")):
        while len(runner.clients.ready) < count:
            gevent.sleep(0.05)


def _work_for(order: Order, folder: Path, environment: Environment, runner: Runner, index: int, working: list[Work]) -> None:
    """Gets this process's work ready, and tells the conductor of it while it lasts."""
    payloads = Payloads.read(folder)
    made = Work(order, payloads, signer(order.auth, os.environ.get(SECRET), order.region), environment, max(index, 0))
    working.append(made)

    def stop(**_: Any) -> None:
        made.stopping = True

    def tell() -> None:
        done = False
        while not done:
            done = bool(made.ended.wait(SECONDS))
            runner.send_message("triform_records", {**made.recorder.take(), "done": done, "began": made.began})

    runner.register_message("triform_stop", stop)
    gevent.spawn(tell)


def _write(conductor: Conductor, environment: Environment, folder: Path, order: Order) -> None:
    collected, total = conductor.collected, environment.stats.total
    collected.save(folder / RECORDS)
    payloads = Payloads.read(folder).payloads
    told = Generated(
        outcomes=collected.outcomes,
        examples=collected.examples,
        protocols=[*{payload.protocol: None for payload in payloads}],
        workers=order.workers,
        began=conductor.began,
        saturated=conductor.saturated,
        locust_requests=total.num_requests,
        locust_failures=total.num_failures,
        locust_warned=bool(environment.runner is not None and environment.runner.cpu_log_warning()),
    )
    (folder / GENERATED).write_bytes(msgspec.json.encode(told))


if __name__ == "__main__":
    main()
