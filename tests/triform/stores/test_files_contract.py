"""What a job may rely on wherever it writes: the same for a folder on a disk and a prefix of a bucket."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from triform.stores.files import FileStore, open_files

SCRATCH = "run=1/_tmp"


@pytest.fixture(params=["local", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    """With the folders that a run makes."""
    location = tmp_path / "output" if request.param == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/team/output"
    opened = open_files(location)
    for folder in SCRATCH, "run=1/data", "run=1/_parts":
        opened.make_folder(folder)
    return opened


def written(files: FileStore, name: str, content: bytes) -> Path:
    path = files.scratch(SCRATCH) / name
    path.write_bytes(content)
    return path


def test_a_file_is_created_once_and_keeps_its_first_content(files: FileStore) -> None:
    assert files.create("run=1/_parts/00000.json", b"first")
    assert not files.create("run=1/_parts/00000.json", b"second")
    assert files.read("run=1/_parts/00000.json") == b"first"


def test_of_many_creators_at_once_one_wins(files: FileStore) -> None:
    start, won = threading.Barrier(8), []

    def create(content: bytes) -> None:
        start.wait(30)
        if files.create("run=1/_parts/00001.json", content):
            won.append(content)

    creators = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
    for creator in creators:
        creator.start()
    for creator in creators:
        creator.join(60)
    assert won == [files.read("run=1/_parts/00001.json")]


def test_what_is_replaced_has_the_last_content(files: FileStore) -> None:
    for content in b"one", b"two":
        files.replace("run=1/_parts/mark", content)
        assert files.read("run=1/_parts/mark") == content


def test_what_is_not_there_is_told(files: FileStore) -> None:
    assert (files.read("run=1/none"), files.exists("run=1/none"), files.age("run=1/none")) == (None, False, None)
    assert files.names("run=1/nowhere") == []
    for ask in files.open, files.entry:
        with pytest.raises(FileNotFoundError):
            ask("run=1/none")
    with pytest.raises(FileNotFoundError):
        files.copy(f"{SCRATCH}/none", "run=1/data/copied")
    assert not files.exists("run=1/data/copied")
    files.remove("run=1/none")
    files.remove_folder("run=1/nowhere")


def test_a_placed_file_is_whole_and_placed_once(files: FileStore) -> None:
    content = bytes(range(256)) * 5000
    assert files.place(written(files, "a", content), "run=1/data/part-00000.parquet")
    assert not files.place(written(files, "b", b"a zombie's"), "run=1/data/part-00000.parquet")
    entry = files.entry("run=1/data/part-00000.parquet")
    assert (entry.sha256, entry.size) == (hashlib.sha256(content).hexdigest(), len(content))
    with files.open("run=1/data/part-00000.parquet") as file:
        file.seek(-10, 2)
        assert file.read() == content[-10:]
        file.seek(700)
        assert file.read(600) == content[700:1300]


def test_a_staged_file_is_copied_once_and_may_then_go(files: FileStore) -> None:
    files.stage(written(files, "letters", b"dead"), f"{SCRATCH}/letters")
    assert files.copy(f"{SCRATCH}/letters", "run=1/data/letters")
    assert not files.copy(f"{SCRATCH}/letters", "run=1/data/letters")
    files.remove(f"{SCRATCH}/letters")
    assert files.read("run=1/data/letters") == b"dead"


def test_names_are_those_that_readers_see(files: FileStore) -> None:
    for name in "part-00001.parquet", "part-00000.parquet", "_SUCCESS", ".hidden":
        files.create(f"run=1/data/{name}", b"x")
    files.make_folder("run=1/data/below")
    assert sorted(set(files.names("run=1/data")) - {"below"}) == ["part-00000.parquet", "part-00001.parquet"]


def test_age_grows_from_nothing(files: FileStore) -> None:
    files.create("run=1/_parts/00002.json", b"x")
    age = files.age("run=1/_parts/00002.json")
    assert age is not None
    assert -5 < age < 600


def test_a_removed_folder_takes_its_files_and_no_others(files: FileStore) -> None:
    for name in "run=1/_parts/1", "run=1/_parts/deep", "run=10":
        files.create(name, b"x")
    files.remove_folder("run=1/_parts")
    assert [files.exists(name) for name in ("run=1/_parts/1", "run=1/_parts/deep", "run=10")] == [False, False, True]
    files.abort_uploads("run=1")
