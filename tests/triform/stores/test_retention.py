"""What a prune keeps, what it removes, and what becomes of those who meet it on the way. One suite for every store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.faulty_proxy import faulty_proxy
from triform.errors import InvalidRequest, ModelNotFound, StoreError, VersionExists, VersionNotFound
from triform.package import ModelPackage
from triform.releases import Canary, ReleaseLog, Shadow
from triform.repository import ModelRepository, resolve
from triform.retention import Outcome, Policy, prune
from triform.stores.s3_repository import S3Repository

Publish = Callable[..., None]
Age = Callable[..., None]


class Killed(BaseException):
    """The process is no more."""


class Between:
    """The store, where `act` happens right before the n-th call (from 1) that somebody makes."""

    def __init__(self, store: ModelRepository, number: int, act: Callable[[], object]) -> None:
        self._store, self._number, self._act = store, number, act
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def called(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._number:
                self._act()
            return found(*arguments, **options)

        return called


@pytest.fixture(autouse=True)
def _verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases are many here, and a full verification takes a second: its files' digests are enough."""
    verify = ModelPackage.verify
    monkeypatch.setattr(ModelPackage, "verify", lambda package, _: verify(package, "golden"))


def pruned(store: ModelRepository, **policy: Any) -> Outcome:
    return prune(store, "linear", Policy(**policy), dry_run=False)


def gone(outcome: Outcome) -> list[int]:
    return [verdict.version for verdict in outcome.gone]


def assert_whole(store: ModelRepository) -> None:
    """Whatever is listed, and whatever the release in force names, can be fetched and is right."""
    if isinstance(store, S3Repository):
        shutil.rmtree(store.cache.root, ignore_errors=True)
    release = ReleaseLog(store, "linear").current()
    for version in {*store.versions("linear"), *(release.named() if release else ())}:
        store.package("linear", version).verify("golden")


