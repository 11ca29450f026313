"""An answer that is written at once is, byte for byte, the one that uvicorn would have sent."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_apps.asgi import AsgiApp, Header, Message
from ray_apps.writing import Writing, direct
from tests.ray_apps.hosts import on_uvicorn, running
from triform.http import HttpResponse, HttpSurface
from triform.service import InferenceService

HEAD = b"POST /v1/models/linear:predict HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine\r\n"
BODY = b'{"instances": [[1, 2, 3]]}'
SIZED = b"content-length: %d\r\n" % len(BODY)
LARGE = b'{"instances": [%b]}' % b",".join([b"[1,2,3]"] * 30_000)
CLOSED = b"connection: close\r\n"


class Noted(Writing):
    """Which answers were written at once."""

    def __init__(self, surface: HttpSurface) -> None:
        super().__init__(surface, timeout=30)
        self.at_once: list[bool] = []

    def wrote(self, response: HttpResponse, headers: Sequence[Header], scope: Message, send: Any) -> bool:
        self.at_once.append(super().wrote(response, headers, scope, send))
        return self.at_once[-1]


def exchange(address: tuple[str, int], sent: bytes, when: Callable[[], bool] = lambda: True) -> bytes:
    """All that comes back until the server closes the connection, but the date; nothing is read before `when`."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        sending, deadline = threading.Thread(target=connection.sendall, args=(sent,)), time.monotonic() + 30
        sending.start()
        while not when() and time.monotonic() < deadline:
            time.sleep(0.01)
        answers = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        sending.join()
    return re.sub(rb"\r\ndate: [^\r]+", b"", answers)


@pytest.fixture(scope="module")
def servers(online_models: Path) -> Iterator[tuple[tuple[str, int], tuple[str, int], Noted]]:
    """uvicorn that sends, and that is written for."""
    with running(online_models) as app:
        surface = HttpSurface(InferenceService(app.app.surface.service.models))
        noted = Noted(surface)
        with on_uvicorn(AsgiApp(surface, timeout=30)) as sending, on_uvicorn(noted) as written:
            yield sending, written, noted


@pytest.mark.parametrize(
    ("sent", "at_once"),
    [
        (HEAD + SIZED + CLOSED + b"\r\n" + BODY, [False]),
        (HEAD + SIZED + b"\r\n" + BODY + HEAD + SIZED + CLOSED + b"\r\n" + BODY, [True, False]),
        ((HEAD + SIZED + b"\r\n" + BODY) * 3 + HEAD + SIZED + CLOSED + b"\r\n" + BODY, [True, True, True, False]),
        (HEAD.replace(b"1.1", b"1.0") + SIZED + b"\r\n" + BODY, [False]),
        (HEAD + b"expect: 100-continue\r\n" + SIZED + b"\r\n" + BODY + HEAD + CLOSED + b"\r\n", [True, False]),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1a\r\n" + BODY + b"\r\n0\r\n\r\n" + HEAD + CLOSED + b"\r\n", [True, False]),
        (b"HEAD /ping HTTP/1.1\r\nx-request-id: h\r\n\r\n" + HEAD + CLOSED + b"\r\n", [False, False]),
        (b"GET /nowhere HTTP/1.1\r\nx-request-id: n\r\n\r\n" + HEAD + CLOSED + b"\r\n", [True, False]),
        (b"PUT /ping HTTP/1.1\r\nx-request-id: a\r\n\r\n" + HEAD + CLOSED + b"\r\n", [True, False]),
        (HEAD + b"content-length: %d\r\n\r\n" % len(LARGE) + LARGE + HEAD + CLOSED + b"\r\n", [True, False]),
    ],
    ids=["closed", "two", "four", "1.0", "expect", "chunked", "HEAD", "404", "405", "large"],
)
def test_it_is_the_same(servers: tuple[tuple[str, int], tuple[str, int], Noted], sent: bytes, at_once: list[bool]) -> None:
    sending, written, noted = servers
    noted.at_once.clear()
    told = exchange(written, sent)
    assert told == exchange(sending, sent)
    assert told.count(b"HTTP/1.1 ") - told.count(b"100 Continue") == len(at_once)
    assert noted.at_once == at_once


def test_who_reads_slowly_gets_all_of_it(servers: tuple[tuple[str, int], tuple[str, int], Noted]) -> None:
    """What is written to him at once fills the buffers; from then on uvicorn waits for him."""
    sent = (HEAD + b"content-length: %d\r\n\r\n" % len(LARGE) + LARGE) * 4 + HEAD + CLOSED + b"\r\n"
    sending, written, noted = servers
    noted.at_once.clear()
    assert exchange(written, sent, lambda: False in noted.at_once) == exchange(sending, sent)
    assert noted.at_once[0] is True
    assert False in noted.at_once[:-1]


def test_an_unknown_uvicorn_gets_messages(
    servers: tuple[tuple[str, int], tuple[str, int], Noted], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    *_, noted = servers
    assert type(direct(noted)) is Writing
    monkeypatch.setattr("uvicorn.__version__", "0.99.1")
    assert type(direct(noted)) is AsgiApp
    assert "uvicorn 0.99.1 is not known here" in caplog.text


def test_another_server_gets_messages(online_models: Path) -> None:
    with running(online_models) as app:
        noted = Noted(app.app.surface)
        app.app = noted
        assert app.request("POST", "/v1/models/linear:predict", body=[BODY]).body == b'{"predictions":[[14.0]]}'
        assert noted.at_once == [False]
