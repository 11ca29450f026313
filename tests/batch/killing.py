"""Who scores on a cluster that this process or a child of it started, and killing just those processes."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, its output to be read. Whatever descends from it has ended afterwards."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        for left in family(process.pid):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        process.communicate()


def family(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def scorers(root: psutil.Process | None = None) -> list[psutil.Process]:
    """The actors that score, by the name that Ray gives to their process."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        with suppress(psutil.Error):
            if any(word.startswith("ray::") and "PartScorer" in word for word in process.cmdline()):
                found.append(process)
    return found


def readers(path: Path) -> list[psutil.Process]:
    """Actors, and children of actors, that have the file open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                found.append(process)
    return found


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Does the work in a thread until the block is left; what it raises is raised here."""
    over = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work(over)
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def kill_actors(times: int, chance: random.Random, killed: list[int]) -> Callable[[threading.Event], None]:
    """kill -9 of one scoring actor at each of so many random moments."""

    def work(over: threading.Event) -> None:
        while len(killed) < times and not over.wait(chance.random() * 4):
            if alive := [p for p in scorers() if p.pid not in killed]:
                victim = chance.choice(alive)
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    killed.append(victim.pid)

    return work


def pause_the_first_until_there_are_two(at_work: Callable[[], bool]) -> Callable[[threading.Event], None]:
    """The actor that is there first stands still, from when it is at work, until there is another."""

    gone = {process.pid for process in scorers()}  # those of the run before, which may still be ending

    def ours() -> list[psutil.Process]:
        return [process for process in scorers() if process.pid not in gone]

    def work(over: threading.Event) -> None:
        deadline = time.monotonic() + 120
        while not at_work():
            if over.wait(0.01) or time.monotonic() > deadline:
                return
        first, *others = ours()
        if others:
            return
        first.suspend()
        while not over.wait(0.05) and len(ours()) < 2 and time.monotonic() < deadline:
            pass
        first.resume()

    return work


def kill_the_greedy(path: Path, most: int, killed: list[int]) -> Callable[[threading.Event], None]:
    """What the kernel does when memory runs out: whoever reads the file and has more than `most` resident bytes is killed."""

    def work(over: threading.Event) -> None:
        while not over.wait(0.005):
            for process in readers(path):
                with suppress(psutil.Error):
                    if process.memory_info().rss > most:
                        process.kill()
                        killed.append(process.pid)
                        time.sleep(0.05)

    return work
