"""What every store must do: one suite, run against a local folder and against S3 (a moto server over HTTP)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from triform import testing
from triform.errors import DigestMismatch, InvalidReference, ReleaseConflict, VersionExists, VersionNotFound
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog
from triform.repository import ModelRepository, resolve
from triform.stores.cache import PackageCache
from triform.stores.s3_repository import S3Repository


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return testing.linear(tmp_path / "linear.onnx")


def test_an_empty_store_has_no_models(store: ModelRepository) -> None:
    assert (store.models(), store.versions("linear"), store.latest_revision("linear")) == ([], [], 0)
    with pytest.raises(VersionNotFound):
        store.package("linear", 1)


def test_a_published_version_is_there_whole_and_predicts(store: ModelRepository, linear: Path) -> None:
    made = package_model(linear, name="linear", repository=store)
    assert (store.models(), store.versions("linear")) == (["linear"], [1])
    package = store.package("linear", 1)
    assert package.manifest.digest == made.digest
    answer = Predictor.load(package, verification="full").predict({"x": np.ones((1, 3), np.float32)})
    assert answer["y"].tolist() == [[6.0]]


def test_a_version_never_changes(store: ModelRepository, linear: Path, tmp_path: Path) -> None:
    package_model(linear, name="linear", repository=store, version=1)
    other = testing.linear(tmp_path / "other.onnx", features=4)
    with pytest.raises(VersionExists, match="publish the next"):
        package_model(other, name="linear", repository=store, version=1)
    assert store.package("linear", 1).manifest.signature.inputs[0].shape == ("rows", 3)


def test_what_was_not_published_leaves_nothing(store: ModelRepository, linear: Path) -> None:
    with store.staging("linear") as folder:
        (folder / "model.onnx").write_bytes(linear.read_bytes())
    assert (store.models(), store.versions("linear")) == ([], [])


def test_names_that_lead_outside_are_refused(store: ModelRepository) -> None:
    for name in ("../etc", "a/b", "", "a\0b", "a%2f.."):
        with pytest.raises(InvalidReference):
            store.versions(name)


def test_revisions_are_created_once_and_found(store: ModelRepository, linear: Path) -> None:
    package_model(linear, name="linear", repository=store)
    for revision in range(1, 12):
        assert store.create_release("linear", revision, b"%d" % revision)
        assert store.latest_revision("linear") == revision
    assert not store.create_release("linear", 7, b"again")
    assert store.read_release("linear", 7) == b"7"
    assert store.read_release("linear", 12) is None


def test_releases_resolve_and_roll_back(store: ModelRepository, linear: Path) -> None:
    for _ in range(2):
        package_model(linear, name="linear", repository=store)
    log = ReleaseLog(store, "linear")
    log.set(stable=1)
    log.set(canary=Canary(2, 0.1))
    assert [resolve(store, f"linear@{alias}") for alias in ("stable", "canary")] == [("linear", 1), ("linear", 2)]
    assert log.rollback().canary is None


def test_of_twenty_writers_one_wins_each_revision(store: ModelRepository, linear: Path) -> None:
    package_model(linear, name="linear", repository=store)
    ReleaseLog(store, "linear").set(stable=1)
    start = threading.Barrier(20)

    def write(i: int) -> str:
        start.wait()
        try:
            return f"won {ReleaseLog(store, 'linear').set(stable=1, expect=1, changed_by=f'writer {i}').revision}"
        except ReleaseConflict as error:
            return str(error)

    with ThreadPoolExecutor(20) as pool:
        told = list(pool.map(write, range(20)))
    assert told.count("won 2") == 1
    winner = ReleaseLog(store, "linear").read(2).changed_by
    assert all(winner in message for message in told if message != "won 2")


@pytest.fixture
def damage(store: ModelRepository) -> Callable[[], None]:
    """Changes a byte of the stored model, behind the store's back."""

    def act() -> None:
        if isinstance(store, S3Repository):
            entry = store.package("linear", 1).manifest.files["model.onnx"]
            key = f"{store.prefix}linear/blobs/{entry.sha256}"
            store.bucket.client.put_object(Bucket=store.bucket.name, Key=key, Body=b"\0" * entry.size)
            store.cache = PackageCache(store.cache.root / "fresh")
            store.cache.root.mkdir(parents=True)
        else:
            path = store.package("linear", 1).model_path
            path.write_bytes(b"\0" * path.stat().st_size)

    return act


def test_weights_swapped_behind_the_manifest_are_noticed(
    store: ModelRepository, linear: Path, damage: Callable[[], None]
) -> None:
    package_model(linear, name="linear", repository=store)
    damage()
    with pytest.raises(DigestMismatch):
        store.package("linear", 1).verify("golden")
