"""What is wrong with a request on the wire is answered by the local gateway, at once, and harms nobody else."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from infra.local.gateway import Gateway, local_gateway


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """Its function answers {"nap": 0} with 200."""
    with local_gateway(handler="tests.infra.local_handlers.nap", provisioned=1, max_concurrency=2) as gateway:
        yield gateway


def tell(gateway: Gateway, sent: bytes, *, end: bool = False) -> bytes:
    """What comes back on a connection of its own, until the gateway closes it. `end`: nothing more is sent."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        if end:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        while more := connection.recv(1 << 16):
            got += more
    return got


def post(*headers: str, body: bytes = b"") -> bytes:
    lines = ["POST / HTTP/1.1", "Host: here", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(body: bytes, *headers: str) -> bytes:
    return post("Transfer-Encoding: chunked", *headers, body=body)


NAP = b'{"nap": 0}'
BAD = {
    "a length that is no number": (post("Content-Length: abc"), 400),
    "a negative one": (post("Content-Length: -1"), 400),
    "one with a sign": (post("Content-Length: +10", body=NAP), 400),
    "one in hexadecimal": (post("Content-Length: 0xa", body=NAP), 400),
    "none in it": (post("Content-Length:"), 400),
    "digits that are not ASCII": (post("Content-Length: \u00b2"), 400),
    "two lengths": (post("Content-Length: 10", "Content-Length: 11", body=NAP), 400),
    "two in one": (post("Content-Length: 10, 10", body=NAP), 400),
    "a length above the limit": (post("Content-Length: 10485761"), 413),
    "a huge one": (post(f"Content-Length: {'9' * 15}"), 413),
    "one with 5,000 digits": (post(f"Content-Length: {'9' * 5000}"), 413),
    "a length and chunks": (chunked(b"0\r\n\r\n", "Content-Length: 5"), 400),
    "another transfer coding": (post("Transfer-Encoding: gzip"), 501),
    "chunks within another coding": (post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501),
    "chunks twice": (chunked(b"0\r\n\r\n", "Transfer-Encoding: chunked"), 501),
    "a header without a colon": (post("Content-Length 10", body=NAP), 400),
    "a header that goes on in the next line": (post("X-Long: a", " b", "Content-Length: 10", body=NAP), 400),
    "a chunk size that is no number": (chunked(b"zz\r\n"), 400),
    "a negative chunk size": (chunked(b"-1\r\n"), 400),
    "a chunk size with a prefix": (chunked(b"0xa\r\n" + NAP), 400),
    "a chunk size with an underscore": (chunked(b"1_0\r\n"), 400),
    "no chunk size": (chunked(b"\r\n"), 400),
    "a bare line feed after it": (chunked(b"a\n" + NAP), 400),
    "a chunk above the limit": (chunked(b"a00001\r\n"), 413),
    "two above it together": (chunked(b"a00000\r\n" + b"x" * 0xA00000 + b"\r\n1\r\n"), 413),
    "a huge chunk": (chunked(b"f" * 100 + b"\r\nxxx"), 413),
    "a chunk size without end": (chunked(b"1" * 5000), 400),
    "an extension without end": (chunked(b"a;x=" + b"y" * 5000), 400),
    "a chunk longer than its size": (chunked(b"5\r\n" + NAP + b"\r\n0\r\n\r\n"), 400),
    "a trailer without end": (chunked(b"0\r\nX-Sum: " + b"y" * 5000), 400),
    "trailers without end": (chunked(b"0\r\n" + b"X-Sum: 1\r\n" * 100), 400),
}


@pytest.mark.parametrize(("sent", "status"), BAD.values(), ids=[name.replace(" ", "-") for name in BAD])
def test_what_is_not_framed_is_answered_and_the_connection_closed(
    gateway: Gateway, sent: bytes, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    invoked = len(gateway.reports)
    head, _, body = tell(gateway, sent).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
    assert b"\r\nConnection: close" in head
    assert json.loads(body)["message"]
    assert len(gateway.reports) == invoked
    assert capfd.readouterr().err == ""


CUT = {
    "body": post("Content-Length: 10", body=NAP[:5]),
    "chunk": chunked(b"a\r\n" + NAP[:5]),
    "chunk size": chunked(b"a"),
    "terminator": chunked(b"a\r\n" + NAP + b"\r\n"),
    "trailers": chunked(b"a\r\n" + NAP + b"\r\n0\r\n"),
}


@pytest.mark.parametrize("sent", CUT.values(), ids=[*CUT])
def test_what_ends_too_early_is_400_and_what_does_not_come_408(
    gateway: Gateway, sent: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tell(gateway, sent, end=True).startswith(b"HTTP/1.1 400 ")
    monkeypatch.setattr("infra.local.gateway.BODY_SECONDS", 0.2)
    assert tell(gateway, sent).startswith(b"HTTP/1.1 408 ")
    assert capfd.readouterr().err == ""


def test_a_caller_who_goes_away_leaves_no_traceback(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    for sent in [post("Content-Length: 10", body=NAP), *CUT.values()]:
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset
            connection.sendall(sent)
    assert b" 200 " in tell(gateway, post("Content-Length: 10", "Connection: close", body=NAP))
    assert capfd.readouterr().err == ""


GOOD = {
    "white space": post("Content-Length: 10 ", body=NAP),
    "zeros": post("Content-Length: 0010", body=NAP),
    "one chunk": chunked(b"a\r\n" + NAP + b"\r\n0\r\n\r\n"),
    "extensions and a trailer": chunked(b"000A;name=value;other\r\n" + NAP + b"\r\n0;last\r\nX-Sum: 1\r\n\r\n"),
    "many chunks": chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in NAP) + b"0\r\n\r\n"),
    "capitals": post("transfer-encoding: Chunked", body=b"a\r\n" + NAP + b"\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("sent", GOOD.values(), ids=[*GOOD])
def test_what_is_framed_is_answered_on_one_connection(gateway: Gateway, sent: bytes) -> None:
    last = post("Content-Length: 10", "Connection: close", body=NAP)
    assert tell(gateway, sent + sent + last).count(b"HTTP/1.1 200 OK\r\n") == 3
