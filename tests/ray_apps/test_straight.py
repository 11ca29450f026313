"""Requests pass Serve's own steps by where they can, and Serve knows of them all the same.

Which way one took shows in its answer: Serve adds the request's id after all other headers, the application before the length.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_apps.asgi import AsgiApp
from ray_apps.spared import Spared
from ray_apps.straight import Straight
from tests.ray_apps.hosts import served

PREFIX = "/below"
PREDICT = "/v1/models/linear:predict"
BODY = b'{"instances": [[1, 2, 3]]}'
LIMIT = {"x-request-timeout-seconds": "30"}


@pytest.fixture(scope="module")
def address(ray_cluster: Any, online_models: Path) -> Iterator[tuple[str, int]]:
    """Of an application below a prefix that answers two requests at a time."""
    with served(online_models, PREFIX, "straight", max_ongoing_requests=2) as address:
        deadline = time.monotonic() + 60
        while not went_straight(ask(address, PREFIX + PREDICT)[1]):  # while HAProxy does not know the replica yet
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield address


def ask(
    address: tuple[str, int], path: str, headers: dict[str, str] | None = None, body: bytes = BODY
) -> tuple[int, list[str], bytes]:
    """Status, the names of the answer's headers in their order, and its body."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, [name.lower() for name, _ in answer.getheaders()], answer.read()
    finally:
        connection.close()


def went_straight(headers: list[str]) -> bool:
    assert headers.count("x-request-id") == 1
    return headers.index("x-request-id") < headers.index("content-length")


def test_either_way_leads_to_the_same_answer(address: tuple[str, int]) -> None:
    short, long = ask(address, PREFIX + PREDICT), ask(address, PREFIX + PREDICT, LIMIT)
    assert (went_straight(short[1]), went_straight(long[1])) == (True, False)
    assert (short[0], short[2]) == (long[0], long[2]) == (200, b'{"predictions":[[14.0]]}')


def test_a_caller_s_id_is_in_the_answer_once_and_only_if_it_may_be(address: tuple[str, int]) -> None:
    for headers in {}, LIMIT:
        connection = http.client.HTTPConnection(*address, timeout=60)
        for given, told in ("mine-1", "mine-1"), ("no, {this}", None):
            connection.request("POST", PREFIX + PREDICT, BODY, {"x-request-id": given, **headers})
            answer = connection.getresponse()
            answer.read()
            ids = [value for name, value in answer.getheaders() if name.lower() == "x-request-id"]
            assert len(ids) == 1
            assert ids[0] == told or (told is None and re.fullmatch("[0-9a-f]{32}", ids[0]))
        connection.close()


def test_serve_answers_its_own_paths(address: tuple[str, int]) -> None:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/-/routes", timeout=30) as page:
        assert b"straight" in page.read()


def test_who_finds_no_place_waits_as_serve_has_it(address: tuple[str, int]) -> None:
    """Two who send no body hold the places; the third waits in Serve, until they have gone."""
    slow = [http.client.HTTPConnection(*address, timeout=60) for _ in range(2)]
    for connection in slow:
        connection.putrequest("POST", PREFIX + PREDICT)
        connection.putheader("content-length", str(len(BODY)))
        connection.endheaders(BODY[:1])
    time.sleep(1.0)  # until both are there
    answers: list[tuple[int, list[str], bytes]] = []
    third = threading.Thread(target=lambda: answers.append(ask(address, PREFIX + PREDICT)))
    third.start()
    third.join(1.0)
    assert answers == [], "it waits"
    for connection in slow:
        connection.send(BODY[1:])
        assert connection.getresponse().read() == b'{"predictions":[[14.0]]}'
        connection.close()
    third.join(60)
    assert (answers[0][0], went_straight(answers[0][1])) == (200, False)
    assert went_straight(ask(address, PREFIX + PREDICT)[1]), "places are free again"


def counted(port: int) -> float:
    """What Serve says it has answered of this application, in all its replicas."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    ours = [
        line
        for line in lines
        if line.startswith("ray_serve_deployment_request_counter_total{") and 'application="straight"' in line
    ]
    return sum(float(line.rpartition(" ")[2]) for line in ours)


def test_serve_counts_them(address: tuple[str, int], ray_cluster: Any) -> None:
    """Each once, whichever way it took."""
    port = ray_cluster._private.worker._global_node.metrics_export_port
    ask(address, PREFIX + PREDICT)
    deadline = time.monotonic() + 90
    before = -1.0
    while (now := counted(port)) != before or now == 0:  # until all is told that was before
        assert time.monotonic() < deadline
        before = now
        time.sleep(6.0)
    for headers in [None] * 20 + [LIMIT] * 3:
        assert ask(address, PREFIX + PREDICT, headers)[0] == 200
    while (now := counted(port)) < before + 23:
        assert time.monotonic() < deadline, f"{now - before} of 23"
        time.sleep(0.5)
    assert now == before + 23


def test_there_is_no_short_way_to_what_is_none_of_ours() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    class Somebody:
        """A replica of another application."""

        _user_callable_asgi_app = app

        async def asgi(self, scope: Any, receive: Any, send: Any) -> None: ...

    class Inner:
        def __init__(self, app: Any) -> None:
            self._app = app

    for below in app, Inner(app), Inner(Somebody().asgi):
        assert Straight.of(below) is None  # type: ignore[arg-type]


def test_where_serve_has_changed_requests_go_its_own_way(caplog: pytest.LogCaptureFixture) -> None:
    class Replica:
        _user_callable_asgi_app = AsgiApp(None, timeout=1.0)  # type: ignore[arg-type]
        _metrics_manager = None

        async def asgi(self, scope: Any, receive: Any, send: Any) -> None: ...

    class Inner:
        def __init__(self, app: Any) -> None:
            self._app = app

    assert Straight.of(Inner(Replica().asgi)) is None  # type: ignore[arg-type]
    assert "its long way" in caplog.text
    assert Spared(Inner(Replica().asgi)) is not None  # type: ignore[arg-type]
