"""Canaries that processes of their own hold, and nobody else: what each side loads of a release, and what a bad canary costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triform.test_following import Host, Site, spoil
from triform.errors import DigestMismatch
from triform.following import AGAIN_SECONDS
from triform.models import Elsewhere
from triform.package import MANIFEST
from triform.releases import Canary
from triform.telemetry import FREED


@pytest.fixture
def site(released_models: Path, tmp_path: Path) -> Site:
    """Revision 1: stable 1, canary 2, shadow 3."""
    return Site(released_models, tmp_path / "node")


def answering(site: Site) -> Host:
    """A host that answers callers."""

    def isolated(model: str, version: int) -> Elsewhere:
        return Elsewhere(site.asked.package(model, version).manifest, lambda: True)

    return site.host(isolated=isolated)


def for_canaries(site: Site) -> Host:
    return site.host(canary_only=True)


def elsewhere(host: Host) -> list[int]:
    return [held.manifest.version for held in host.models.elsewhere()]


def here(host: Host) -> list[int]:
    return [held.manifest.version for held in host.models.predictors()]


def test_a_canary_is_loaded_where_canaries_are_and_when_it_becomes_stable(site: Site) -> None:
    host, canaries = answering(site), for_canaries(site)
    host.follower.start()
    canaries.follower.step()
    assert site.loads == [1, 3, 2], "2 by the host for canaries alone"
    assert (here(host), elsewhere(host), here(canaries)) == ([1, 3], [2], [2])
    assert host.models.get("linear", alias="canary").elsewhere
    assert "linear" in host.models.splits.live
    assert "linear" not in canaries.models.splits.live
    assert [told for told in host.told if told[0] == 2] == [], "it is told of where it is loaded"
    site.release(stable=2)
    site.later(canaries, host)
    assert (host.stable, here(host), elsewhere(host), canaries.models.names()) == (2, [2], [], [])
    assert site.loads == [1, 3, 2, 2]
    assert canaries.told[-1] == (2, "canary", FREED)
    assert host.models.get("linear").predictor.predict({"x": [[1, 2, 3]]})["y"].tolist() == [[14.0]]


def test_a_version_that_was_stable_goes_where_canaries_are(site: Site) -> None:
    host = answering(site)
    site.release(stable=2)
    host.follower.start()
    site.release(stable=1, canary=2)
    site.later(host)
    assert (host.stable, here(host), elsewhere(host)) == (1, [1], [2])
    assert (2, "stable", FREED) in host.told


def test_without_a_canary_there_is_nothing_to_hold_and_that_is_no_error(site: Site) -> None:
    site.release(stable=1)
    canaries = for_canaries(site)
    canaries.follower.step()
    assert (canaries.models.names(), canaries.told, site.loads) == ([], [], [])
    site.release(stable=1, canary=3)
    site.later(canaries)
    assert (here(canaries), site.loads) == ([3], [3])


def test_a_canary_that_is_no_good_keeps_nothing_from_what_comes_with_it(site: Site) -> None:
    """Neither from a host that runs nor from one that starts; and who holds canaries says why this one is not there."""
    host, canaries = answering(site), for_canaries(site)
    host.follower.start()
    site.add(4)
    mend = spoil(site.folder_of(4))
    site.release(stable=3, canary=2)
    site.later(host, canaries)
    assert (host.stable, here(canaries)) == (3, [2])
    release_unverified(site, stable=1, canary=4)
    site.later(host, canaries)
    late = answering(site)
    late.follower.start()
    for each in host, late:
        assert (each.stable, elsewhere(each)) == (1, [4])
    assert here(canaries) == [2], "what was there stays, and nobody asks for it"
    why = canaries.follower.why_not()
    assert why is not None
    assert (why[0], type(why[1])) == (4, DigestMismatch)
    mend()
    site.later(canaries, seconds=AGAIN_SECONDS)
    assert (here(canaries), canaries.follower.why_not()) == ([4], None)


def test_of_a_canary_that_loads_on_the_node_and_not_in_its_process_the_reason_is_known(site: Site) -> None:
    canaries = for_canaries(site)
    canaries.follower.step()
    site.release(stable=1, canary=3)
    spoil(site.folder_of(3))
    site.later(canaries)
    why = canaries.follower.why_not()
    assert why is not None
    assert (why[0], type(why[1])) == (3, DigestMismatch)


def test_a_canary_whose_manifest_cannot_be_read_is_left_out(site: Site) -> None:
    site.add(4)
    release_unverified(site, stable=3, canary=4)
    (site.folder_of(4) / MANIFEST).write_text("{")
    host = answering(site)
    host.follower.start()
    assert (host.stable, elsewhere(host), host.models.splits.live) == (3, [], {})
    assert (4, "canary", "package_invalid") in host.told
    loads = len(site.loads)
    site.later(host)
    assert len(site.loads) == loads, "the release is taken up"


def release_unverified(site: Site, *, stable: int, canary: int) -> None:
    """As it would be if the canary was good when it was released, and is no more."""
    site.log._append(site.log._next(site.log.current(), stable, Canary(canary, 0.1), None, "unverified", None))
