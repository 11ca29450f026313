"""References: what they parse to, what they mean in a repository, and what they say when they mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from triform.errors import AliasNotFound, ConfigurationError, InvalidReference, ModelNotFound, VersionNotFound
from triform.releases import Canary, ReleaseLog, Shadow
from triform.repository import Ref, open_repository, resolve


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("name", Ref("name")),
        ("a-b_c.d9", Ref("a-b_c.d9")),
        ("name@stable", Ref("name", alias="stable")),
        ("name@canary", Ref("name", alias="canary")),
        ("name@shadow", Ref("name", alias="shadow")),
        ("name/3", Ref("name", version=3)),
        ("name/999999999", Ref("name", version=999999999)),
    ],
)
def test_a_reference_is_parsed_and_printed_alike(text: str, ref: Ref) -> None:
    assert Ref.parse(text) == ref
    assert str(ref) == text


NONE = [
    "", " ", ".", "..", "../etc", "/etc/passwd", "a%2f..", ".hidden", "a\0b", "a\nb", "name\n", "a b", "ü", "$(id)", "C:\\x", "s3://b/k",
    "name@nope", "name@", "@stable", "name@Stable", "name/3@stable", "name@stable/3",
    "name/0", "name/-1", "name/", "name/01", "name/1.0", "name/1e3", "name/1/2", "name/../x", "name/9999999999", "name/\u0661",
    "n" * 101, "n" * 1_000_000, "name/" + "9" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", NONE, ids=lambda text: ascii(text)[:30])
def test_what_is_no_reference_is_refused_in_a_short_sentence(models: Path, text: str) -> None:
    for attempt in (lambda: Ref.parse(text), lambda: resolve(open_repository(models), text)):
        with pytest.raises(InvalidReference, match="is not a model reference: write name") as raised:
            attempt()
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)
        assert "\0" not in str(raised.value)


@pytest.mark.parametrize("model", ["../etc", "a/b", "", ".x", "a\0", "n" * 300])
def test_a_store_never_joins_a_name_that_is_none(models: Path, model: str) -> None:
    repository = open_repository(models)
    for attempt in (
        lambda: repository.versions(model),
        lambda: repository.package(model, 1),
        lambda: repository.latest_revision(model),
        lambda: repository.read_release(model, 1),
        lambda: repository.create_release(model, 1, b""),
        lambda: repository.publish(models, model, 1),
        lambda: repository.staging(model).__enter__(),
    ):
        with pytest.raises(InvalidReference):
            attempt()


def test_before_any_release_a_bare_name_means_the_highest_version(three_versions: Path) -> None:
    repository = open_repository(three_versions)
    assert resolve(repository, "linear") == ("linear", 3)
    assert resolve(repository, "linear/2") == ("linear", 2)
    with pytest.raises(AliasNotFound, match="never released: run `triform release set linear --stable 3`"):
        resolve(repository, "linear@stable")


def test_after_a_release_names_and_aliases_mean_what_it_says(three_versions: Path) -> None:
    repository = open_repository(three_versions)
    ReleaseLog(repository, "linear").set(stable=1, canary=Canary(2, 0.1), shadow=Shadow(3, 1.0))
    refs = ("linear", "linear@stable", "linear@canary", "linear@shadow", "linear/3")
    assert [resolve(repository, ref)[1] for ref in refs] == [1, 1, 2, 3, 3]
    ReleaseLog(repository, "linear").set(stable=2)
    with pytest.raises(AliasNotFound, match="revision 2 of 'linear' has no canary"):
        resolve(repository, "linear@canary")


def test_what_is_not_there_is_told_with_what_is(three_versions: Path) -> None:
    repository = open_repository(three_versions)
    with pytest.raises(ModelNotFound, match=r"no model 'other' .*it has: linear"):
        resolve(repository, "other@stable")
    with pytest.raises(VersionNotFound, match=r"no version 7 .it has: 1, 2, 3."):
        resolve(repository, "linear/7")
    with pytest.raises(ModelNotFound, match="none at all"):
        resolve(open_repository(three_versions / "empty"), "linear")


@pytest.mark.parametrize("location", ["gs://bucket/prefix", "https://example.com", "file:///tmp", "s3://", "s3://b"])
def test_a_location_that_no_store_knows_is_refused(location: str) -> None:
    with pytest.raises(ConfigurationError, match="repository"):
        open_repository(location)