def test_what_the_last_revisions_name_stays_and_the_rest_goes(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(*range(1, 9))
    log = ReleaseLog(store, "linear")
    for release in ({"stable": 1}, {"stable": 2}, {"stable": 3, "canary": Canary(5, 0.1)}, {"shadow": Shadow(6, 0.5)}):
        log.set(**release)
    age(30)
    stays = {verdict.version: verdict.stays for verdict in pruned(store, revisions=2).verdicts}
    assert stays == {
        1: None,
        2: "previous in revision 4",
        3: "stable in revision 4",
        4: None,
        5: "canary in revision 3",
        6: "shadow in revision 4",
        7: None,
        8: "the newest",
    }
    assert store.versions("linear") == [2, 3, 5, 6, 8]
    assert_whole(store)
    log.rollback()
    assert log.rollback().stable == 2
    assert gone(pruned(store, revisions=2)) == [5, 6]  # two revisions later nothing names them


def test_a_dry_run_tells_the_same_and_changes_nothing(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1, 2, 3)
    age(30)
    told = prune(store, "linear", Policy(), dry_run=True)
    assert store.versions("linear") == [1, 2, 3]
    assert_whole(store)
    done = pruned(store)
    assert (gone(told), told.bytes) == (gone(done), done.bytes) == ([1, 2], done.bytes)
    assert done.bytes > 0


def test_a_model_that_was_never_released_keeps_its_highest_and_what_is_young(
    store: ModelRepository, publish: Publish, age: Age
) -> None:
    publish(1, 2)
    age(8)
    publish(3, 4)
    assert gone(pruned(store)) == [1, 2]
    age(8)
    assert gone(pruned(store, versions=2)) == []
    assert gone(pruned(store)) == [3]
    assert resolve(store, "linear") == ("linear", 4)


def test_a_pruned_number_is_spent(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1, 2)
    age(30)
    pruned(store)
    with pytest.raises(VersionExists, match="1 of 'linear' was pruned, and no number is used twice"):
        publish(1)
    assert store.pruned("linear") == [1]
    for look in (lambda: resolve(store, "linear/1"), lambda: ReleaseLog(store, "linear").set(stable=1)):
        with pytest.raises(VersionNotFound, match="version 1 of 'linear' was pruned"):
            look()
    with pytest.raises(VersionNotFound, match="no version 1 any more: it was pruned"):
        store.package("linear", 1)
    assert store.latest_revision("linear") == 0


def test_a_number_that_is_spent_while_it_is_published_is_never_seen(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1, 2)
    age(30)
    spent = store.pruned

    def prune_after_the_look(model: str) -> list[int]:
        store.pruned = spent  # type: ignore[method-assign]  # once
        seen = spent(model)
        pruned(store)
        return seen

    store.pruned = prune_after_the_look  # type: ignore[method-assign]  # the publisher's first look
    with pytest.raises(VersionExists, match="was pruned"):
        publish(1)
    assert store.versions("linear") == [2]
    pruned(store)
    assert [one.version for one in store.stored("linear")] == [2]


@pytest.mark.slow
def test_wherever_a_prune_is_killed_the_next_one_ends_its_work(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1)
    ReleaseLog(store, "linear").set(stable=1)

    def die() -> None:
        raise Killed

    number, ended = 0, False
    while not ended:
        number += 1
        publish(number * 2, number * 2 + 1)
        age(30)
        try:
            prune(cast(ModelRepository, Between(store, number, die)), "linear", Policy(), dry_run=False)
            ended = True
        except Killed:
            assert {1, number * 2 + 1} <= set(store.versions("linear"))
            assert_whole(store)
        pruned(store)
        assert [one.version for one in store.stored("linear")] == store.versions("linear") == [1, number * 2 + 1]
        assert pruned(store).leftovers == []
        assert_whole(store)
    assert number > 10


def races(store: ModelRepository, publish: Publish, age: Age) -> None:
    """Version 1 is stable, and 2 goes unless a release of now names it."""
    publish(1, 2, 3)
    ReleaseLog(store, "linear").set(stable=1)
    age(30)


def attempt(log: ReleaseLog) -> str:
    try:
        log.set(stable=2)
    except VersionNotFound as error:
        return str(error)
    return "released"


@pytest.mark.parametrize("number", range(1, 21))
def test_a_release_made_in_the_middle_of_a_prune_never_names_what_is_gone(
    store: ModelRepository, publish: Publish, age: Age, number: int
) -> None:
    races(store, publish, age)
    told: list[str] = []
    between = Between(store, number, lambda: told.append(attempt(ReleaseLog(store, "linear"))))
    outcome = prune(cast(ModelRepository, between), "linear", Policy(), dry_run=False)
    assert_whole(store)
    if told == ["released"]:
        assert 2 in store.versions("linear")
        assert gone(outcome) == []
    else:
        assert gone(outcome) == [2]
        assert all("was pruned" in message or "was just pruned" in message for message in told)


def test_a_release_that_is_no_longer_being_made_is_found_in_the_log(store: ModelRepository, publish: Publish, age: Age) -> None:
    """Its claim protects nothing any more when the prune, which began before it, comes to the version."""
    races(store, publish, age)

    def release_an_hour_ago() -> None:
        ReleaseLog(store, "linear").set(stable=2)
        age(0.1, "claims/")

    class Late(Between):
        def remove(self, model: str, version: int) -> None:
            if version == 0:  # everything is judged by now
                release_an_hour_ago()
            store.remove(model, version)

    outcome = prune(cast(ModelRepository, Late(store, 0, lambda: None)), "linear", Policy(), dry_run=False)
    assert [verdict.stays for verdict in outcome.verdicts][1] == "stable in revision 2"
    assert_whole(store)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_prune_in_the_middle_of_a_release_never_takes_what_it_names(
    store: ModelRepository, publish: Publish, age: Age, number: int
) -> None:
    races(store, publish, age)
    slow = ReleaseLog(cast(ModelRepository, Between(store, number, lambda: pruned(store))), "linear")
    told = attempt(slow)
    assert told == "released" or "pruned" in told
    assert_whole(store)
    assert (2 in store.versions("linear")) == (told == "released")


@pytest.mark.slow
def test_two_prunes_at_once_are_one(store: ModelRepository, publish: Publish, age: Age) -> None:
    for number in range(1, 18):
        publish(2 * number - 1, 2 * number)
        age(30)
        prune(cast(ModelRepository, Between(store, number, lambda: pruned(store))), "linear", Policy(), dry_run=False)
        assert store.versions("linear") == [2 * number]
        assert_whole(store)


def test_a_prune_reads_no_more_of_the_log_than_it_needs(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1, 2)
    log = ReleaseLog(store, "linear")
    for _ in range(12):
        log.set(stable=1)
    age(30)
    read: list[int] = []

    class Watched(Between):
        def read_release(self, model: str, revision: int) -> bytes | None:
            read.append(revision)
            return store.read_release(model, revision)

    prune(cast(ModelRepository, Watched(store, 0, lambda: None)), "linear", Policy(revisions=3), dry_run=False)
    assert read == [12, 11, 10]


@pytest.mark.parametrize("policy", [{"revisions": 0}, {"versions": 0}, {"days": -1}, {"days": float("nan")}])
def test_policies_that_would_keep_too_little_are_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="got"):
        Policy(**policy)


