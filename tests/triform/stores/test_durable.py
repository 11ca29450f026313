"""Files that appear whole and have one creator."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from triform.stores import durable


def test_one_of_many_creators_wins_and_its_content_is_whole(tmp_path: Path) -> None:
    start = threading.Barrier(16)
    won: list[bytes] = []

    def create(content: bytes) -> None:
        start.wait()
        if durable.create_exclusively(tmp_path / "file", content):
            won.append(content)

    creators = [threading.Thread(target=create, args=(bytes([i]) * 100_000,)) for i in range(16)]
    for creator in creators:
        creator.start()
    for creator in creators:
        creator.join()
    assert won == [(tmp_path / "file").read_bytes()]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_reader_sees_the_old_content_or_the_new(tmp_path: Path) -> None:
    path, seen, stop = tmp_path / "file", set(), threading.Event()
    durable.replace(path, b"0" * 100_000)

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, 30):
        durable.replace(path, str(i % 10).encode() * 100_000)
    stop.set()
    reader.join()
    assert all(len(content) == 100_000 and len(set(content)) == 1 for content in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_gives_a_finished_file_its_second_name_once(tmp_path: Path) -> None:
    finished = durable.write_temporary(tmp_path / "file", b"content")
    assert finished.name.startswith(".")
    assert [durable.link_exclusively(finished, tmp_path / "file") for _ in range(2)] == [True, False]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        durable.create_exclusively(tmp_path / "missing/file", b"content")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        durable.replace(tmp_path / "folder", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
