"""The ASGI adapter, driven without a server: what clients cannot be made to send, and what a server does around a request."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from ray.serve._private.http_util import parse_disconnect_disabled_header

from ray_apps.arguments import Arguments
from ray_apps.asgi import LONG, AsgiApp
from ray_apps.hosting import host
from ray_apps.spared import Spared
from tests.gates import Gate
from tests.ray_apps.hosts import RunningApp, on_uvicorn, running
from triform.api_keys import KeyRing, new_key
from triform.batched import Batched
from triform.errors import ConfigurationError
from triform.http import HttpSurface
from triform.service import InferenceService
from triform.signing import Parts, sign
from triform.testing import RecordingTelemetry

PREDICT = "/v1/models/linear:predict"
BODY = b'{"instances": [[1, 2, 3]]}'
ANSWER = b'{"predictions":[[14.0]]}'


@pytest.fixture(scope="module")
def app(online_models: Path) -> Iterator[RunningApp]:
    with running(online_models, request_bytes=1000) as app:
        yield app


def test_a_body_comes_in_any_pieces(app: RunningApp) -> None:
    for pieces in ([BODY], [BODY, b""], [b"", BODY[:5], BODY[5:]], [bytes([b]) for b in BODY]):
        assert app.request("POST", PREDICT, body=pieces).body == ANSWER


@pytest.mark.parametrize("pieces", [[b" " * 1001], [b" " * 600] * 2, [b" " * 600] * 1000])
def test_a_body_beyond_the_limit_is_refused_and_not_kept(app: RunningApp, pieces: list[bytes]) -> None:
    answer = app.request("POST", PREDICT, body=pieces)
    assert (answer.status, orjson.loads(answer.body)["code"]) == (413, "payload_too_large")


def test_bodies_that_come_in_parts_have_so_much_room_together(online_models: Path) -> None:
    telemetry = RecordingTelemetry()
    with running(online_models, telemetry, request_bytes=1000, received_bytes=1500) as app:

        async def ask(parts: asyncio.Queue[bytes | None], size: int, path: str = PREDICT, method: str = "POST") -> list[Any]:
            sent: list[Any] = []
            left = size

            async def receive() -> Any:
                nonlocal left
                if (part := await parts.get()) is None:
                    return {"type": "http.disconnect"}
                left -= len(part)
                return {"type": "http.request", "body": part, "more_body": left > 0}

            async def send(message: Any) -> None:
                sent.append(message)

            await app.app({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
            return sent

        async def test() -> None:
            body = BODY + b" " * (900 - len(BODY))
            first, second, third = asyncio.Queue[Any](), asyncio.Queue[Any](), asyncio.Queue[Any]()
            stalled = asyncio.create_task(ask(first, 900))
            await first.put(body[:800])
            while app.app.room.taken < 800:
                await asyncio.sleep(0.001)
            await second.put(body[:800])
            await second.put(body[800:])
            start, end = await ask(second, 900)
            assert second.empty(), "who sends all before he reads gets his answer"
            headers = dict(start["headers"])
            assert (start["status"], headers[b"retry-after"], headers[b"connection"]) == (429, b"1", b"close")
            assert b"1500 bytes are under way" in end["body"]
            await first.put(body[800:])
            assert (await stalled)[1]["body"] == ANSWER, "who came first loses nothing by it"
            await third.put(body[:800])
            await third.put(body[800:])
            assert (await ask(third, 900))[1]["body"] == ANSWER, "there is room again"
            await second.put(body[:800])
            await second.put(None)
            assert (await ask(second, 900))[0]["status"] == 499
            assert app.app.room.taken == 0
            await second.put(b" " * 1001)
            assert (await ask(second, 1001))[0]["status"] == 413
            probe = asyncio.Queue[Any]()
            for _ in range(2):
                await probe.put(b" " * 800)
            assert (await ask(probe, 1600, "/ping", "GET"))[0]["status"] == 200
            assert (probe.qsize(), app.app.room.taken) == (1, 0), "nobody reads what a probe says"

        asyncio.run_coroutine_threadsafe(test(), app.loop).result(60)
    assert [record.code for record in telemetry.records] == ["overloaded", "ok", "ok", "payload_too_large"]


def test_no_body_is_read_of_whom_nobody_knows(online_models: Path) -> None:
    """But of a signed request it is: the signature is over it, too."""
    key, kept = new_key({"infer"})
    keys = msgspec.json.encode(KeyRing([kept])).decode()
    telemetry = RecordingTelemetry()

    async def ask(app: AsgiApp, authorization: str) -> tuple[int, int]:
        read = 0
        sent: list[Any] = []

        async def receive() -> Any:
            nonlocal read
            read += 1
            return {"type": "http.request", "body": BODY, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", authorization.encode())]
        await app({"type": "http", "method": "POST", "path": PREDICT, "headers": headers}, receive, send)
        return sent[0]["status"], read

    with running(online_models, telemetry, {"TRIFORM_API_KEYS": keys}, allow_anonymous=False) as app:
        wrong, made_up = sign(key, Parts("POST", PREDICT)), sign(new_key({"infer"})[0], Parts("POST", PREDICT, body=BODY))
        stale = sign(key, Parts("POST", PREDICT, body=BODY), now=1.0)
        expected = {f"Bearer {key}": (200, 1), "Bearer no": (401, 0), wrong: (401, 1), made_up: (401, 0), stale: (401, 0)}
        for authorization, told in expected.items():
            assert asyncio.run_coroutine_threadsafe(ask(app.app, authorization), app.loop).result(30) == told
    assert [record.code for record in telemetry.records] == ["ok"] + ["unauthenticated"] * 4


def test_a_body_at_the_limit_is_answered(app: RunningApp) -> None:
    assert app.request("POST", PREDICT, body=[BODY, b" " * (1000 - len(BODY))]).body == ANSWER


def test_an_address_that_a_header_claims_is_told_from_one_that_is_known(online_models: Path, tmp_path: Path) -> None:
    """uvicorn's ProxyHeadersMiddleware: what X-Forwarded-For says, with port 0, where the peer is on loopback."""
    key, kept = new_key({"infer", "operate"})
    environ = {"TRIFORM_API_KEYS": msgspec.json.encode(KeyRing([kept])).decode(), "TRIFORM_AUDIT": str(tmp_path / "audit")}
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"x-triform-version", b"1")]
    with running(online_models, environ=environ, allow_anonymous=False) as app:
        for client in ("192.0.2.7", 4711), ("192.0.2.7", 0), None:
            assert app.request("POST", PREDICT, headers, [BODY], client=client).status == 200
    told = [orjson.loads(line)["where"] for line in (tmp_path / "audit").read_bytes().splitlines()]
    assert told == ["192.0.2.7", "forwarded for 192.0.2.7", ""]


