"""A repository in a folder: a version appears whole or not at all, a revision has one writer, a crash spoils neither."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from triform import testing
from triform.errors import StoreError, UnsafePackage, VersionExists, VersionNotFound
from triform.package import ModelPackage
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.retention import Policy, prune

Python = Callable[..., subprocess.Popen[str]]
PACKAGE = "import sys; from triform.cli import main; main()"


def crashed(python: Python, operation: str, template: Path, work: Path) -> Iterator[Path]:
    """The repositories left by an operation that died before its first, second, ... file operation; the last is complete."""
    child = python(Path(__file__).with_name("crash.py"), operation, template, work)
    told, complaint = child.communicate(timeout=500)
    assert child.returncode == 0, complaint
    assert int(told) > 5, "the operation was expected to touch more files"
    for number in range(1, int(told) + 1):
        yield work / str(number)


def assert_whole(root: Path, *, may_have: int) -> bool:
    """Every version listed verifies; whether the one that was on its way is there."""
    repository = open_repository(root)
    assert repository.models() == ["linear"]
    versions = repository.versions("linear")
    assert set(versions) <= {1, 2, 3, may_have}
    for version in versions:
        repository.package("linear", version).verify("golden")
    return may_have in versions


def test_a_crash_at_any_file_operation_publishes_a_whole_version_or_none(
    models: Path, tmp_path: Path, python: Python, reseal: Callable[..., None]
) -> None:
    finished = Path(shutil.copytree(models / "linear/1", models / "linear/.finished"))
    reseal(finished, version=9)
    there = [assert_whole(root, may_have=9) for root in crashed(python, "publish", models, tmp_path / "work")]
    assert there == sorted(there)  # once it is there, it stays
    assert set(there) == {False, True}


@pytest.mark.slow
def test_a_packager_that_crashes_at_any_file_operation_leaves_a_whole_version_or_none(
    models: Path, tmp_path: Path, python: Python
) -> None:
    testing.linear(models / "linear.onnx")
    roots = list(crashed(python, "package", models, tmp_path / "work"))
    there = [assert_whole(root, may_have=9) for root in roots]
    assert there == sorted(there)
    assert set(there) == {False, True}
    open_repository(roots[-1]).package("linear", 9).verify("full")


@pytest.mark.parametrize("operation", ["release", pytest.param("first_release", marks=pytest.mark.slow)])
def test_a_crash_at_any_file_operation_leaves_a_readable_release_log(
    released_models: Path, tmp_path: Path, python: Python, operation: str
) -> None:
    if operation == "first_release":
        shutil.rmtree(released_models / "linear/releases")
    before = int(operation == "release")
    revisions = []
    for root in crashed(python, operation, released_models, tmp_path / "work"):
        log = ReleaseLog(open_repository(root), "linear")
        history = log.history()
        revisions.append(len(history))
        assert [r.revision for r in history] == list(range(len(history), 0, -1))
        if len(history) > before:
            assert history[0].reason == "crash"
        if history:
            assert log.set(reason="after").revision == len(history) + 1
    assert revisions == sorted(revisions)
    assert set(revisions) == {before, before + 1}


def test_a_prune_that_crashes_at_any_file_operation_leaves_whole_versions_and_the_next_ends_it(
    three_versions: Path, tmp_path: Path, python: Python
) -> None:
    for path in three_versions.rglob("*"):
        os.utime(path, times=(path.stat().st_mtime - 30 * 86400,) * 2)
    left = []
    for root in crashed(python, "prune", three_versions, tmp_path / "work"):
        repository = open_repository(root)
        left.append(repository.versions("linear"))
        for version in left[-1]:
            repository.package("linear", version).verify("golden")
        prune(repository, "linear", Policy(), dry_run=False)
        assert repository.versions("linear") == [3]
        assert sorted(p.name for p in (root / "linear").iterdir()) == ["3", "claims", "pruned"]
        assert repository.pruned("linear") == [1, 2]
    assert left == sorted(left)
    assert {len(versions) for versions in left} == {1, 2, 3}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_packager_killed_at_any_moment_leaves_a_whole_version_or_none(
    models: Path, tmp_path: Path, python: Python, kills: int
) -> None:
    moments, model = random.Random(kills), testing.linear(tmp_path / "l.onnx")
    for _ in range(kills):
        packager = python("-c", PACKAGE, "package", model, "--name", "linear", "--to", models)
        time.sleep(moments.uniform(0.5, 3))
        packager.send_signal(signal.SIGKILL)
        packager.communicate()
        repository = open_repository(models)
        for version in repository.versions("linear"):
            repository.package("linear", version).verify("golden")
    done = python("-c", PACKAGE, "package", model, "--name", "linear", "--to", models, "--json")
    assert done.wait() == 0
    done.communicate()
    open_repository(models).package("linear", open_repository(models).versions("linear")[-1]).verify("full")


@pytest.mark.parametrize("packagers", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_packagers_at_once_get_versions_of_their_own(models: Path, python: Python, packagers: int) -> None:
    testing.linear(models / "linear.onnx")
    race = python(Path(__file__).parent.with_name("race.py"), "package", models, packagers)
    published = sorted(int(json.loads(line)[1].removeprefix("linear/")) for line in race.communicate(timeout=500)[0].splitlines())
    assert published == list(range(2, packagers + 2)) == open_repository(models).versions("linear")[1:]
    for version in published:
        open_repository(models).package("linear", version).verify("golden")


def test_one_version_is_published_once(models: Path, reseal: Callable[..., None]) -> None:
    repository = open_repository(models)
    with repository.staging("linear") as one, repository.staging("linear") as two:
        for staged in (one, two):
            shutil.copytree(models / "linear/1", staged, dirs_exist_ok=True)
            reseal(staged, version=2)
        repository.publish(one, "linear", 2)
        with pytest.raises(VersionExists, match="already has a version 2"):
            repository.publish(two, "linear", 2)
    assert repository.versions("linear") == [1, 2]
    assert sorted(p.name for p in (models / "linear").iterdir()) == ["1", "2"]


def test_unfinished_and_foreign_things_are_not_listed(models: Path) -> None:
    for name in ("linear/.staging-1", "linear/x", "linear/02", "linear/2", ".git", "empty", "white space"):
        (models / name).mkdir(parents=True)
    shutil.copy(models / "linear/1/manifest.json", models / "linear/.staging-1")
    shutil.copy(models / "linear/1/manifest.json", models / "linear/02")
    (models / "linear/3").write_text("a file")
    (models / "README").write_text("a file")
    repository = open_repository(models)
    assert repository.models() == ["linear"]
    assert repository.versions("linear") == [1]
    for version in (2, 3, 0, -1):
        with pytest.raises(VersionNotFound):
            repository.package("linear", version)


def test_a_version_that_was_moved_or_copied_by_hand_is_not_taken_for_another(models: Path) -> None:
    """Answers name the version that made them, and the manifest is where that name comes from."""
    shutil.copytree(models / "linear/1", models / "linear/2")
    shutil.copytree(models / "linear", models / "other")
    repository = open_repository(models)
    assert isinstance(repository.package("linear", 1), ModelPackage)
    for model, version in (("linear", 2), ("other", 1)):
        with pytest.raises(UnsafePackage, match=f"in the place of {model}/{version} is linear/1"):
            repository.package(model, version)


def test_release_files_of_others_are_not_read(released_models: Path) -> None:
    folder = released_models / "linear/releases"
    for name in (".000002.json.tmp", "2.json", "000002.json.bak", "x.json", "000002.txt"):
        (folder / name).write_text("not a release")
    assert ReleaseLog(open_repository(released_models), "linear").current().revision == 1  # type: ignore[union-attr]
    assert open_repository(released_models).read_release("linear", 2) is None


def test_a_revision_is_created_once(models: Path) -> None:
    repository = open_repository(models)
    assert repository.latest_revision("linear") == 0
    assert repository.create_release("linear", 1, b"one")
    assert not repository.create_release("linear", 1, b"two")
    assert repository.read_release("linear", 1) == b"one"
    assert [p.name for p in (models / "linear/releases").iterdir()] == ["000001.json"]


@pytest.mark.parametrize("root", ["file", "file/below", "x" * 300])
def test_storage_that_cannot_work_is_a_store_error(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("")
    repository = open_repository(tmp_path / root)
    for attempt in (
        lambda: repository.staging("m").__enter__(),
        lambda: repository.create_release("m", 1, b""),
    ):
        with pytest.raises(StoreError, match="repository"):
            attempt()
    with pytest.raises((StoreError, VersionNotFound)):
        repository.package("m", 1)
