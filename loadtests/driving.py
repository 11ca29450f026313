"""Starts what asks, and waits for it: order + payloads -> a folder -> generator.py in one process or several -> its files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from loadtests.credentials import SECRET
from loadtests.order import GENERATED, RECORDS, Generated, Order
from loadtests.payloads import Payloads
from loadtests.records import Columns, load
from ray_apps.ports import free_ports
from triform.errors import TriformError

LOG: Final = "generator.log"
MOST_LATE: Final = 300.0  # seconds


class Driven(NamedTuple):
    """What came of it."""

    records: Columns
    generated: Generated


def drive(order: Order, payloads: Payloads, folder: Path, secret: str | None = None) -> Driven:
    """Runs the order. `folder`: an empty one. Raises `TriformError` where a process fails, or does not end."""
    order.write(folder)
    payloads.write(folder)
    environ = {name: value for name, value in os.environ.items() if name != SECRET}
    if secret is not None:
        environ[SECRET] = secret
    roles: list[list[str]] = [[]]
    if order.workers > 1:
        port = str(free_ports(1)[0])
        roles = [["--master", port], *([["--worker", port]] * order.workers)]
    with (folder / LOG).open("wb") as log:
        processes = [
            subprocess.Popen([sys.executable, "-m", "loadtests.generator", folder, *role], env=environ, stdout=log, stderr=log)
            for role in roles
        ]
    try:
        _await(processes, time.monotonic() + order.seconds + order.timeout + MOST_LATE, folder / LOG)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
    generated = msgspec.json.decode((folder / GENERATED).read_bytes(), type=Generated)
    return Driven(load(folder / RECORDS), generated)


def _await(processes: list[subprocess.Popen[bytes]], deadline: float, log: Path) -> None:
    """Until the first, which has what all of them saw, has ended."""
    while (code := processes[0].poll()) is None:
        if any(process.poll() for process in processes):
            raise TriformError(f"a worker of the load generator failed: {_tail(log)}")
        if time.monotonic() > deadline:
            raise TriformError(f"the load generator does not end: {_tail(log)}")
        time.sleep(0.1)
    if code:
        raise TriformError(f"the load generator failed: {_tail(log)}")
    for process in processes[1:]:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.terminate()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-800:] or "it said nothing"
