"""The package cache: filled once however many ask, whole or not at all, within its bound."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from triform.errors import StoreError
from triform.stores.cache import ABANDONED_SECONDS, RECENT_SECONDS, PackageCache


def fill_slowly(folder: Path) -> None:
    time.sleep(0.2)
    (folder / "model.onnx").write_bytes(b"x" * 1000)


def ask(root: Path, log: Path) -> None:
    def fill(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        fill_slowly(folder)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: PackageCache(root).folder("d" * 64, fill), range(8)))
    assert folders == {root / ("d" * 64)}


def test_processes_and_threads_of_a_node_download_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=ask, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_download_that_fails_leaves_nothing_and_the_next_may_try(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise StoreError("the connection was cut")

    cache = PackageCache(tmp_path)
    with pytest.raises(StoreError, match="cut"):
        cache.folder("a", fail)
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith(".lock-")] == []
    assert (cache.folder("a", fill_slowly) / "model.onnx").stat().st_size == 1000


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, max_bytes=2500)
    for age, name in enumerate("abc"):
        used = time.time() - RECENT_SECONDS - 100 + age
        os.utime(cache.folder(name, fill_slowly), (used, used))
    cache.folder("b", fill_slowly)  # in use again
    cache.folder("d", fill_slowly)
    assert {f.name for f in tmp_path.iterdir() if not f.name.startswith(".")} == {"b", "d"}


def test_downloads_whose_process_died_are_cleared_away(tmp_path: Path) -> None:
    abandoned = tmp_path / ".filling-dead"
    abandoned.mkdir()
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(abandoned, (old, old))
    (tmp_path / ".filling-alive").mkdir()
    PackageCache(tmp_path).folder("a", fill_slowly)
    assert {f.name for f in tmp_path.iterdir() if f.name.startswith(".filling")} == {".filling-alive"}


def test_a_wait_for_another_download_is_bounded(tmp_path: Path) -> None:
    slow, hasty = PackageCache(tmp_path), PackageCache(tmp_path, wait_seconds=0.1)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(slow.folder, "a", lambda _: time.sleep(1.0))
        time.sleep(0.3)
        with pytest.raises(StoreError, match="another process"):
            hasty.folder("a", fill_slowly)
        under_way.result()


def test_a_place_that_cannot_be_written_is_an_error_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="package cache") as told:
        PackageCache(tmp_path / "file/cache").folder("a", fill_slowly)
    assert str(tmp_path) not in str(told.value)
