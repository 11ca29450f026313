"""S3 on a bad day: faults are survived within a budget, or told; nothing half, nothing secret. A real HTTP server, moto's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faulty_proxy import Fault, FaultyProxy
from triform import testing
from triform.errors import ConfigurationError, DigestMismatch, PackageError, StoreError, TriformError
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.stores import s3
from triform.stores.cache import PackageCache
from triform.stores.s3_repository import S3Repository


@pytest.fixture
def store(proxy: FaultyProxy, s3_bucket: str, tmp_path: Path) -> S3Repository:
    """A repository with one model, reached through the proxy; nothing is in its cache."""
    proxy.fail()
    package_model(testing.linear(tmp_path / "linear.onnx"), name="linear", repository=opened(s3_bucket, tmp_path / "builder"))
    return opened(s3_bucket, tmp_path / "cache", proxy.url)


def opened(bucket: str, cache: Path, endpoint: str | None = None) -> S3Repository:
    return S3Repository.open(f"s3://{bucket}/models", PackageCache(cache), endpoint_url=endpoint, read_timeout=1.0)


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall", "flip", "late"])
def test_a_package_comes_whole_through_faults(store: S3Repository, proxy: FaultyProxy, fault: Fault) -> None:
    proxy.fail(fault, fault, where="/blobs/")
    store.package("linear", 1).verify("golden")
    assert proxy.taken == [fault, fault]


@pytest.mark.slow
def test_faults_without_end_are_an_error_and_leave_nothing(store: S3Repository, proxy: FaultyProxy) -> None:
    proxy.fail(*["flip"] * 100, where="/blobs/")  # type: ignore[arg-type]  # a list of literals
    with pytest.raises(DigestMismatch, match="another sha256"):
        store.package("linear", 1)
    assert [f.name for f in store.cache.root.iterdir() if not f.name.startswith(".lock-")] == []
    proxy.fail()
    store.package("linear", 1).verify("golden")


def test_a_release_whose_response_was_lost_is_known_as_ones_own(store: S3Repository, proxy: FaultyProxy) -> None:
    proxy.fail("cut", where="/releases/000001.json", method="PUT")
    proxy.seen.clear()
    assert ReleaseLog(store, "linear").set(stable=1).revision == 1
    assert sum(request.startswith("PUT") and "/releases/000001.json" in request for request in proxy.seen) == 2
    proxy.fail()
    assert len(ReleaseLog(store, "linear").history()) == 1


def test_a_cached_package_is_not_fetched_again(store: S3Repository, proxy: FaultyProxy) -> None:
    first = store.package("linear", 1)
    before = proxy.requests
    assert store.package("linear", 1).folder == first.folder
    assert proxy.requests - before == 1  # the manifest, which says which package it is


def test_files_larger_than_a_range_come_in_order(s3_bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.fail("reset", "cut", where="/blobs/")
    model = testing.linear(tmp_path / "wide.onnx", features=1000, outputs=2 * s3.RANGE_BYTES // 4000 + 7)
    package_model(model, name="wide", repository=opened(s3_bucket, tmp_path / "builder"))
    package = opened(s3_bucket, tmp_path / "cache", proxy.url).package("wide", 1)
    assert package.manifest.files["model.onnx"].size > 2 * s3.RANGE_BYTES
    package.verify("golden")


def test_the_search_for_the_last_revision_does_not_grow_with_the_log(store: S3Repository, proxy: FaultyProxy) -> None:
    for revision in range(1, 70):
        store.create_release("linear", revision, b"{}")
    before = proxy.requests
    assert store.latest_revision("linear") == 69
    assert proxy.requests - before <= 16


def test_a_denial_names_the_permissions_and_is_not_tried_again(store: S3Repository, proxy: FaultyProxy) -> None:
    proxy.fail("403", "403", where="/blobs/")
    with pytest.raises(StoreError, match=r"denies GetObject \(AccessDenied\): .* s3:GetObject") as told:
        store.package("linear", 1)
    assert "secret" not in str(told.value)


def test_what_is_missing_is_told_without_secrets(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        S3Repository.open("s3://nobody-has-this-bucket", PackageCache(tmp_path)).versions("linear")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials") as told:
        opened(s3_bucket, tmp_path).versions("linear")
    assert "test-secret" not in str(told.value)


def test_a_store_that_nobody_answers_for_is_an_error(s3_bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not answer"):
        opened(s3_bucket, tmp_path, "http://127.0.0.1:9").versions("linear")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_manifest_is_refused(store: S3Repository, content: bytes) -> None:
    store.bucket.client.put_object(Bucket=store.bucket.name, Key=f"{store.prefix}linear/1/manifest.json", Body=content)
    with pytest.raises(PackageError, match="manifest"):
        store.package("linear", 1)


def test_a_manifest_moved_to_another_place_is_refused(store: S3Repository) -> None:
    source = {"Bucket": store.bucket.name, "Key": f"{store.prefix}linear/1/manifest.json"}
    store.bucket.client.copy_object(Bucket=store.bucket.name, Key=f"{store.prefix}linear/2/manifest.json", CopySource=source)
    with pytest.raises(DigestMismatch, match="its place"):
        store.package("linear", 2)


@pytest.mark.parametrize(
    "location", ["s3://", "s3://UPPER/x", "s3://bucket/../x", "s3://a b/c", "gs://bucket/x", "s3://bucket/a?b"]
)
def test_locations_that_are_none_are_refused(location: str) -> None:
    with pytest.raises((ConfigurationError, TriformError), match="repository: "):
        open_repository(location)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from triform.errors import StoreError
from triform.stores.cache import PackageCache
from triform.stores.s3_repository import S3Repository
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = S3Repository.open(sys.argv[1], PackageCache(Path(sys.argv[2])))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
try:
    store.package("linear", 1)
except StoreError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print([path.name for path in Path(sys.argv[2]).iterdir() if not path.name.startswith(".lock-")])
store.package("linear", 1).verify("golden")
"""


def test_a_disk_that_fills_in_mid_download_holds_no_half_model(store: S3Repository, s3_bucket: str, tmp_path: Path) -> None:
    """In a process that may write 100 bytes to a file, which fails where a full disk does."""
    command = [sys.executable, "-c", FULL_DISK, f"s3://{s3_bucket}/models", str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told, left = done.stdout.splitlines()
    assert "File too large" in told
    assert left == "[]"
