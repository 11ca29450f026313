"""`python -m ray_apps` as its users start it: in a process of its own, with a Ray of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ray_apps.__main__ import End
from ray_apps.ports import free_ports
from tests.ray_apps.load import Asked, until
from triform import testing

LINEAR, SLOW = "/v1/models/linear:predict", "/v2/models/slow/infer"
READY = "/v2/health/ready"
BODY = b'{"instances": [[1, 2, 3]]}'


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, path: str, body: bytes | None = None) -> int:
    """The status of the answer; 0: there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST" if body else "GET", path, body)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def told(folder: Path) -> str:
    return (folder / "log").read_text()


@contextmanager
def started(folder: Path, ports: Sequence[int], *options: object) -> Iterator[subprocess.Popen[bytes]]:
    """The repository `models` of the folder, served; standard error goes to `log` in it."""
    named = zip(["--port", "--grpc-port", "--metrics-port", "--stats-port"], ports, strict=True)
    fixed = ["--repository", folder / "models", "--replica-ports", 33000, "--cpus", 2]
    command = [sys.executable, "-m", "ray_apps", *map(str, [*fixed, *(part for pair in named for part in pair), *options])]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}  # those are the session's
    environment = {**ours, "TRIFORM_CACHE": str(folder / "cache")}
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_bad_start_names_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ray_apps"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "configuration: args: 'repository' is missing" in done.stderr) == (2, True), done.stderr
    bad = tmp_path / "args.json"
    for text, told in (
        ('{"repository": "models", "timeout": 3}', "timeout"), ("{", "args.json is no JSON"), ("[]", "expected a JSON object"),
        (None, "args.json cannot be read: No such file"),
    ):  # fmt: skip
        bad.unlink() if text is None else bad.write_text(text)
        command = [sys.executable, "-m", "ray_apps", "--args", bad]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_port_that_is_taken_is_named_before_ray_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ray_apps", "--allow-anonymous", "--repository", tmp_path, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"configuration: --port: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize("given", [True, False], ids=["--folder", "TMPDIR"])
def test_a_folder_whose_sockets_haproxy_could_not_open_is_named_before_ray_starts(tmp_path: Path, given: bool) -> None:
    deep = tmp_path / ("x" * 84)
    deep.mkdir()
    ports = zip(["--port", "--grpc-port", "--metrics-port", "--stats-port"], map(str, free_ports(4)), strict=True)
    options = [*(part for pair in ports for part in pair), *(["--folder", deep] if given else [])]
    command = [sys.executable, "-m", "ray_apps", "--allow-anonymous", "--repository", tmp_path, *options]
    environment = os.environ if given else {**os.environ, "TMPDIR": str(deep)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, list(deep.glob("triform*"))) == (2, "", [])
    assert done.stderr.startswith(f"configuration: --folder: {deep}"), done.stderr
    assert done.stderr.endswith("HAProxy's sockets take 84: name a folder with a shorter path\n")


@pytest.fixture
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_off_what_starts_and_nothing_after(number: signal.Signals) -> None:
    end = End()
    with pytest.raises(SystemExit, match=f"^{128 + number}$"), end.breaks_off():
        signal.raise_signal(number)
    with (serving := End()).breaks_off():
        pass
    signal.raise_signal(number)
    serving.wait()


@pytest.mark.slow  # a second Ray beside the session's
def test_a_start_that_fails_says_why_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with started(tmp_path, free_ports(4), "--allow-anonymous") as process:
        code = process.wait(300)
    last = told(tmp_path).splitlines()[-1]
    assert (code, last.startswith("internal: Ray Serve did not start: ")) == (2, True), told(tmp_path)
    assert f"there is no model in {tmp_path / 'models'}" in last


@pytest.mark.slow  # a second Ray beside the session's
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_would_wait_for_ever_can_be_ended(tmp_path: Path, number: signal.Signals) -> None:
    """More replicas than there is room for; it leaves nothing behind that holds a port."""
    ports = free_ports(4)
    arguments = tmp_path / "args.json"
    arguments.write_text('{"num_replicas": 4, "num_cpus": 1, "allow_anonymous": true}')
    testing.repository(tmp_path / "models", {"linear": testing.linear(tmp_path / "linear.onnx")})
    with started(tmp_path, ports, "--args", arguments) as process:
        until(lambda: all(map(listens, ports[:2])) or process.poll() is not None, 240)  # HAProxy stands, two replicas never will
        process.send_signal(number)
        assert process.wait(180) == 128 + number, told(tmp_path)
        until(lambda: not any(map(listens, ports[:2])), 10)
    assert "Traceback" not in told(tmp_path)


@pytest.mark.slow  # a second Ray beside the session's
def test_it_answers_what_is_in_flight_when_it_is_told_to_end(tmp_path: Path) -> None:
    """Fifty requests, none of which can have been answered before."""
    ports = free_ports(4)
    arguments = tmp_path / "args.json"
    arguments.write_text('{"num_cpus": 0, "allow_anonymous": true, "timeout_s": 600, "drain_s": 300}')
    models = {"linear": testing.linear(tmp_path / "linear.onnx"), "slow": testing.slow(tmp_path / "slow.onnx")}
    testing.repository(tmp_path / "models", models)
    with started(tmp_path, ports, "--args", arguments, "--grace", 3) as process:
        until(lambda: "ready:" in told(tmp_path) or process.poll() is not None, 240)
        assert "ready:" in told(tmp_path), told(tmp_path)
        port = ports[0]
        with ThreadPoolExecutor(50) as clients:
            assert list(clients.map(partial(ask, port), [LINEAR] * 100, [BODY] * 100)) == [200] * 100
            assert ask(port, READY) == 200
            asked = [Asked(port, SLOW, bytes(1024 * 100), inference_header_content_length="0") for _ in range(50)]
            process.send_signal(signal.SIGTERM)
            until(lambda: ask(port, READY) == 503)
            assert ask(port, LINEAR, BODY) == 200, "not ready, and it answers"
            assert list(clients.map(Asked.finish, asked[:25])) == [200] * 25
            until(lambda: ask(port, LINEAR, BODY) != 200)  # it takes no new ones any more
            assert list(clients.map(Asked.finish, asked[25:])) == [200] * 25
        assert process.wait(120) == 0, told(tmp_path)
