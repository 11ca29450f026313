"""One request, one answer: Payload -> HTTP or gRPC -> answer -> Outcome.

Nothing is sent twice, so that what is counted is what was asked. Each greenlet takes a connection, and leaves it to the next.
"""

from __future__ import annotations

import http.client
import re
import time
from collections import deque
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import gevent
import orjson

from loadtests.answers import wrong
from loadtests.credentials import Asked, Sign
from loadtests.order import Order
from loadtests.payloads import Payload, Payloads
from loadtests.records import CONNECTION, OK, REFUSED, TIMEOUT, WRONG

KEPT_SECONDS: Final = 4.0  # that a connection may be idle: older ones, their server may be closing just now
CODE: Final = re.compile(r"[a-z_]{1,40}")


class Outcome(NamedTuple):
    """`kind`: of records.py, or what the server called its error; `told`: why, in words; `bytes`: of the answer."""

    kind: str
    told: str = ""
    bytes: int = 0


class HttpClient:
    """For OIP in JSON and binary, and TensorFlow Serving's REST."""

    def __init__(self, order: Order, payloads: Payloads, sign: Sign) -> None:
        url = urlsplit(order.host)
        self._kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._address = url.hostname or "", url.port
        self._base = f"{url.scheme}://{url.netloc}"
        self._prefix = url.path.rstrip("/")
        self._timeout = order.timeout
        self._payloads = payloads
        self._sign = sign
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()

    def ask(self, payload: Payload) -> Outcome:
        path = self._prefix + payload.path
        asked = Asked("POST", self._base + path, payload.path, payload.headers, payload.body)
        headers = {**payload.headers, **self._sign(asked)}
        connection = self._connection()
        try:
            with gevent.Timeout(self._timeout, TimeoutError(f"no answer within {self._timeout:g} s")):
                connection.request("POST", path, payload.body, headers)
                answer = connection.getresponse()
                body = answer.read()
        except TimeoutError as error:
            connection.close()
            return Outcome(TIMEOUT, str(error))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return Outcome(CONNECTION, f"{type(error).__name__}: {error}")
        if answer.will_close:
            connection.close()
        else:
            self._idle.append((connection, time.monotonic()))
        return self._judged(payload, answer, body)

    def _connection(self) -> http.client.HTTPConnection:
        now = time.monotonic()
        while self._idle:
            connection, since = self._idle.pop()
            if now - since < KEPT_SECONDS:
                return connection
            connection.close()
        return self._kind(*self._address, timeout=self._timeout)

    def _judged(self, payload: Payload, answer: http.client.HTTPResponse, body: bytes) -> Outcome:
        if answer.status == 200:
            headers = {name.lower(): value for name, value in answer.getheaders()}
            fault = wrong(self._payloads, payload, headers, body)
            return Outcome(OK, "", len(body)) if fault is None else Outcome(WRONG, fault, len(body))
        told = f"{answer.status}: {body[:200].decode(errors='replace')}"
        return Outcome(REFUSED if answer.status == 429 else f"http_{answer.status}{_code(body)}", told, len(body))

    def close(self) -> None:
        for connection, _ in self._idle:
            connection.close()


class GrpcClient:
    """For OIP over gRPC, with messages that were made ahead."""

    def __init__(self, order: Order, payloads: Payloads, sign: Sign) -> None:
        import grpc

        target = (order.grpc or "").removeprefix("https://")
        options = [("grpc.max_receive_message_length", -1)]
        if target == order.grpc:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
        self._grpc = grpc
        self._channel = channel
        self._call: dict[str, Any] = {}
        self._metadata = order.grpc_metadata
        self._timeout = order.timeout
        self._payloads = payloads
        self._sign = sign

    def ask(self, payload: Payload) -> Outcome:
        call = self._call.get(payload.path) or self._call.setdefault(payload.path, self._channel.unary_unary(payload.path))
        signed = self._sign(Asked("POST", payload.path, payload.path, {}, payload.body))
        try:
            body = call(payload.body, timeout=self._timeout, metadata=(*self._metadata, *signed.items()))
        except self._grpc.RpcError as error:
            code = error.code().name.lower()
            kind = {"resource_exhausted": REFUSED, "deadline_exceeded": TIMEOUT}.get(code, f"grpc_{code}")
            return Outcome(kind, f"{code}: {error.details()}")
        fault = wrong(self._payloads, payload, {}, body)
        return Outcome(OK if fault is None else WRONG, fault or "", len(body))

    def close(self) -> None:
        self._channel.close()


def _code(body: bytes) -> str:
    """What the server calls its error, where it says so."""
    try:
        code = orjson.loads(body)["code"]
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    return f"_{code}" if isinstance(code, str) and CODE.fullmatch(code) else ""
