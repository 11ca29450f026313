"""What requests leave behind where a test can see a host's telemetry: a record each, and metrics that callers cannot grow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.conformance.hosts import Send, asgi, in_process
from triform.telemetry import Telemetry, prometheus
from triform.testing import RecordingTelemetry

Host = Callable[[Telemetry], AbstractContextManager[Send]]
GOOD = b'{"instances": [[1, 2, 3]]}'
HOSTS = {"http.py": in_process, "asgi": asgi}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest, online_models: Path) -> Host:
    return lambda telemetry: HOSTS[request.param](online_models, telemetry)


@pytest.mark.parametrize(
    ("method", "path", "code", "model"),
    [
        ("POST", "/v1/models/linear:predict", "ok", "linear"),
        ("POST", "/v1/models/nobody:predict", "model_not_found", "unknown"),
        ("POST", "/v1/models/nobody:explain", "route_not_found", "unknown"),
        ("POST", "/v2/models/nobody/infer/", "route_not_found", "unknown"),
        ("GET", "/favicon.ico", "route_not_found", "unknown"),
        ("GET", "/v1/models/nobody:predict", "method_not_allowed", "unknown"),
        ("DELETE", "/v2/models/linear", "method_not_allowed", "unknown"),
        ("POST", "/v1/models/linear:classify", "unsupported_method", "unknown"),
        ("POST", "/v1/models/nobody/versions/7:regress", "unsupported_method", "unknown"),
    ],
)
def test_a_request_leaves_one_record_whatever_its_path(host: Host, method: str, path: str, code: str, model: str) -> None:
    telemetry = RecordingTelemetry()
    with host(telemetry) as send:
        answer = send(method, path, {"x-request-id": "r-1"}, GOOD)
    assert [(r.code, r.model, r.request_id) for r in telemetry.records] == [(code, model, "r-1")]
    assert answer.status == 200 or telemetry.records[0].code in answer.body.decode()


@pytest.mark.parametrize(("host", "names"), [("http.py", 10_000), ("asgi", 1000)], indirect=["host"])
def test_ten_thousand_names_grow_no_metric(host: Host, names: int) -> None:
    registry = CollectorRegistry()
    paths = ("/v1/models/{}:predict", "/v1/models/linear/labels/{}:predict", "/v2/models/{}/infer", "/{}", "/v1/models/linear:{}")
    with host(prometheus(registry)) as send:

        def series(numbers: range) -> int:
            for number in numbers:
                assert send("POST", paths[number % len(paths)].format(f"name-{number}"), {}, GOOD).status == 404
            return len(generate_latest(registry).splitlines())

        assert series(range(5)) == series(range(5, names))
