"""Where a request's body ends (RFC 9112, sections 6 and 7), read so that no caller can hold a connection or break it unanswered.

headers, Incoming -> read_body -> bytes, or Refused: 400 not framed as HTTP says, 408 not there in time, 413 too large,
                                                     501 another transfer coding than chunked
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from email.errors import MultipartInvariantViolationDefect, NoBoundaryInMultipartDefect, StartBoundaryNotFoundDefect
from email.message import Message
from io import BufferedIOBase
from typing import Final

SIZE: Final = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[^\r\n]*)?\r\n")  # of a chunk; extensions are passed over
LINE_BYTES: Final = 1024  # of a chunk's size with its extensions, or of a trailer
TRAILERS: Final = 32
TOO_LONG: Final = "Request Too Long"  # as API Gateway says it
LINGER_SECONDS: Final = 5.0
LINGER_BYTES: Final = 64 << 20
# What Python's parser misses in the body of a multipart message, of which it has seen the headers alone.
OF_A_BODY: Final = (NoBoundaryInMultipartDefect, StartBoundaryNotFoundDefect, MultipartInvariantViolationDefect)


class Refused(Exception):
    """Why a request cannot be read, and the status that says so. The connection is of no use any more."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Incoming:
    """What arrives on a connection, within so many seconds in all."""

    def __init__(self, connection: socket.socket, stream: BufferedIOBase, seconds: float) -> None:
        self._connection = connection
        self._stream = stream
        self._until = time.monotonic() + seconds

    def some(self, most: int) -> bytes:
        """One byte at least. Raises `Refused` where none comes."""
        try:
            self._connection.settimeout(max(self._until - time.monotonic(), 1e-6))
            if content := self._stream.read1(most):
                return content
        except TimeoutError:
            raise Refused(408, "the request did not arrive in time") from None
        raise Refused(400, "the connection ended before the request")

    def pieces(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.some(min(size, 1 << 20))
            size -= len(piece)
            yield piece

    def line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) == LINE_BYTES:
                raise Refused(400, "a line of the chunked body is too long")
            line += self.some(1)
        return line

    def linger(self) -> None:
        """Takes what still comes: were the connection closed before, its sender might not see the answer (section 9.6)."""
        with suppress(Refused, OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._until = time.monotonic() + LINGER_SECONDS
            for _ in self.pieces(LINGER_BYTES):
                pass


def read_body(headers: Message, incoming: Incoming, most: int) -> bytes:
    """The body; b"" where none is announced. Raises `Refused`."""
    if any(not isinstance(defect, OF_A_BODY) for defect in headers.defects) or any("\n" in value for value in headers.values()):
        raise Refused(400, "a header is malformed")
    codings, lengths = headers.get_all("Transfer-Encoding", []), headers.get_all("Content-Length", [])
    if codings and lengths:
        raise Refused(400, "Content-Length and Transfer-Encoding contradict each other")
    if codings:
        if [coding.strip().lower() for coding in codings] != ["chunked"]:
            raise Refused(501, "no transfer coding but chunked is known")
        return b"".join(_chunks(incoming, most))
    if not lengths:
        return b""
    length = ",".join(lengths).strip()
    if not re.fullmatch("[0-9]+", length):
        raise Refused(400, "Content-Length is not one number")
    if len(length) > 15 or int(length) > most:
        raise Refused(413, TOO_LONG)
    return b"".join(incoming.pieces(int(length)))


def _chunks(incoming: Incoming, most: int) -> Iterator[bytes]:
    while size := _size(incoming.line()):
        if (most := most - size) < 0:
            raise Refused(413, TOO_LONG)
        yield from incoming.pieces(size)
        if incoming.line() != b"\r\n":
            raise Refused(400, "a chunk is longer than its size says")
    for _ in range(TRAILERS):
        if incoming.line() == b"\r\n":
            return
    raise Refused(400, "too many trailers")


def _size(line: bytes) -> int:
    if not (found := SIZE.fullmatch(line)):
        raise Refused(400, "the size of a chunk is no hexadecimal number")
    return int(found[1], 16)
