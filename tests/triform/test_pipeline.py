"""Reading ahead and writing behind: order, bounds, errors, and no thread left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from triform.pipeline import Behind, ahead


@pytest.fixture(autouse=True)
def _no_thread_is_left_over() -> Iterator[None]:
    before = set(threading.enumerate())  # those of tests before it, which last as long as the process
    yield
    assert not [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("triform-")]


def _until_quiet(seen: list[int]) -> None:
    """Waits until the list has stopped growing."""
    size = -1
    while size != len(seen):
        size = len(seen)
        time.sleep(0.1)


def test_items_come_in_order() -> None:
    assert list(ahead(iter(range(1000)))) == list(range(1000))


def test_reading_stays_a_bounded_way_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    reading = ahead(items(), depth=2)
    assert next(reading) == 0
    _until_quiet(made)
    assert len(made) in range(3, 5)  # one taken, two waiting, one in hand
    reading.close()


def test_a_fault_of_the_source_is_raised_after_what_came_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("the source")

    reading = ahead(items())
    assert next(reading) == 1
    with pytest.raises(ZeroDivisionError, match="the source"):
        next(reading)


def test_a_reader_that_is_closed_early_ends_its_thread() -> None:
    reading = ahead(iter(range(10**9)))
    next(reading)
    reading.close()


def test_everything_is_written_in_order_before_the_end() -> None:
    written: list[int] = []
    with Behind(written.append) as behind:
        for i in range(1000):
            behind.put(i)
    assert written == list(range(1000))


def test_writing_stays_a_bounded_way_behind() -> None:
    gate, put = threading.Event(), []

    def feed(behind: Behind[int]) -> None:
        for i in range(10):
            behind.put(i)
            put.append(i)

    with Behind[int](lambda _: gate.wait(), depth=2) as behind:
        feeder = threading.Thread(target=feed, args=(behind,))
        feeder.start()
        _until_quiet(put)
        assert len(put) == 3  # one being written, two waiting
        gate.set()
        feeder.join()


def test_a_fault_of_the_writer_reaches_the_one_that_feeds_it() -> None:
    def fail(item: int) -> None:
        raise OSError(f"disk full at {item}")

    def feed() -> None:
        with Behind(fail) as behind:
            while True:
                behind.put(0)

    with pytest.raises(OSError, match="disk full at 0"):
        feed()


def test_a_fault_of_the_last_item_is_raised_at_the_end() -> None:
    def fail(item: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind(fail) as behind:
        behind.put(0)


def test_a_fault_of_the_feeder_drops_what_waits_and_is_the_one_raised() -> None:
    gate, written = threading.Event(), []

    def write(item: int) -> None:
        gate.wait()
        written.append(item)

    def feed() -> None:
        with Behind(write, depth=5) as behind:
            for i in range(4):
                behind.put(i)
            threading.Timer(0.2, gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feed()
    assert written in ([0], [])
