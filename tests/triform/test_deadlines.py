"""The watchdog ends what is due, in the order it is due, and leaves the rest alone."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from triform.deadlines import Watchdog
from triform.runtime import ort


def _until(holds: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def _soon() -> float:
    return time.monotonic() + 0.05


def _never() -> float:
    return time.monotonic() + 3600


def test_a_run_is_ended_when_it_is_due() -> None:
    options = ort.RunOptions()
    with Watchdog().guard(options, _soon()):
        assert not options.terminate
        assert _until(lambda: options.terminate)


def test_a_nearer_deadline_is_not_kept_waiting_by_a_later_one() -> None:
    watchdog, patient, hasty = Watchdog(), ort.RunOptions(), ort.RunOptions()
    with watchdog.guard(patient, _never()):
        time.sleep(0.1)  # by now the watchdog sleeps until `patient` is due
        with watchdog.guard(hasty, _soon()):
            assert _until(lambda: hasty.terminate)
    assert not patient.terminate


def test_a_run_that_ended_in_time_is_left_alone() -> None:
    watchdog, done, due = Watchdog(), ort.RunOptions(), ort.RunOptions()
    with watchdog.guard(done, _soon()):
        pass
    with watchdog.guard(due, _soon() + 0.05):  # due after the other would have been
        assert _until(lambda: due.terminate)
    assert not done.terminate


def test_a_run_that_raised_is_forgotten_too() -> None:
    watchdog, failed, due = Watchdog(), ort.RunOptions(), ort.RunOptions()
    with pytest.raises(ZeroDivisionError), watchdog.guard(failed, _soon()):
        raise ZeroDivisionError
    with watchdog.guard(due, _soon() + 0.05):
        assert _until(lambda: due.terminate)
    assert not failed.terminate


def test_runs_that_have_ended_leave_nothing_behind() -> None:
    """Their deadlines may be a minute away: at thousands a second all of them would be held that long."""

    class Options:
        terminate = False

    watchdog, held = Watchdog(), Options()
    with watchdog.guard(held, _never()):
        with watchdog.guard(ended := Options(), _never() + 1):
            gone = weakref.ref(ended)
        del ended
    assert gone() is None
    gone = weakref.ref(held)
    del held
    assert gone() is None


def test_many_runs_share_one_thread() -> None:
    before = threading.active_count()
    watchdog, runs = Watchdog(), [ort.RunOptions() for _ in range(20)]
    assert threading.active_count() == before  # no thread before the first deadline
    with ExitStack() as running:
        for late, options in enumerate(runs):
            running.enter_context(watchdog.guard(options, _soon() + late / 1000))
        assert threading.active_count() == before + 1
        assert _until(lambda: all(r.terminate for r in runs))
