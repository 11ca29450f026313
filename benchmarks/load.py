"""Load on a server, from this machine: as many clients as one likes, each asking again once it is answered, or arrivals that
do not wait for answers.

    closed_loop: wrk, one thread          -> Load: requests, seconds, median and 99th percentile
    open_loop: this process, Poisson      -> Load: the same, each latency from the moment that the request was due
    one_by_one: this process, one client of whatever kind

In a closed loop a slow answer holds back the next question, so what waits is not seen; in the open one it is.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.environments import debian

SCRIPT = Path(__file__).with_name("wrk.lua")
PACKAGES = ("wrk", "libluajit-5.1-2", "libluajit-5.1-common")
GRACE = 10.0  # seconds that an open loop waits for the answers that are still out


class Ask(NamedTuple):
    """A request that is always the same."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def raw(self, host: str) -> bytes:
        """As HTTP/1.1 has it."""
        headers = {"host": host, "content-length": str(len(self.body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + self.body


class Load(NamedTuple):
    """`p50`, `p99` in seconds, of the requests that were answered."""

    requests: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


class LoadFailed(RuntimeError):
    """Requests were refused, or not answered at all."""


def closed_loop(address: tuple[str, int], ask: Ask, *, clients: int, seconds: float, work: Path) -> Load:
    """wrk's `clients` connections for `seconds`. Raises `LoadFailed` where an answer is no 200. `work`: a folder for the body."""
    programs, environ = debian(*PACKAGES)
    body = work / "body"
    body.write_bytes(ask.body)
    command = [str(programs / "wrk"), "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(SCRIPT)]
    command += [f"http://{address[0]}:{address[1]}{ask.path}", "--", str(body)]
    command += [part for header in ask.headers.items() for part in header]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise LoadFailed(f"wrk ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return told_by_wrk(done.stdout)


def told_by_wrk(output: str) -> Load:
    """What `wrk.lua` says in its last line. Raises `LoadFailed`."""
    told = json.loads(output.strip().rpartition("\n")[2])
    if told["refused"] or told["broken"]:
        raise LoadFailed(f"of {told['requests']} requests {told['refused']} were refused, {told['broken']} not answered")
    if not told["requests"]:
        raise LoadFailed("no request was answered")
    return Load(told["requests"], told["duration"] / 1e6, told["p50"] / 1e6, told["p99"] / 1e6)


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """When requests arrive, in seconds from the start, rising: gaps are exponential, `rate` a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=round(rate * seconds * 1.5) + 20)
    at = np.cumsum(gaps)
    moments: list[float] = at[at < seconds].tolist()
    return moments


def open_loop(address: tuple[str, int], ask: Ask, due: Sequence[float], *, connections: int = 256) -> Load:
    """Sends each request when it is due, whatever became of those before it; latencies count from that moment.

    A request that finds all connections busy waits for one, and that counts too. Raises `LoadFailed` where an answer is no 200
    or does not come within ten seconds after the last was due.
    """
    raw = ask.raw(f"{address[0]}:{address[1]}")
    free: dict[int, Connection] = {}  # by file descriptor
    busy: dict[int, tuple[Connection, float]] = {}  # the same, with when it was due
    waiting: deque[float] = deque()
    latencies: list[float] = []
    following = 0
    started = time.perf_counter()
    with select.epoll() as ready:
        try:
            while following < len(due) or waiting or busy:
                now = time.perf_counter() - started
                if now > due[-1] + GRACE:
                    raise LoadFailed(f"{len(waiting) + len(busy)} of {len(due)} requests are still not answered")
                while following < len(due) and due[following] <= now:
                    waiting.append(due[following])
                    following += 1
                while waiting and (free or len(busy) < connections):
                    if free:
                        _, connection = free.popitem()
                    else:
                        connection = Connection(address)
                        ready.register(connection.socket, select.EPOLLIN)
                    busy[connection.socket.fileno()] = connection, waiting.popleft()
                    connection.send(raw)
                pause = min(1.0, max(0.0, due[following] - (time.perf_counter() - started))) if following < len(due) else 1.0
                if not select.select([ready], [], [], pause)[0]:  # unlike epoll itself it counts microseconds
                    continue
                for descriptor, _ in ready.poll(0):
                    if descriptor in free:  # which the server has no patience with any more
                        free.pop(descriptor).socket.close()
                        continue
                    connection, scheduled = busy[descriptor]
                    if connection.receive():
                        latencies.append(time.perf_counter() - started - scheduled)
                        del busy[descriptor]
                        free[descriptor] = connection
        finally:
            for connection in [*free.values(), *(one for one, _ in busy.values())]:
                connection.socket.close()
    return _load(latencies, time.perf_counter() - started)


def one_by_one(call: Callable[[], object], seconds: float) -> Load:
    """`call`, which sends a request and waits for its answer, as often as it can."""
    latencies = []
    started = ended = time.perf_counter()
    while ended - started < seconds:
        began = time.perf_counter()
        call()
        ended = time.perf_counter()
        latencies.append(ended - began)
    return _load(latencies, ended - started)


def _load(latencies: Sequence[float], seconds: float) -> Load:
    p50, p99 = np.quantile(latencies, (0.5, 0.99))
    return Load(len(latencies), seconds, float(p50), float(p99))


class Connection:
    """A connection that is kept, with at most one request out on it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = bytearray()

    def send(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def receive(self) -> bool:
        """Takes what has come; whether it is all of the answer. Raises `LoadFailed` for one that is no 200."""
        part = self.socket.recv(1 << 16)  # a larger buffer is mapped anew for each answer
        self._got += part
        head, ended, body = self._got.partition(b"\r\n\r\n")
        if not part:
            raise LoadFailed("the server closed a connection on which it owed an answer")
        if not ended:
            return False
        if len(body) < _content_length(head):
            return False
        if not head.startswith(b"HTTP/1.1 200 "):
            raise LoadFailed(f"refused: {bytes(head[:20])!r} ... {bytes(body[:200])!r}")
        self._got.clear()
        return True


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise LoadFailed("the answer does not tell its length")
