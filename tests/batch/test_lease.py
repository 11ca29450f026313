"""A lease on an output: one driver at a time, and the next when it is gone. On a disk and on S3."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from batch.lease import Entry, held
from triform.errors import LeaseHeld
from triform.stores.files import FileStore, open_files


@pytest.fixture(params=["disk", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    return open_files(tmp_path if request.param == "disk" else f"s3://{request.getfixturevalue('s3_bucket')}/out")


def another(files: FileStore, number: int = 1, *, host: str = "elsewhere", pid: int = 1, seconds: float = 3600.0) -> None:
    """A lease that a driver on another machine has taken."""
    files.make_folder("_lease")
    assert files.create(f"_lease/{number:06d}.json", msgspec.json.encode(Entry(host, pid, seconds, "theirs")))


def test_one_at_a_time_and_again_afterwards(files: FileStore) -> None:
    for _ in range(3):
        with held(files, 60.0), pytest.raises(LeaseHeld, match=f"process {os.getpid()} on "), held(files, 60.0):
            pass


def test_without_a_lease_nothing_is_written(files: FileStore) -> None:
    with held(files, None) as lease:
        assert lease is None
    assert files.names("_lease") == []


def test_of_many_at_once_one_gets_it(files: FileStore) -> None:
    got, told = [], []
    barrier, done = threading.Barrier(6), threading.Barrier(6)

    def drive() -> None:
        barrier.wait()
        try:
            with held(files, 60.0) as lease:
                got.append(lease)
                done.wait(30)
        except LeaseHeld as error:
            told.append(str(error))
            done.wait(30)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(told)) == (1, 5)


def test_a_holder_elsewhere_is_named_and_outlived(files: FileStore) -> None:
    another(files)
    with pytest.raises(LeaseHeld, match=r"process 1 on elsewhere is at work .* ends 3600 s after"), held(files, 60.0):
        pass
    another(files, 2, seconds=1.0)
    time.sleep(2.1)  # S3 tells times in whole seconds
    with held(files, 60.0):
        pass


def test_a_holder_that_ended_on_this_machine_is_not_waited_for(files: FileStore) -> None:
    code = "import sys, os; from batch.lease import held; from triform.stores.files import open_files; "
    code += "held(open_files(sys.argv[1]), 3600.0).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, files.location], check=False).returncode == 9
    with held(files, 60.0):
        pass


def test_signs_of_life_keep_it(files: FileStore) -> None:
    with held(files, 2.0) as lease:
        assert lease is not None
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            age = files.age("_lease/000001.beat")
            assert age is None or age < 3.0
            time.sleep(0.2)
        lease.check()
        assert files.exists("_lease/000001.beat")


def test_giving_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(tmp_path)

    def full(*_: object) -> bool:
        raise OSError("no space left")

    def work() -> None:
        with held(files, 60.0):
            monkeypatch.setattr(files, "create", full)
            raise ValueError("the real cause")

    with pytest.raises(ValueError, match="the real cause"):
        work()


def test_a_lease_that_was_lost_is_noticed(files: FileStore) -> None:
    with held(files, 1.0) as lease:
        assert lease is not None
        lease.check()
        another(files, 2)
        for _ in range(200):
            if lease.lost is not None:
                break
            time.sleep(0.05)
        with pytest.raises(LeaseHeld, match="lost to process 1 on elsewhere"):
            lease.check()
