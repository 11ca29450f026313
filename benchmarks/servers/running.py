"""A server in processes of its own: started, its first answer held against the model's, and ended whatever happens.

Popen -> ask until it answers -> is the answer right? -> Running -> SIGTERM -> what is left of its processes is killed
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from benchmarks.environments import ROOT
from benchmarks.load import Ask
from benchmarks.processes import Tree

T = TypeVar("T")
HOST = "127.0.0.1"
START_S, STOP_S = 120.0, 20.0


class ServerFailed(RuntimeError):
    """It does not start, or answers what is not right; the message says which, with the end of its log."""


class Encoding(NamedTuple):
    """How a server is asked for rows, and how its answer is read: float32 [rows, features] -> Ask; body, headers -> float32."""

    ask: Callable[[Any], Ask]
    read: Callable[[bytes, Mapping[str, str]], Any]


class Running:
    """A server that answers, at `address`, and some over gRPC at `grpc`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, grpc_port: int) -> None:
        self.address = (HOST, port)
        self.grpc = (HOST, grpc_port)
        self._tree = Tree(process.pid, driver_scores=True)

    def cpu(self) -> float:
        """CPU seconds so far of all its processes."""
        return self._tree.look().cpu

    def measured(self, load: Callable[[], T]) -> tuple[T, float]:
        """What the load came to, and the CPU seconds of the server's processes meanwhile."""
        before = self.cpu()
        result = load()
        return result, self.cpu() - before

    def end(self) -> None:
        self._tree.end()


@contextmanager
def running(
    command: Sequence[str],
    ports: tuple[int, int],
    *,
    environ: Mapping[str, str],
    check: Callable[[Running], None],
    log: Path,
) -> Iterator[Running]:
    """The server that the command starts, once `check` (which may raise `OSError` as long as it is not up) has passed.

    `ports`: for HTTP and gRPC. In a session of its own, so that Ctrl-C reaches this process alone, which ends the server. Raises
    `ServerFailed`.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environ}, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    server = Running(process, *ports)
    try:
        _await(server, process, check, log)
        yield server
        server.cpu()  # who is there, before they go
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        server.end()
        process.wait(STOP_S)


def _await(server: Running, process: subprocess.Popen[bytes], check: Callable[[Running], None], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            server.cpu()  # takes note of its processes while their parents live
            check(server)
            return
        except (OSError, http.client.HTTPException) as error:
            failed = f"{type(error).__name__}: {error}"
        if process.poll() is not None:
            failed = f"it ended with {process.returncode}"
        elif time.monotonic() < deadline:
            time.sleep(0.2)
            continue
        raise ServerFailed(f"{failed}; {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"its log ends: {lines[-1][:200]}" if lines else "its log is empty"


def check_answer(server: Running, encoding: Encoding, x: Any, y: Any) -> None:
    """Raises `ServerFailed` where rows `x` are not answered with `y`, `OSError` where nobody answers well yet."""
    ask = encoding.ask(x)
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        connection.request("POST", ask.path, ask.body, dict(ask.headers))
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise ConnectionError(f"{answer.status} {body[:200]!r}")
    headers = {name.lower(): value for name, value in answer.getheaders()}
    got, wanted = np.ravel(encoding.read(body, headers)), np.ravel(y)
    if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=1e-4, atol=1e-5):
        raise ServerFailed(f"it answers {got[:3]}, the model {wanted[:3]}")
