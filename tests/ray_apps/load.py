"""Clients that ask again and again until they are told to stop, and remember every answer."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Seen(NamedTuple):
    """An answer, or (status 0) none; `model`: name and version that made it; `began`: `time.monotonic()`; `retry_after`: in
    seconds, as it says."""

    status: int
    model: str
    body: bytes
    began: float
    seconds: float
    retry_after: str = ""


class Load:
    """Closed-loop clients, each with a connection of its own that it keeps, or (`keep=False`) a new one each time."""

    def __init__(self, address: tuple[str, int], path: str, body: bytes, headers: Mapping[str, str], *, keep: bool) -> None:
        self.seen: list[Seen] = []
        self._address = address
        self._path = path
        self._body = body
        self._headers = headers
        self._keep = keep
        self._done = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        while not self._done.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", self._path, self._body, dict(self._headers))
                answer = connection.getresponse()
                told = answer.status, answer.getheader("x-triform-model", ""), answer.read()
                retry_after = answer.getheader("retry-after", "")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                told, retry_after = (0, "", repr(error).encode()), ""
            self.seen.append(Seen(*told, began, time.monotonic() - began, retry_after))
            if not self._keep:
                connection.close()
        connection.close()

    def until(self, happened: Callable[[list[Seen]], bool], seconds: float = 90.0) -> None:
        """Waits until it has happened to what was answered from now on."""
        before = len(self.seen)
        until(lambda: happened(self.seen[before:]), seconds)

    def stop(self) -> None:
        self._done.set()


class Asked:
    """A request that a replica has, and waits for the body of: it said "100 Continue"."""

    def __init__(self, port: int, path: str, body: bytes, **headers: str) -> None:
        self.body = body
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        told = {"host": "127.0.0.1", "content-length": len(body), "expect": "100-continue", **headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in told.items())]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self.answer = self.socket.makefile("rb")
        assert b"100 Continue" in self.answer.readline()
        assert self.answer.readline() == b"\r\n"

    def finish(self) -> int:
        """Sends the body; the status of the answer."""
        self.socket.sendall(self.body)
        status = int(self.answer.readline().split()[1])
        self.answer.close()
        self.socket.close()
        return status


@contextmanager
def load(
    address: tuple[str, int],
    path: str,
    body: bytes,
    clients: int = 4,
    *,
    headers: Mapping[str, str] | None = None,
    keep: bool = True,
) -> Iterator[Load]:
    """The clients at work, until the block is left."""
    made = Load(address, path, body, headers or {}, keep=keep)
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


async def open_loop(address: tuple[str, int], path: str, body: bytes = b"", *, rate: float, seconds: float) -> list[Seen]:
    """So many requests a second, whether the ones before are answered or not; over connections that are kept. Without a body they
    are GETs."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    seen: list[Seen] = []
    head = (
        f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: {address[0]}\r\n"
        f"inference-header-content-length: 0\r\ncontent-length: {len(body)}\r\n\r\n"
    )

    async def ask() -> None:
        began = time.monotonic()
        reader, writer = idle.pop() if idle else await asyncio.open_connection(*address)
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        if "content-length" in headers:
            content = await reader.readexactly(int(headers["content-length"]))
        else:
            content = await reader.readuntil(b"0\r\n\r\n")  # chunks
        seen.append(Seen(int(lines[0].split()[1]), headers.get("x-triform-model", ""), content, began, time.monotonic() - began))
        idle.append((reader, writer))

    first = time.monotonic()
    asked = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, first + number / rate - time.monotonic()))
        asked.append(asyncio.create_task(ask()))
    await asyncio.gather(*asked)
    for _, writer in idle:
        writer.close()
    return seen
