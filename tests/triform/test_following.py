"""Releases followed without a restart: on a fake clock, with real packages, real verification and no Ray."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.triform.conftest import reseal
from triform.errors import AliasNotFound, DigestMismatch, ModelNotFound, StoreError
from triform.following import AGAIN_SECONDS, LISTED, Follower, Node
from triform.models import Models
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog, Shadow
from triform.repository import ModelRepository, Ref
from triform.stores.local import LocalRepository
from triform.telemetry import FREED
from triform.testing import RecordingTelemetry

EVERY = 5.0


class Asked(LocalRepository):
    """Counts what it is asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[int] = []
        self.listings = 0

    def read_release(self, model: str, revision: int) -> bytes | None:
        self.reads.append(revision)
        return super().read_release(model, revision)

    def models(self) -> list[str]:
        self.listings += 1
        return super().models()


class Site:
    """A node with any number of hosts, and a clock that stands still until a test moves it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder
        self.now = 1e9
        self.asked = Asked(root)
        self.log = ReleaseLog(LocalRepository(root), "linear")
        self.loads: list[int] = []

    def host(self, ref: str = "linear", repository: ModelRepository | None = None, **kind: Any) -> Host:
        return Host(self, Ref.parse(ref), repository or self.asked, **kind)

    def later(self, *hosts: Host, seconds: float = EVERY) -> None:
        self.now += seconds
        for host in hosts:
            host.follower.step()

    def release(self, stable: int, canary: int | None = None, shadow: int | None = None) -> None:
        self.log.set(
            stable=stable, canary=Canary(canary, 0.1) if canary else None, shadow=Shadow(shadow, 0.1) if shadow else None
        )

    def folder_of(self, version: int) -> Path:
        return self.root / f"linear/{version}"

    def add(self, *versions: int) -> None:
        for version in versions:
            shutil.copytree(self.folder_of(1), self.folder_of(version))
            reseal(self.folder_of(version), version=version)


class Host:
    """A process that serves: here, only an object."""

    def __init__(self, site: Site, ref: Ref, repository: ModelRepository, **kind: Any) -> None:
        self.telemetry = RecordingTelemetry()
        self.models = Models(form="serve", telemetry=self.telemetry)
        self.node = Node(repository, site.folder, self.models, every=EVERY, clock=lambda: site.now)
        self.follower = Follower(ref, self.node, self.models, self.load, **kind)
        self._site = site
        self._repository = repository

    def load(self, model: str, version: int) -> Predictor:
        self._site.loads.append(version)
        return Predictor.load(self._repository.package(model, version))

    @property
    def stable(self) -> int:
        return self.models.get("linear").manifest.version

    @property
    def told(self) -> list[tuple[int | None, str, str]]:
        return [(load.version, load.variant, load.code) for load in self.telemetry.loads]


@pytest.fixture
def site(released_models: Path, tmp_path: Path) -> Site:
    """Revision 1: stable 1, canary 2, shadow 3."""
    return Site(released_models, tmp_path / "node")


@pytest.fixture
def host(site: Site) -> Host:
    """Started with revision 1, which its node has looked at: no later revision that names 1, 2 or 3 verifies anything anew."""
    host = site.host()
    host.follower.start()
    host.follower.step()
    return host


def spoil(folder: Path) -> Callable[[], None]:
    """Alters the model file; what it returns mends it."""
    file = folder / "model.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x7f")
    return lambda: (file.write_bytes(content), None)[1]


def test_a_release_is_taken_up_while_the_host_runs(site: Site, host: Host) -> None:
    assert (host.stable, host.models.versions("linear")) == (1, [1, 2, 3])
    site.release(stable=2, canary=3, shadow=1)
    host.follower.step()
    assert host.stable == 1, "it is not time yet"
    site.later(host)
    assert (host.stable, host.models.get("linear", alias="canary").manifest.version) == (2, 3)
    site.release(stable=2)
    site.later(host)
    assert (host.stable, host.models.versions("linear")) == (2, [2])
    assert site.loads == [1, 2, 3], "nothing was loaded twice"
    with pytest.raises(AliasNotFound):
        host.models.get("linear", alias="canary")


def test_who_was_given_the_old_version_keeps_it_and_then_it_is_freed(site: Site, host: Host) -> None:
    served = host.models.get("linear")
    site.release(stable=2)
    site.later(host)
    assert host.stable == 2
    assert served.predictor.predict({"x": [[1, 2, 3]]})["y"].tolist() == [[14.0]]
    session = weakref.ref(served.predictor)
    del served
    assert session() is None, "nothing holds the old session any more"


def test_what_is_loaded_and_freed_is_told(site: Site, host: Host) -> None:
    host.telemetry.loads.clear()
    site.release(stable=2, canary=3)
    site.later(host)
    assert sorted(host.told) == [
        (1, "stable", FREED), (2, "canary", FREED), (2, "stable", "ok"), (3, "canary", "ok"), (3, "shadow", FREED),
    ]  # fmt: skip


def test_of_many_hosts_of_a_node_one_asks(site: Site) -> None:
    hosts = [site.host() for _ in range(5)]
    for each in hosts:
        each.follower.start()
    site.asked.reads.clear()
    for _ in range(10):
        site.later(*hosts, *hosts)
    assert site.asked.reads == 10 * [1, 2], "of a log that has not changed only the next revision"
    site.release(stable=2)
    site.later(*hosts)
    assert [each.stable for each in hosts] == [2] * 5


def test_a_version_that_is_new_is_verified_in_full(site: Site, host: Host) -> None:
    site.add(4)
    site.release(stable=4)
    (site.folder_of(4) / "stranger.txt").write_text("only a full verification minds")
    site.later(host)
    assert (host.stable, host.told[-1]) == (1, (4, "stable", "package_unsafe"))


def test_and_only_once_on_a_node(site: Site, host: Host) -> None:
    site.add(4)
    site.release(stable=4)
    site.later(host)
    assert host.stable == 4
    (site.folder_of(4) / "stranger.txt").write_text("only a full verification minds")
    for stable in 1, 4:
        site.log._append(site.log._next(site.log.current(), stable, None, None, "without a verification of its own", None))
        site.later(host)
    assert (host.stable, host.follower.release) == (4, site.log.read(4))


def test_a_bad_version_changes_nothing_but_a_metric_and_a_log_line(
    site: Site, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    other = site.host()
    other.follower.start()
    site.add(4)
    site.release(stable=2, canary=4, shadow=1)
    mend = spoil(site.folder_of(4))
    for _ in range(4):
        site.later(host, other)
    assert (host.stable, other.stable) == (1, 1)
    failures = [told for each in (host, other) for told in each.told if told[2] not in ("ok", FREED)]
    assert failures == [(4, "canary", "digest_mismatch")], "once a node, not once a host or a look"
    assert [(r.levelname, r.__dict__["version"]) for r in caplog.records if r.name == "triform.following"] == [("WARNING", 4)]
    mend()
    site.later(host, other)
    assert (host.stable, other.stable) == (1, 1), "it is not tried again at once"
    site.later(host, other, seconds=AGAIN_SECONDS)
    assert (host.stable, other.stable) == (2, 2)


def test_a_bad_version_is_left_by_the_next_release(site: Site, host: Host) -> None:
    site.add(4)
    site.release(stable=4)
    spoil(site.folder_of(4))
    site.later(host)
    assert host.stable == 1
    site.release(stable=2)
    site.later(host)
    assert host.stable == 2


def test_what_loads_on_the_node_and_not_here_changes_nothing(site: Site, host: Host) -> None:
    site.release(stable=2, canary=3)
    host.follower._held.clear()
    mend = spoil(site.folder_of(3))
    for _ in range(4):
        site.later(host)
    assert (host.stable, host.told.count((3, "canary", "digest_mismatch"))) == (1, 1)
    mend()
    site.later(host, seconds=AGAIN_SECONDS)
    assert host.stable == 2


def test_a_start_goes_back_to_the_newest_release_that_loads(site: Site, host: Host) -> None:
    site.release(stable=2)
    site.release(stable=3)
    mend = spoil(site.folder_of(3))
    late = site.host()
    late.follower.start()
    assert (late.stable, late.told[0]) == (2, (3, "stable", "digest_mismatch"))
    mend()
    site.later(late)
    assert late.stable == 3


def test_a_start_does_not_touch_what_the_node_has_refused(site: Site, host: Host) -> None:
    site.add(4)
    site.release(stable=4)
    spoil(site.folder_of(4))
    site.later(host)
    site.loads.clear()
    late = site.host()
    late.follower.start()
    assert (late.stable, site.loads) == (1, [1, 2, 3]), "it may take the process down"


def test_a_start_on_a_new_node_loads_nothing_that_was_not_verified_in_a_child(site: Site) -> None:
    site.release(stable=1)
    site.add(4)
    site.release(stable=4)
    spoil(site.folder_of(4))
    late = site.host()
    late.follower.start()
    assert (late.stable, late.told[0][2], site.loads) == (1, "digest_mismatch", [1]), "4 might take the process down"


def test_a_start_without_any_good_release_is_refused(site: Site) -> None:
    site.release(stable=2)
    for version in 1, 2:
        spoil(site.folder_of(version))
    with pytest.raises(DigestMismatch, match="linear/2"):
        site.host().follower.start()
    with pytest.raises(ModelNotFound, match="it has: linear"):
        site.host("nobody").follower.start()


def test_a_host_that_is_ahead_of_its_node_is_not_taken_back(site: Site, host: Host) -> None:
    site.release(stable=2)
    late = site.host()
    late.follower.start()
    late.follower.step()
    assert (late.stable, host.stable) == (2, 1)
    site.later(host, late)
    assert (late.stable, host.stable) == (2, 2)


def test_a_reference_to_an_alias_follows_it(site: Site, host: Host) -> None:
    canary, pinned = site.host("linear@canary"), site.host("linear/1")
    for each in canary, pinned:
        each.follower.start()
    site.release(stable=2, canary=3)
    site.later(host, canary, pinned)
    assert (canary.stable, canary.models.versions("linear"), pinned.stable) == (3, [3], 1)
    site.release(stable=2)
    site.later(host, canary, pinned)
    assert (canary.stable, canary.told[-1]) == (3, (None, "stable", "alias_not_found")), "what is gone leaves all as it was"
    late = site.host("linear@canary")
    late.follower.start()
    assert late.stable == 3, "who starts then has what the others have"


def test_of_a_model_that_was_never_released_the_highest_version_is_served(models: Path, tmp_path: Path) -> None:
    site = Site(models, tmp_path / "node")
    host = site.host()
    host.follower.start()
    assert host.stable == 1
    site.add(2, 3)
    late = site.host()
    late.follower.start()
    assert late.stable == 3
    site.later(late, host)
    assert (host.stable, late.stable) == (3, 3)
    site.release(stable=1)
    site.later(late, host)
    assert (host.stable, late.stable) == (1, 1)


def test_a_model_that_is_new_is_served_by_its_first_step(site: Site, host: Host) -> None:
    new = Follower(Ref("other"), host.node, host.models, host.load)
    with pytest.raises(ModelNotFound):
        new.step()
    shutil.copytree(site.root / "linear/1", site.root / "other/1")
    reseal(site.root / "other/1", name="other")
    assert host.node.names() == ["linear", "other"]
    site.now += EVERY
    new.step()
    assert host.models.get("other").manifest.ref == "other/1"
    for _ in range(LISTED):
        site.now += EVERY
        assert host.node.names() == ["linear", "other"]
    assert site.asked.listings == 3, "one of them was for the message above"


def test_storage_that_fails_is_an_error_and_changes_nothing(site: Site, host: Host) -> None:
    site.release(stable=2)
    revision = site.root / "linear/releases/000002.json"
    content = revision.read_bytes()
    revision.write_bytes(b"{")
    with pytest.raises(StoreError, match="revision 2"):
        site.later(host)
    assert host.stable == 1
    revision.write_bytes(content)
    site.later(host)
    assert host.stable == 2


def test_another_repository_in_the_same_place_is_not_taken_for_the_old_one(site: Site, host: Host) -> None:
    for stable in 2, 3, 1:
        site.release(stable=stable, canary=None)
    site.later(host)
    shutil.rmtree(site.root / "linear/releases")
    site.release(stable=3)
    late = site.host()
    late.follower.start()
    site.later(late)
    assert late.stable == 3
    assert host.node.known("linear") is not None
    assert host.node.known("linear").release.revision == 1  # type: ignore[union-attr]  # it is not None


def test_another_node_verifies_for_itself(site: Site, host: Host, tmp_path: Path) -> None:
    (site.folder_of(3) / "stranger.txt").write_text("only a full verification minds")
    site.release(stable=3)
    site.later(host)
    assert host.stable == 3, "known here"
    site.folder = tmp_path / "elsewhere"
    other = site.host("linear@stable")
    other.follower._take(site.log.read(1))
    site.later(other)
    assert (other.stable, other.told[-1]) == (1, (3, "stable", "package_unsafe"))
