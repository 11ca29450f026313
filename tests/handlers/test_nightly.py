"""The nightly function against a real Ray with its job API; what no healthy Ray does comes from a small HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from handlers._ray_jobs import RayJobs
from tests.handlers.loopback import Quiet, served
from tests.handlers.starting import Handler, Invocation, golden_event, metrics, start
from triform.errors import ConfigurationError, InvalidRequest, StoreError

NIGHT = "2026-11-21T02:00:00Z"


@pytest.fixture
def address(ray_cluster: Any) -> str:
    return f"http://{ray_cluster._private.worker._global_node.address_info['webui_url']}"


@pytest.fixture
def nightly(
    address: str, token_secret: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Handler]:
    """`nightly(script)`: the function, whose job is that Python script with the partition as its argument."""

    def make(script: str, **settings: object) -> Handler:
        file = tmp_path / "job.py"
        file.write_text(script)
        command = f"{sys.executable} {file} {{partition}}"
        return start("nightly", monkeypatch, ray_address=address, nightly_entrypoint=command, **token_secret, **settings)

    return make


def until(handler: Handler, event: dict[str, Any], *ended: str, seconds: float = 90.0) -> dict[str, Any]:
    """The first answer with one of these statuses."""
    deadline = time.monotonic() + seconds
    while True:
        told: dict[str, Any] = handler(event, Invocation())
        if told["status"] in ended:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.2)


def begun(handler: Handler, event: dict[str, Any]) -> dict[str, Any]:
    """The first answer; a cluster that has just begun refuses jobs for some seconds."""
    deadline = time.monotonic() + 60
    while True:
        try:
            told: dict[str, Any] = handler(event, Invocation())
        except StoreError as error:
            if "denies" in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return told


APPEND = "import sys; open({path!r}, 'a').write(sys.argv[1] + chr(10))"


def test_a_night_is_begun_once_however_often_its_schedule_says_so(
    nightly: Callable[..., Handler], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = nightly(APPEND.format(path=str(tmp_path / "ran")), default_model="lookup")
    event = golden_event("nightly-schedule", time=NIGHT)
    first = begun(handler, event)
    assert first["partition"] == "day=2026-11-20"
    assert first["submission_id"].startswith("triform-day-2026-11-20-")
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: handler(event, Invocation()), range(4)))
    assert {told["submission_id"] for told in again} == {first["submission_id"]}
    until(handler, event, "SUCCEEDED")
    assert handler({"poll": first["submission_id"]}, Invocation())["status"] == "SUCCEEDED"
    assert handler({"poll": True, "time": NIGHT}, Invocation())["status"] == "SUCCEEDED"
    assert (tmp_path / "ran").read_text() == "day=2026-11-20\n"
    done = metrics(capfd.readouterr().out, "triform_run_success")
    assert [line["triform_run_success"] for line in done][-1] == [1.0]
    assert done[-1]["model"] == "lookup"


def test_of_many_who_begin_a_night_at_once_one_wins(nightly: Callable[..., Handler], tmp_path: Path) -> None:
    handler = nightly(APPEND.format(path=str(tmp_path / "ran")))
    event = {"partition": "day=2026-01-02"}
    begun(handler, {"poll": True, **event})
    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(lambda _: begun(handler, event), range(6)))
    assert len({one["submission_id"] for one in told}) == 1
    until(handler, event, "SUCCEEDED")
    assert (tmp_path / "ran").read_text() == "day=2026-01-02\n"


def test_a_night_that_fails_is_begun_again_and_then_alerts(
    nightly: Callable[..., Handler], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = nightly(f"{APPEND.format(path=str(tmp_path / 'ran'))}; sys.exit(1)", nightly_attempts=2)
    event = {"partition": "day=2026-01-03"}
    begun(handler, event)
    told = until(handler, event, "FAILED")
    assert told["submission_id"].endswith("-2")
    assert (tmp_path / "ran").read_text() == "day=2026-01-03\n" * 2
    assert [line["triform_run_success"] for line in metrics(capfd.readouterr().out, "triform_run_success")][-1] == [0.0]


def test_what_fails_for_good_is_not_begun_again(nightly: Callable[..., Handler], tmp_path: Path) -> None:
    handler = nightly(f"{APPEND.format(path=str(tmp_path / 'ran'))}; sys.exit(4)")  # too many dead letters
    event = {"partition": "day=2026-01-04"}
    begun(handler, event)
    until(handler, event, "FAILED")
    assert handler(event, Invocation())["status"] == "FAILED"
    assert (tmp_path / "ran").read_text() == "day=2026-01-04\n"


def test_a_night_that_is_late_or_missing_alerts(
    nightly: Callable[..., Handler], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "released"
    handler = nightly(f"import os, time\nwhile not os.path.exists({str(released)!r}): time.sleep(0.1)")
    long_ago = {"time": NIGHT, "partition": "day=2026-01-05"}
    assert handler({**long_ago, "time": "2026-11-01T00:00:00Z", "poll": True}, Invocation())["status"] == "LATE"
    now = {"time": datetime.now(UTC).isoformat(), "partition": "day=2026-01-05"}
    assert handler({**now, "poll": True}, Invocation())["status"] == "MISSING"
    assert begun(handler, now)["status"] in ("PENDING", "RUNNING")
    assert len(metrics(capfd.readouterr().out, "triform_run_success")) == 1
    assert handler({**long_ago, "time": "2026-11-01T00:00:00Z"}, Invocation())["status"] == "LATE"
    assert metrics(capfd.readouterr().out, "triform_run_success")[0]["triform_run_success"] == [0.0]
    released.touch()
    until(handler, now, "SUCCEEDED")


@pytest.mark.parametrize(
    "event",
    [
        [], "night", {"partition": "day=2026; rm -rf ."}, {"partition": "../x"}, {"partition": 7}, {"time": "yesterday"},
        {"poll": "../../api"}, {"partition": "$(x)=1"}, {"time": 7}, {"time": "0001-01-01T00:00:00Z"},
        {"time": "0001-01-01T00:00:00+14:00"}, {"time": "9999-12-31T23:59:59-14:00"}, {"time": "2026-11-21T02:00:00+99:00"},
    ],
)  # fmt: skip
def test_events_that_say_nothing_sensible_are_refused(event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = start("nightly", monkeypatch, ray_address="http://127.0.0.1:9")
    with pytest.raises(InvalidRequest):
        handler(event, Invocation())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "TRIFORM_RAY_ADDRESS"),
        ({"ray_address": "ray://head:10001"}, "ray_address"),
        ({"ray_address": "http://head:8265", "ray_token_secret": "token"}, "https"),
        ({"ray_address": "https://user:pass@head:8265"}, "ray_address"),
        ({"ray_address": "https://head:8265", "ray_ca": "/nowhere/ca.pem"}, "ray_ca"),
        ({"ray_address": "https://head:8265", "nightly_entrypoint": "python job.py"}, "TRIFORM_NIGHTLY_ENTRYPOINT"),
        ({"ray_address": "https://head:8265", "nightly_partition": "%Y-%m-%d"}, "TRIFORM_NIGHTLY_PARTITION"),
        ({"ray_address": "https://head:8265", "nightly_partition": "day=%Y\udcff"}, "TRIFORM_NIGHTLY_PARTITION"),
        ({"ray_address": "https://head:8265", "nightly_seconds": "0"}, "TRIFORM_NIGHTLY_SECONDS"),
        ({"ray_address": "https://head:8265", "nightly_attempts": "nan"}, "TRIFORM_NIGHTLY_ATTEMPTS"),
        ({"ray_address": "https://head:8265", "ray_runtime_env": "[]"}, "TRIFORM_RAY_RUNTIME_ENV"),
    ],
)
def test_a_start_with_a_bad_setting_is_refused(settings: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=named):
        start("nightly", monkeypatch, **settings)


@contextmanager
def job_api(
    status: int = 200, body: bytes = b"{}", certificate: Path | None = None, **headers: str
) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers everything alike, and what it was asked: (method, path, authorization)."""
    asked: list[Any] = []

    class Answer(Quiet):
        def reply(self) -> None:
            asked.append((self.command, self.path, self.headers.get("Authorization")))
            self.body()
            self.answer(status, body, **headers)

    with served(Answer, certificate) as address:
        yield address, asked


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b"Traceback (most recent call last): secret", "answered 500"),
        (200, b"<html>", "no job"),
        (200, b'{"status": 7}', "no job"),
        (200, b'{"status": "RUNNING", "start_time": 999999999999999999}', "no job"),
        (403, b"Forbidden", "denies access"),
        (302, b"", "answered 302"),
    ],
)
def test_what_is_no_job_api_is_an_error_that_tells_nothing_more(
    status: int, body: bytes, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with job_api() as (elsewhere, asked_elsewhere), job_api(status, body, Location=f"{elsewhere}/x") as (address, _):
        handler = start("nightly", monkeypatch, ray_address=address)
        with pytest.raises(StoreError, match=told) as error:
            handler({}, Invocation())
    assert "secret" not in str(error.value)
    assert asked_elsewhere == []
    assert [line["triform_run_success"] for line in metrics(capfd.readouterr().out, "triform_run_success")] == [[0.0]]


@pytest.mark.parametrize("time", ["0001-01-02T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_the_ends_of_the_calendar_are_nights_too(time: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = json.dumps({"status": "RUNNING", "start_time": 0}).encode()
    with job_api(200, running) as (address, _):
        handler = start("nightly", monkeypatch, ray_address=address, nightly_seconds="1e300")
        assert handler({"time": time}, Invocation())["status"] == "RUNNING"


def test_a_cluster_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with job_api() as (address, _):
        pass
    with pytest.raises(StoreError, match="does not answer"):
        start("nightly", monkeypatch, ray_address=address)({}, Invocation())


def test_the_token_comes_from_its_secret(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3.client("secretsmanager").create_secret(Name=s3_bucket, SecretString="of-the-cluster")
    running = json.dumps({"status": "RUNNING", "type": "SUBMISSION", "submission_id": "x"}).encode()
    with job_api(200, running) as (address, asked):
        handler = start("nightly", monkeypatch, ray_address=address, ray_token_secret=s3_bucket)
        assert handler({"poll": "x"}, Invocation()) == {"submission_id": "x", "status": "RUNNING"}
    assert asked == [("GET", "/api/jobs/x", "Bearer of-the-cluster")]


def test_tls_is_checked(tmp_path: Path) -> None:
    key, trusted, certificate = tmp_path / "key.pem", tmp_path / "ca.pem", tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(trusted)]
    subprocess.run([*command, *named], check=True, capture_output=True, timeout=60)
    certificate.write_bytes(key.read_bytes() + trusted.read_bytes())
    with job_api(404, certificate=certificate) as (address, _):
        assert RayJobs(address, ca=str(trusted)).find("x") is None
        with pytest.raises(StoreError, match="does not answer"):
            RayJobs(address).find("x")
