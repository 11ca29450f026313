"""What the processes of a node share: made by one of them when it is due, whoever dies, and never waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from triform.errors import StoreError
from triform.stores.shared import Shared


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shared(tmp_path: Path, clock: Clock) -> Shared[int]:
    return Shared(tmp_path / "node/count", int, every=10.0, clock=clock)


def count(before: int | None) -> int:
    return (before or 0) + 1


def count_for_a_while(path: Path) -> None:
    shared = Shared(path, int, every=3600.0)
    for _ in range(200):
        shared.renew(count)


def die(path: Path) -> None:
    def make(_: int | None) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    Shared(path, int, every=3600.0).renew(make)


def test_it_is_made_anew_when_it_is_due(shared: Shared[int], clock: Clock) -> None:
    assert shared.get() is None
    for now, value in (0.0, 1), (9.9, 1), (10.0, 2), (19.9, 2), (20.0, 3):
        clock.now = 1e9 + now
        assert (shared.renew(count), shared.get()) == (value, value)


def test_many_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=count_for_a_while, args=(tmp_path / "count",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert Shared(tmp_path / "count", int, every=3600.0).get() == 1


def test_who_dies_over_it_leaves_it_to_the_next(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path / "count",))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert Shared(tmp_path / "count", int, every=3600.0).renew(count) == 1


def test_nobody_waits_for_who_makes_it(shared: Shared[int], clock: Clock) -> None:
    shared.renew(count)
    clock.now += 10
    under_way, done = threading.Event(), threading.Event()

    def make(before: int | None) -> int:
        under_way.set()
        assert done.wait(30)
        return count(before)

    maker = threading.Thread(target=shared.renew, args=(make,))
    maker.start()
    assert under_way.wait(30)
    assert shared.renew(count) == 1
    done.set()
    maker.join(30)
    assert shared.renew(count) == 2


def test_a_failure_leaves_it_as_it_was_until_its_next_turn(shared: Shared[int], clock: Clock) -> None:
    def fail(before: int | None) -> int:
        raise StoreError(f"not after {before}")

    shared.renew(count)
    clock.now += 10
    with pytest.raises(StoreError, match="not after 1"):
        shared.renew(fail)
    assert shared.renew(fail) == 1
    clock.now += 10
    assert shared.renew(count) == 2


def test_a_clock_that_is_set_back_stops_nothing(shared: Shared[int], clock: Clock) -> None:
    shared.renew(count)
    clock.now -= 3600
    assert shared.renew(count) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"of": "another Triform"}', b"\xff"])
def test_what_cannot_be_read_is_made_anew(shared: Shared[int], clock: Clock, tmp_path: Path, content: bytes) -> None:
    shared.renew(count)
    (tmp_path / "node/count.json").write_bytes(content)
    assert shared.get() is None
    clock.now += 10
    assert shared.renew(count) == 1


def test_a_place_that_cannot_be_written_is_an_error_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="node share") as told:
        Shared(tmp_path / "file/count", int, every=1.0).renew(count)
    assert str(tmp_path) not in str(told.value)
