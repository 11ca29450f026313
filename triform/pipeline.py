"""Reading ahead and writing behind: two threads beside the one that works, with bounded queues between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Stopped(Exception):
    pass


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made in a thread of their own up to `depth` ahead. Closing it ends the thread."""
    queue: Queue[tuple[str, Any]] = Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue
        raise _Stopped

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
            put(("end", None))
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where it is consumed
            put(("error", error))

    thread = threading.Thread(target=work, name="triform-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()


class Behind(Generic[T]):
    """Hands items to `consume` in a thread of its own, at most `depth` waiting; an error there is raised here."""

    def __init__(self, consume: Callable[[T], None], depth: int = 2) -> None:
        self._queue: Queue[T | None] = Queue(depth)
        self._consume = consume
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="triform-write-behind", daemon=True)

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        while self._error is None:
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue
        raise self._error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            while True:  # what waits is not wanted any more
                try:
                    self._queue.get_nowait()
                except Empty:
                    break
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._consume(item)
                except BaseException as error:  # noqa: BLE001 - raised again by the thread that feeds it
                    self._error = error