def test_a_model_that_is_none_is_told(store: ModelRepository) -> None:
    with pytest.raises(ModelNotFound, match="no model 'linear'"):
        pruned(store)


only_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
only_local = pytest.mark.parametrize("store", ["local"], indirect=True)


def blobs(store: S3Repository) -> set[str]:
    return {key for key, _ in store.bucket.keys(f"{store.prefix}linear/blobs/")}


@only_s3
def test_blobs_go_when_no_manifest_names_them_and_no_publisher_may_be_about_to(
    store: S3Repository, publish: Publish, age: Age
) -> None:
    publish(1, 2)
    age(30)
    before = blobs(store)
    young = f"{store.prefix}linear/blobs/{'a' * 64}"
    store.bucket.put(young, b"of a publisher at work")
    assert len(pruned(store, days=0).leftovers) == 1  # the model.toml of version 1
    assert young in blobs(store)
    assert len(before - blobs(store)) == 1
    assert_whole(store)
    age(2)
    assert pruned(store).leftovers == []
    assert [one.name for one in pruned(store, days=0).leftovers] == [f"blobs/{'a' * 64}"]


@only_s3
def test_a_publisher_renews_an_old_blob_that_it_finds(store: S3Repository, publish: Publish, age: Age) -> None:
    """So that a prune which has seen it unnamed does not take it before the manifest that names it stands."""
    publish(1)
    age(30)
    store.bucket.delete([f"{store.prefix}linear/1/manifest.json"])
    publish(2)
    named = {entry.sha256 for entry in store.package("linear", 2).manifest.files.values()}
    for sha256 in named:
        found = store.bucket.find(f"{store.prefix}linear/blobs/{sha256}")
        assert found is not None
        assert found.age < 3600


@only_s3
def test_a_blob_taken_from_under_a_publisher_is_there_in_the_end(
    store: S3Repository, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.bucket.create

    def create_after_a_loss(key: str, content: bytes) -> bool:
        store.bucket.delete(blobs(store))
        return create(key, content)

    monkeypatch.setattr(store.bucket, "create", create_after_a_loss)
    publish(1)
    assert_whole(store)


@only_s3
def test_while_a_manifest_cannot_be_read_no_blob_goes(store: S3Repository, publish: Publish, age: Age) -> None:
    publish(1, 2, 3)
    store.bucket.put(f"{store.prefix}linear/2/manifest.json", b"of another world")
    age(30)
    outcome = pruned(store)
    assert [v.stays for v in outcome.verdicts] == [None, "its manifest cannot be read", "the newest"]
    assert outcome.leftovers == []


@only_s3
def test_where_removing_is_denied_nothing_has_changed(store: S3Repository, publish: Publish, age: Age, s3_server: str) -> None:
    publish(1, 2)
    age(30)
    keys = store.bucket.keys("")
    with faulty_proxy(s3_server) as proxy:
        proxy.fail(*["403"] * 9, where="?delete")  # type: ignore[arg-type]  # a list of literals
        denied = S3Repository.open(store.location, store.cache, endpoint_url=proxy.url)
        with pytest.raises(StoreError, match="s3:DeleteObject"):
            pruned(denied)
    assert [key for key, _ in store.bucket.keys("")] == [key for key, _ in keys]
    assert store.versions("linear") == [1, 2]


@only_local
def test_what_killed_packagers_left_goes_when_it_is_old(store: ModelRepository, publish: Publish, age: Age) -> None:
    publish(1)
    model = Path(store.location) / "linear"
    for name in (".staging-old", ".staging-at-work"):
        (model / name).mkdir()
        (model / name / "model.onnx").write_bytes(b"1234")
    age(30, ".staging-old")
    assert pruned(store).leftovers == [(".staging-old", 4)]
    assert sorted(p.name for p in model.iterdir()) == [".staging-at-work", "1"]
