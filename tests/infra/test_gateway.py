"""The local gateway with real `awslambdaric` processes: sources, limits, deadlines, scaling, failed starts, foreign clients."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from infra.local.environments import ROOT, Environment, FunctionConfig
from infra.local.gateway import Gateway, local_gateway
from triform import testing

BODY = json.dumps({"instances": [[1, 2, 3]]}).encode()
SLOW = "tests.infra.local_handlers"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gateway")
    files = {
        "linear": testing.linear(folder / "linear.onnx"),
        "wide": testing.linear(folder / "wide.onnx", features=1, outputs=9000),
    }
    testing.repository(folder / "models", files)
    return folder / "models"


@pytest.fixture(scope="module")
def gateway(models: Path) -> Iterator[Gateway]:
    """One provisioned environment of handlers.predict behind an HTTP API."""
    environ = {"TRIFORM_REPOSITORY": str(models), "TRIFORM_DEFAULT_MODEL": "linear"}
    with local_gateway("http-v2", environ=environ, provisioned=1, max_concurrency=1) as gateway:
        yield gateway


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, body, {"content-type": "application/json", **headers})  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_requests_are_answered_by_a_provisioned_environment(gateway: Gateway) -> None:
    status, headers, body = post(f"{gateway.url}/v1/models/linear:predict", BODY)
    assert (status, json.loads(body)) == (200, {"predictions": [[14.0]]})
    assert headers["x-triform-model"] == "linear/1"
    assert gateway.reports[-1].init_ms is None
    assert gateway.reports[-1].peak_bytes > 1 << 20
    assert any("provisioned-concurrency" in line for line in gateway.lines)


def test_lambdas_own_api_invokes_directly(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("lambda", endpoint_url=gateway.url)
    answer = client.invoke(FunctionName="triform-local", Payload=json.dumps({"model": "linear", "instances": [[1, 2, 3]]}))
    assert "FunctionError" not in answer
    assert json.loads(answer["Payload"].read())["predictions"] == [[14.0]]


def test_unmodified_tritonclient_json_and_binary(gateway: Gateway) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(gateway.url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_model_ready("linear")
        assert client.get_model_metadata("linear")["inputs"][0]["name"] == "x"
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        for binary in (True, False):
            given = triton.InferInput("x", [2, 3], "FP32")
            given.set_data_from_numpy(x, binary_data=binary)
            wanted = triton.InferRequestedOutput("y", binary_data=binary)
            answer = client.infer("linear", [given], outputs=[wanted])
            assert answer.as_numpy("y").ravel().tolist() == [8.0, 26.0]
    finally:
        client.close()


def test_bodies_over_the_limits_are_refused_as_api_gateway_does(gateway: Gateway) -> None:
    invoked = len(gateway.reports)
    assert post(f"{gateway.url}/v1/models/linear:predict", b" " * (7 << 20))[0] == 413  # what Lambda does not take
    assert post(f"{gateway.url}/v1/models/linear:predict", b" " * (11 << 20))[0] == 413  # what API Gateway does not take
    assert len(gateway.reports) == invoked
    assert post(f"{gateway.url}/v1/models/linear:predict", BODY)[0] == 200


def test_an_answer_over_six_megabytes_is_an_error_of_ours(gateway: Gateway) -> None:
    status, _, body = post(f"{gateway.url}/v1/models/wide:predict", json.dumps({"instances": [[0.5]] * 300}).encode())
    assert (status, json.loads(body)["code"]) == (413, "answer_too_large")
    assert gateway.reports[-1].error is None


def test_a_second_request_beyond_the_concurrency_is_throttled(models: Path) -> None:
    with local_gateway(environ={}, handler=f"{SLOW}.nap", max_concurrency=1) as gateway, ThreadPoolExecutor(6) as pool:
        statuses = sorted(pool.map(lambda _: post(f"{gateway.url}/", b'{"nap": 0.5}')[0], range(6)))
    assert statuses == [200, 429, 429, 429, 429, 429]


def test_environments_are_added_on_demand_reaped_when_idle_and_end_with_the_gateway() -> None:
    with local_gateway(handler=f"{SLOW}.nap", max_concurrency=3, idle=0.5) as gateway:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: post(f"{gateway.url}/", b'{"nap": 0.5}'), range(3)))
        reports = list(gateway.reports)
        assert len([r for r in reports if r.init_ms is not None]) == 3
        assert post(f"{gateway.url}/", b'{"nap": 0}')[0] == 200
        pids = gateway.environments.pids()
        until(lambda: gateway.environments.count() == 0)
        until(lambda: all(map(gone, pids)))
        assert post(f"{gateway.url}/", b'{"nap": 0}')[0] == 200
        (last,) = gateway.environments.pids()
    assert gone(last)


@pytest.mark.parametrize("kind", ["http-v2", "rest", "alb", "url"])
def test_over_its_time_the_process_is_killed_and_the_next_request_gets_a_clean_one(kind: str) -> None:
    with local_gateway(kind, handler=f"{SLOW}.nap", timeout=1.0) as gateway:
        first = json.loads(post(f"{gateway.url}/", b'{"nap": 0}')[2])["pid"]
        status, _, body = post(f"{gateway.url}/", b'{"nap": 60}')
        assert status == (500 if kind == "http-v2" else 502)
        assert b"Traceback" not in body
        assert gateway.reports[-1].error == "Sandbox.Timedout"
        until(lambda: gone(first))
        again = json.loads(post(f"{gateway.url}/", b'{"nap": 0}')[2])
        assert again["pid"] != first
        assert again["calls"] == 1


def test_a_process_that_dies_takes_only_its_own_request_with_it() -> None:
    with local_gateway(handler=f"{SLOW}.nap") as gateway:
        assert post(f"{gateway.url}/", b'{"exit": 3}')[0] == 500
        assert gateway.reports[-1].error == "Runtime.ExitError"
        assert post(f"{gateway.url}/", b'{"nap": 0}')[0] == 200


def test_what_the_function_raises_is_not_shown_to_the_caller() -> None:
    with local_gateway(handler=f"{SLOW}.nap") as gateway:
        status, _, body = post(f"{gateway.url}/", b'{"fail": "hush"}')
        assert (status, b"hush" in body) == (500, False)
        assert any("hush" in line for line in gateway.lines)
        pid = gateway.environments.pids()
        assert post(f"{gateway.url}/", b'{"nap": 0}')[0] == 200
        assert gateway.environments.pids() == pid  # an error is no reason to end the environment


def test_a_payload_over_the_limit_is_the_functions_error() -> None:
    with local_gateway(handler=f"{SLOW}.nap") as gateway:
        assert post(f"{gateway.url}/", json.dumps({"answer": 7 << 20}).encode())[0] == 500
        assert gateway.reports[-1].error == "Function.ResponseSizeTooLarge"


def test_a_failed_start_is_an_init_error_and_the_next_environment_is_clean(models: Path, tmp_path: Path) -> None:
    """The repository is not there at first: every start fails, and says why in the log alone."""
    place = tmp_path / "later"
    with local_gateway(environ={"TRIFORM_REPOSITORY": str(place), "TRIFORM_DEFAULT_MODEL": "linear"}) as gateway:
        status, _, body = post(f"{gateway.url}/v1/models/linear:predict", BODY)
        assert status == 500
        assert str(place).encode() not in body
        assert any("ConfigurationError" in line for line in gateway.lines)
        assert any("INIT_REPORT Status: error" in line for line in gateway.lines)
        assert gateway.environments.count() == 0
        place.symlink_to(models)
        assert post(f"{gateway.url}/v1/models/linear:predict", BODY)[0] == 200
        assert gateway.reports[-1].init_ms is not None


def test_a_provisioned_environment_that_does_not_start_is_told() -> None:
    with pytest.raises(RuntimeError, match="TRIFORM_COLOUR"), local_gateway(environ={"TRIFORM_COLOUR": "red"}, provisioned=1):
        pass


def test_a_connection_is_kept_for_many_requests(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=60)
    for _ in range(5):
        connection.request("POST", "/v1/models/linear:predict", BODY, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"predictions":[[14.0]]}')
    connection.request("POST", "/v1/models/linear:predict", iter([BODY[:5], BODY[5:]]), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200  # chunked
    answer.read()
    connection.request("HEAD", "/v2/health/live")
    assert connection.getresponse().read() == b""
    connection.close()


def test_requests_at_once_are_each_answered_their_own(gateway: Gateway) -> None:
    with (
        local_gateway(environ=dict(gateway.environments.config.environ), max_concurrency=2) as two,
        ThreadPoolExecutor(2) as pool,
    ):

        def ask(i: int) -> Any:
            return json.loads(post(f"{two.url}/v1/models/linear:predict", json.dumps({"instances": [[i, 0, 0]]}).encode())[2])

        assert list(pool.map(ask, range(20))) == [{"predictions": [[float(i)]]} for i in range(20)]


def test_a_function_starts_from_a_snapshot(models: Path) -> None:
    lines: list[str] = []
    environ = {**os.environ, "TRIFORM_REPOSITORY": str(models), "TRIFORM_DEFAULT_MODEL": "linear"}
    environment = Environment(FunctionConfig(environ=environ), "snap-start", lines.append)
    try:
        assert environment.start() is None, lines
        for _ in range(2):
            outcome = environment.invoke("first", json.dumps({"instances": [[1, 2, 3]]}).encode())
            assert (outcome.error, json.loads(outcome.payload)["predictions"]) == (None, [[14.0]])
    finally:
        environment.close()
    assert not any('"cold_start":true' in line for line in lines)
    assert sum("triform_cold_starts_total" in line and "snap-start" in line for line in lines) == 1


def test_the_command_serves_until_it_is_told_to_end(models: Path) -> None:
    command = [sys.executable, "-m", "infra.local.gateway", "--port", "0", "--event", "rest", "--repository", str(models)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRIFORM_DEFAULT_MODEL": "linear"}
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        too_long = threading.Timer(120, process.kill)  # then nothing more is read of it
        too_long.start()
        try:
            assert process.stdout is not None
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert url
            assert post(f"{url[0]}/v1/models/linear:predict", BODY)[0] == 200
            said = iter(process.stdout.readline, "")
            report = next((line for line in said if line.startswith("REPORT")), "no REPORT line")
            assert "Init Duration" in report
            children = [child.pid for child in psutil.Process(process.pid).children()]
            assert len(children) == 1
            process.terminate()
            assert process.wait(30) == 0
        finally:
            too_long.cancel()
            process.kill()
    until(lambda: all(map(gone, children)))


def test_threads_end_with_the_gateway(models: Path) -> None:
    before = threading.active_count()
    with local_gateway(handler=f"{SLOW}.nap") as gateway:
        post(f"{gateway.url}/", b'{"nap": 0}')
    until(lambda: threading.active_count() <= before)
