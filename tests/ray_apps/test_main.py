"""`python -m ray_apps` as its users start it: in a process of its own, with a Ray of its own."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from tests.ray_apps.ports import free_ports
from triform import testing

LINEAR, SLOW = "/v1/models/linear:predict", "/v2/models/slow/infer"
BODY = b'{"instances": [[1, 2, 3]]}'


def test_a_bad_start_names_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ray_apps"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "configuration: args: 'repository' is missing" in done.stderr) == (2, True), done.stderr
    bad = tmp_path / "args.json"
    bad.write_text('{"repository": "models", "timeout": 3}')
    command = [sys.executable, "-m", "ray_apps", "--args", bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "timeout" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


@pytest.mark.slow  # a second Ray beside the session's
def test_it_answers_what_is_in_flight_when_it_is_told_to_end(tmp_path: Path) -> None:
    http_port, grpc_port, metrics_port, stats_port = free_ports(4)
    arguments = tmp_path / "args.json"
    arguments.write_text(
        '{"num_cpus": 0, "drain_s": 60, "allow_anonymous": true, "overrides": {"slow": {"max_queue_rows": 1000000}}}'
    )
    models = {"linear": testing.linear(tmp_path / "linear.onnx"), "slow": testing.slow(tmp_path / "slow.onnx")}
    testing.repository(tmp_path / "models", models)
    options = {
        "--repository": tmp_path / "models", "--args": arguments, "--port": http_port, "--grpc-port": grpc_port,
        "--metrics-port": metrics_port, "--stats-port": stats_port, "--replica-ports": 33000, "--cpus": 2,
    }  # fmt: skip
    command = [sys.executable, "-m", "ray_apps", *(str(part) for option in options.items() for part in option)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
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

            def ask(path: str, body: bytes) -> int:
                connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=120)
                connection.request("POST", path, body, {"inference-header-content-length": "0"} if path == SLOW else {})
                status = connection.getresponse().status
                connection.close()
                return status

            with ThreadPoolExecutor(30) as clients:
                assert list(clients.map(ask, [LINEAR] * 100, [BODY] * 100)) == [200] * 100
                asked = [clients.submit(ask, SLOW, bytes(1024 * 2000)) for _ in range(30)]
                assert next(as_completed(asked, timeout=60)).result() == 200
                assert sum(not answer.done() for answer in asked) > 3
                process.send_signal(signal.SIGTERM)
                assert [answer.result(timeout=120) for answer in asked] == [200] * 30
            assert process.wait(120) == 0, "".join(lines)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(30)
