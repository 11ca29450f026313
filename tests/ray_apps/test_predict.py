"""The application on Ray Serve: what lies around the surface there. The surface itself is in tests/conformance."""

from __future__ import annotations

import http.client
import logging
import os
import re
import time
import urllib.request
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pytest
import tritonclient.http

from ray_apps.environment import FAST, missing
from tests.ray_apps.hosts import metrics_port
from tests.ray_apps.ports import SERVE_PORTS
from triform.telemetry import REQUEST_SECONDS

BODY = b'{"instances": [[1, 2, 3]]}'


@pytest.fixture
def address(serve_address: tuple[str, int]) -> tuple[str, int]:
    return serve_address


def post(address: tuple[str, int], path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes, list[Any]]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheaders()
    finally:
        connection.close()


def test_haproxy_stands_in_front(address: tuple[str, int]) -> None:
    assert missing(os.environ) == []
    names: set[str] = set()
    deadline = time.monotonic() + 30
    while not names and time.monotonic() < deadline:
        listening = [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == SERVE_PORTS.http]
        for pid in filter(None, listening):
            with suppress(psutil.NoSuchProcess):  # one that was replaced, for another configuration
                names.add(psutil.Process(pid).name())
    assert names == {"haproxy"}


def test_an_unmodified_triton_client(address: tuple[str, int]) -> None:
    with tritonclient.http.InferenceServerClient(f"{address[0]}:{address[1]}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("linear")
        x = tritonclient.http.InferInput("x", [2, 3], "FP32")
        x.set_data_from_numpy(np.array([[1, 2, 3], [4, 5, 6]], np.float32), binary_data=True)
        answer = client.infer("linear", [x], request_id="triton-1")
        assert answer.as_numpy("y").tolist() == [[14.0], [32.0]]
        assert answer.get_response()["id"] == "triton-1"


def test_many_clients_at_once_get_their_own_answers(address: tuple[str, int]) -> None:
    def ask(i: int) -> tuple[int, bytes]:
        return post(address, "/v1/models/linear:predict", b'{"instances": [[%d, 0, 0]]}' % i)[:2]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(200)))
    assert answers == [(200, b'{"predictions":[[%d.0]]}' % i) for i in range(200)]


def test_the_request_id_comes_back_once(address: tuple[str, int]) -> None:
    for told in {"x-request-id": "mine-1"}, {}:
        headers = post(address, "/v1/models/linear:predict", BODY, told)[2]
        ids = [value for name, value in headers if name.lower() == "x-request-id"]
        assert len(ids) == 1
        assert not told or ids == ["mine-1"]


def test_what_is_counted_is_exported_by_ray(address: tuple[str, int], ray_cluster: Any) -> None:
    assert post(address, "/v1/models/linear:predict", BODY)[0] == 200
    assert post(address, "/v1/models/nobody:predict", BODY)[0] == 404
    port = metrics_port(ray_cluster)
    wanted = [
        'ray_triform_requests_total{', 'ray_triform_request_seconds_bucket{', 'stage="execute"', 'code="model_not_found"',
        'ray_triform_model_info{', 'model="linear"', 'ray_triform_batch_rows_bucket{',
    ]  # fmt: skip
    deadline = time.monotonic() + 90
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = [line for line in page.read().decode().splitlines() if line.startswith("ray_triform_")]
        lacking = [text for text in wanted if not any(text in line for line in lines)]
        if not lacking and histogram_is_whole(lines, "ray_triform_request_seconds", "ray_triform_requests_total"):
            break
        assert time.monotonic() < deadline, f"{lacking} not among {len(lines)} lines"
        time.sleep(0.5)
    assert not any("request_id" in line or "nobody" in line for line in lines)


def histogram_is_whole(lines: list[str], name: str, requests: str) -> bool:
    """Whether a histogram reads as Prometheus has them, and has seen each request, in each replica that is alive.

    Of those that are gone Ray keeps the counters only. Each bound is told on its own, so a page may show half of an update.
    """
    buckets: dict[tuple[str, str], dict[float, float]] = {}
    others: dict[tuple[str, str], defaultdict[str, float]] = {}
    for line in lines:
        metric, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        series = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if series.get("model") == "linear":
            key = series["WorkerId"], series["version"]
            if metric == f"{name}_bucket":
                buckets.setdefault(key, {})[float(series["le"])] = float(value)
            else:
                others.setdefault(key, defaultdict(float))[metric] += float(value)
    for key, of_one in buckets.items():
        values = [value for _, value in sorted(of_one.items())]
        if len(values) <= len(REQUEST_SECONDS.buckets) or values != sorted(values) or f"{name}_sum" not in others[key]:
            return False
        if not values[-1] == others[key][f"{name}_count"] == others[key][requests] > 0:
            return False
    return bool(buckets)


def test_a_request_that_failed_is_in_the_log_that_ray_collects(address: tuple[str, int], ray_cluster: Any) -> None:
    """One JSON object a line: Serve's own log, which takes what is written to sys.stderr, would drop it."""
    request_id = f"failed-{uuid.uuid4().hex}"
    assert post(address, "/v1/models/linear:predict", b'{"instances": [[1]]}', {"x-request-id": request_id})[0] == 400
    logs, deadline = Path(ray_cluster._private.worker._global_node.get_session_dir_path()) / "logs", time.monotonic() + 30
    while True:
        lines = [line for file in logs.glob("worker-*.err") for line in file.read_text(errors="replace").splitlines()]
        told = [orjson.loads(line) for line in lines if request_id in line]
        if told:
            break
        assert time.monotonic() < deadline, f"not among {len(lines)} lines"
        time.sleep(0.1)
    assert [(line["message"], line["code"], line["model"]) for line in told] == [("request", "invalid_input", "linear")]


def test_replicas_listen_on_loopback_only_where_serve_does(address: tuple[str, int]) -> None:
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    ports = [
        c
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.pid in mine and "ray::" in psutil.Process(c.pid).name()
    ]
    replicas = [c for c in ports if c.laddr.port in SERVE_PORTS.replicas[0]]
    assert replicas
    assert {c.laddr.ip for c in replicas} == {"127.0.0.1"}


def test_a_slow_serve_is_told_of(online_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from ray_apps.predict import build_app

    for name in FAST:
        monkeypatch.delenv(name)
    with caplog.at_level(logging.WARNING, "ray_apps.predict"):
        build_app({"repository": str(online_models), "allow_anonymous": True})
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in caplog.text
