"""`python -m ray_apps` as its users start it: in a process of its own, with a Ray of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from ray_apps.ports import free_ports
from triform import testing

LINEAR, SLOW = "/v1/models/linear:predict", "/v2/models/slow/infer"
READY = "/v2/health/ready"
BODY = b'{"instances": [[1, 2, 3]]}'


def test_a_bad_start_names_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ray_apps"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "configuration: args: 'repository' is missing" in done.stderr) == (2, True), done.stderr
    bad = tmp_path / "args.json"
    bad.write_text('{"repository": "models", "timeout": 3}')
    command = [sys.executable, "-m", "ray_apps", "--args", bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "timeout" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_port_that_is_taken_is_named_before_ray_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ray_apps", "--allow-anonymous", "--repository", tmp_path, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"configuration: --port: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.slow  # a second Ray beside the session's
def test_a_start_that_fails_says_why_in_a_line(tmp_path: Path) -> None:
    ports = free_ports(4)
    options = ["--port", "--grpc-port", "--metrics-port", "--stats-port"]
    command = [sys.executable, "-m", "ray_apps", "--allow-anonymous", "--repository", tmp_path]
    command += ["--replica-ports", "33000", "--cpus", "2"]
    command += [str(part) for option in zip(options, ports, strict=True) for part in option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    told = done.stderr.splitlines()[-1]
    assert (done.returncode, told.startswith("internal: Ray Serve did not start: ")) == (2, True), done.stderr
    assert f"there is no model in {tmp_path}" in told


@pytest.mark.slow  # a second Ray beside the session's
def test_it_answers_what_is_in_flight_when_it_is_told_to_end(tmp_path: Path) -> None:
    http_port, grpc_port, metrics_port, stats_port = free_ports(4)
    arguments = tmp_path / "args.json"
    arguments.write_text('{"num_cpus": 0, "allow_anonymous": true, "overrides": {"slow": {"max_queue_rows": 1000000}}}')
    models = {"linear": testing.linear(tmp_path / "linear.onnx"), "slow": testing.slow(tmp_path / "slow.onnx")}
    testing.repository(tmp_path / "models", models)
    options = {
        "--repository": tmp_path / "models", "--args": arguments, "--port": http_port, "--grpc-port": grpc_port,
        "--metrics-port": metrics_port, "--stats-port": stats_port, "--replica-ports": 33000, "--cpus": 2,
        "--grace": 3,
    }  # fmt: skip
    command = [sys.executable, "-m", "ray_apps", *(str(part) for option in options.items() for part in option)]
    environment = {**os.environ, "TRIFORM_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if line.startswith("ready:"):
                    ready.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert ready.wait(120), "".join(lines)

            def ask(path: str, body: bytes | None = None) -> int:
                connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=120)
                headers = {"inference-header-content-length": "0"} if path == SLOW else {}
                connection.request("POST" if body else "GET", path, body, headers)
                status = connection.getresponse().status
                connection.close()
                return status

            with ThreadPoolExecutor(50) as clients:
                assert list(clients.map(ask, [LINEAR] * 100, [BODY] * 100)) == [200] * 100
                assert ask(READY) == 200
                asked = [clients.submit(ask, SLOW, bytes(1024 * 2000)) for _ in range(50)]
                assert next(as_completed(asked, timeout=60)).result() == 200
                assert sum(not answer.done() for answer in asked) > 3
                process.send_signal(signal.SIGTERM)
                while (ready := ask(READY)) == 200:
                    assert any(not answer.done() for answer in asked), "it was never told"
                assert (ready, ask(LINEAR, BODY)) == (503, 200), "not ready, and it answers"
                assert [answer.result(timeout=120) for answer in asked] == [200] * 50
            assert process.wait(120) == 0, "".join(lines)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(30)