def test_the_server_counts_who_left_while_sending(app: RunningApp) -> None:
    sent: list[Any] = []

    async def leave() -> None:
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        await app.app({"type": "http", "method": "POST", "path": PREDICT, "headers": []}, receive, send)

    asyncio.run_coroutine_threadsafe(leave(), app.loop).result(30)
    assert (sent[0]["status"], sent[1]["body"]) == (499, b"")


def test_a_call_that_the_server_cancels_is_recorded_as_such(online_models: Path) -> None:
    telemetry = RecordingTelemetry()
    with running(online_models, telemetry) as app:

        async def give_up() -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": BODY}

            async def send(message: Any) -> None:
                raise AssertionError(f"nobody is there for {message}")

            scope = {"type": "http", "method": "POST", "path": PREDICT, "headers": []}
            call = asyncio.create_task(app.app(scope, receive, send))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run_coroutine_threadsafe(give_up(), app.loop).result(30)
        assert app.request("POST", PREDICT, body=[BODY]).body == ANSWER
    assert [r.code for r in telemetry.records] == ["cancelled", "ok"]


async def leave_while_it_runs(app: AsgiApp, gate: Gate, *, cancelled: bool) -> list[Any]:
    """What is sent to a caller who goes away, or whose call the server cancels, while the model runs."""
    left, sent = asyncio.Event(), list[Any]()
    messages = iter([{"type": "http.request", "body": BODY}, {"type": "http.request", "body": b""}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    call = asyncio.create_task(app({"type": "http", "method": "POST", "path": PREDICT, "headers": []}, receive, send))
    while gate.began == 0:
        await asyncio.sleep(0.001)
    if cancelled:
        await asyncio.sleep(3 * LONG)  # it looks whether he is there
    left.set()
    if cancelled:  # in the turn in which he is found to be gone
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await asyncio.wait([call], timeout=20)
    assert call.done()
    return sent


@pytest.mark.parametrize("cancelled", [False, True])
def test_who_goes_away_is_not_waited_for(online_models: Path, *, cancelled: bool) -> None:
    telemetry = RecordingTelemetry()
    with running(online_models, telemetry) as app, Gate() as gate:
        service = InferenceService(app.app.surface.service.models, Batched(gate, short=0.0))
        leaving = leave_while_it_runs(AsgiApp(HttpSurface(service), timeout=30), gate, cancelled=cancelled)
        sent = asyncio.run_coroutine_threadsafe(leaving, app.loop).result(30)
        assert [message.get("status") for message in sent] == ([] if cancelled else [499, None])
        gate.open.set()
    assert [r.code for r in telemetry.records] == ["cancelled"]


def test_what_serve_is_spared_and_what_it_is_told() -> None:
    """The caller's own word is not the last; of several ids the first that may stand in a log, else a new one."""

    async def seen(kind: str, *given: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        scopes: list[Any] = []

        async def app(scope: Any, *_: Any) -> None:
            scopes.append(scope)

        await Spared(app)({"type": kind, "headers": [(b"a", b"1"), *given]}, None, None)
        assert scopes[0]["headers"][0] == (b"a", b"1")
        headers: list[tuple[bytes, bytes]] = scopes[0]["headers"]
        return headers

    for given, expected in ([b"abc"], b"abc"), ([b"\xe9", b" x-2 ", b"x-3"], b"x-2"), ([b"a b"], None), ([], None):
        for kind in "http", "websocket":
            headers = asyncio.run(seen(kind, *((b"x-request-id", value) for value in given)))
            ids = [value for name, value in headers if name == b"x-request-id"]
            assert len(ids) == 1
            assert ids[0] == expected if expected else len(bytes.fromhex(ids[0].decode())) == 16
    told = asyncio.run(seen("http", (b"x-request-disconnect-disabled", b"?0")))
    assert parse_disconnect_disabled_header(dict(told))


def test_the_path_stays_encoded_and_loses_the_route_prefix(app: RunningApp) -> None:
    assert app.request("POST", "/v1/models/linear%3Apredict", body=[BODY]).body == ANSWER
    assert app.request("POST", "/v1/models/a%2Fb:predict", body=[BODY]).status == 404
    assert app.request("POST", f"/prefix{PREDICT}", body=[BODY], root_path="/prefix").body == ANSWER
    assert app.request("POST", PREDICT, body=[BODY], raw_path=None).body == ANSWER


def test_head_tells_no_length_of_a_body_it_does_not_send(app: RunningApp) -> None:
    answer = app.request("HEAD", "/v2/health/live")
    assert (answer.status, answer.body, answer.headers.get("content-length")) == (200, b"", None)


def test_a_request_id_of_ones_own_comes_back_once(online_models: Path, app: RunningApp) -> None:
    told = [(b"x-request-id", b"abc-1")]
    assert app.request("GET", "/ping", told).headers["x-request-id"] == "abc-1"
    inside = RunningApp(AsgiApp(app.app.surface, timeout=30, tells_request_id=True), app.loop)
    assert "x-request-id" not in inside.request("GET", "/ping", told).headers  # the server around it adds it
    assert inside.request("GET", "/ping", [(b"x-request-id", b"\x1b[31m")]).headers["x-request-id"].isalnum()


def test_a_request_ends_at_its_deadline(online_models: Path) -> None:
    with running(online_models, timeout_s=1e-6) as app:
        answer = app.request("POST", PREDICT, body=[BODY])
    assert (answer.status, orjson.loads(answer.body)["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("sent", [b"", BODY[:5]])
def test_a_body_that_does_not_come_is_waited_for_only_so_long(online_models: Path, sent: bytes) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: slow-1\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
    telemetry = RecordingTelemetry()
    with running(online_models, telemetry, timeout_s=0.3) as app, on_uvicorn(app.app) as address:
        with socket.create_connection(address, timeout=30) as slow, slow.makefile("rb") as answers:
            slow.sendall(head + sent)
            status, *headers = iter(answers.readline, b"\r\n")
            told = orjson.loads(answers.read())  # to the end: the connection is closed
        assert (status, told["code"]) == (b"HTTP/1.1 408 Request Timeout\r\n", "body_timeout")
        assert {b"connection: close\r\n", b"x-request-id: slow-1\r\n"} <= set(headers)
    assert [r.code for r in telemetry.records] == ["body_timeout"]


def test_who_hangs_up_is_not_waited_for(online_models: Path) -> None:
    telemetry, deadline = RecordingTelemetry(), time.monotonic() + 30
    with running(online_models, telemetry) as app, Gate() as gate:
        service = InferenceService(app.app.surface.service.models, Batched(gate, short=0.0))
        with on_uvicorn(AsgiApp(HttpSurface(service), timeout=30)) as address:
            with socket.create_connection(address, timeout=30) as caller:
                caller.sendall(f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY)
                while gate.began == 0 and time.monotonic() < deadline:
                    time.sleep(0.01)
            while not telemetry.records and time.monotonic() < deadline:
                time.sleep(0.01)
            told = [r.code for r in telemetry.records]
            gate.open.set()
    assert told == ["cancelled"], "before the model has answered"


def test_the_server_may_start_and_stop_it_and_websockets_are_refused(online_models: Path) -> None:
    ended: list[str] = []

    async def at_end() -> None:
        ended.append("drained")

    async def talk(kind: str, *messages: str) -> list[str]:
        incoming, sent = iter(messages), []

        async def receive() -> Any:
            return {"type": next(incoming)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        arguments = Arguments.of({"repository": str(online_models), "models": ["linear"], "allow_anonymous": True})
        hosted = host(arguments, arguments.settings({}), RecordingTelemetry())
        await AsgiApp(hosted.surface, timeout=1, at_end=at_end)({"type": kind}, receive, send)
        await hosted.drain()
        return sent

    started = asyncio.run(talk("lifespan", "lifespan.startup", "lifespan.shutdown"))
    assert (started, ended) == (["lifespan.startup.complete", "lifespan.shutdown.complete"], ["drained"])
    assert asyncio.run(talk("websocket", "websocket.connect")) == ["websocket.close"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"repositroy": "x"}, "repositroy"),
        ({"repository": 3}, "repository"),
        ({"repository": "x", "num_cpus": -1}, "num_cpus"),
        ({"repository": "x", "timeout_s": float("nan")}, "timeout_s"),
        ({"repository": "x", "threads": 0}, "threads"),
        ({"repository": "x", "overrides": {"m": {"slots": 0}}}, "slots"),
        ({"repository": "x", "overrides": {"m": {"slot": 1}}}, "slot"),
        ({"repository": "x", "log_requests": "some"}, "log_requests"),
        ({}, "repository"),
        ({"repository": "x"}, "allow_anonymous = true"),
        ({"repository": "x", "allow_anonymous": False}, "credentials are required"),
        ({"repository": "x", "allow_anonymous": "yes"}, "allow_anonymous"),
        ({"repository": "x", "allow_anonymous": True, "nonces": "memory", "num_replicas": 2}, "nonces"),
    ],
)
def test_a_bad_argument_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Arguments.of(args).settings({})


@pytest.mark.parametrize("args", [{"default_model": "other"}, {"overrides": {"other": {"slots": 2}}}])
def test_a_model_that_is_not_here_is_named(online_models: Path, args: dict[str, Any]) -> None:
    arguments = Arguments.of({"repository": str(online_models), "models": ["linear"], "allow_anonymous": True, **args})
    with pytest.raises(ConfigurationError, match="'other' is not among the models"):
        host(arguments, arguments.settings({}), RecordingTelemetry())


def test_replicas_share_the_nonces_of_signed_requests(online_models: Path, redis_server: str) -> None:
    """What one replica has answered, another one refuses; a Redis that is gone lets nobody in, and says so as every error."""
    key, kept = new_key({"infer"})
    environ = {"TRIFORM_API_KEYS": msgspec.json.encode(KeyRing([kept])).decode()}
    closed = {"models": ["linear"], "allow_anonymous": False, "num_replicas": 2}
    with (
        running(online_models, environ=environ, nonces=redis_server, **closed) as one,
        running(online_models, environ=environ, nonces=redis_server, **closed) as other,
        running(online_models, environ=environ, nonces=f"{redis_server}.gone", **closed) as alone,
    ):
        headers = [(b"authorization", sign(key, Parts("POST", PREDICT, body=BODY)).encode())]
        assert one.request("POST", PREDICT, headers, [BODY]).body == ANSWER
        for replica in other, one:
            refused = replica.request("POST", PREDICT, headers, [BODY])
            assert (refused.status, orjson.loads(refused.body)["code"]) == (401, "unauthenticated")
        fresh = [(b"authorization", sign(key, Parts("POST", PREDICT, body=BODY)).encode())]
        down = alone.request("POST", PREDICT, fresh, [BODY])
        assert (down.status, orjson.loads(down.body)["code"], down.headers["retry-after"]) == (503, "store_unavailable", "1")
        assert alone.request("POST", PREDICT, [(b"authorization", f"Bearer {key}".encode())], [BODY]).body == ANSWER
        assert other.request("POST", PREDICT, fresh, [BODY]).body == ANSWER
