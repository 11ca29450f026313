"""Clients that ask again and again until they are told to stop, and remember every answer."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Seen(NamedTuple):
    """An answer, or (status 0) none; `model`: name and version that made it; `began`: `time.monotonic()`."""

    status: int
    model: str
    body: bytes
    began: float
    seconds: float


class Load:
    """Closed-loop clients, each with a connection of its own that it keeps."""

    def __init__(self, address: tuple[str, int], path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.seen: list[Seen] = []
        self._address = address
        self._path = path
        self._body = body
        self._headers = headers
        self._done = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        while not self._done.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", self._path, self._body, dict(self._headers))
                answer = connection.getresponse()
                told = answer.status, answer.getheader("x-triform-model", ""), answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                told = 0, "", repr(error).encode()
            self.seen.append(Seen(*told, began, time.monotonic() - began))
        connection.close()

    def until(self, happened: Callable[[list[Seen]], bool], seconds: float = 90.0) -> None:
        """Waits until it has happened to what was answered from now on."""
        before = len(self.seen)
        until(lambda: happened(self.seen[before:]), seconds)

    def stop(self) -> None:
        self._done.set()


@contextmanager
def load(
    address: tuple[str, int], path: str, body: bytes, clients: int = 4, headers: Mapping[str, str] | None = None
) -> Iterator[Load]:
    """The clients at work, until the block is left."""
    made = Load(address, path, body, headers or {})
    threads = [threading.Thread(target=made.run, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop()
        for thread in threads:
            thread.join(70)


def until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until it has."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
