"""Replicas that are killed, more requests than can be answered, and a million of them: on Ray Serve, behind HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import psutil
import pytest

from tests.ray_apps.hosts import counted, running, served
from tests.ray_apps.load import Seen, load, open_loop, until
from triform import testing

LINEAR, SLOW = "/v1/models/linear:predict", "/v2/models/slow/infer"
BODY = b'{"instances": [[1, 2, 3]]}'
ROUNDS, CLIENTS, TWENTIES = 20, 4, 625  # times twenty requests: a million
ROWS, QUEUED = 32, 32  # of a run; requests with as many that may wait
WIDE = bytes(4 * 256 * ROWS)  # of `slow`, in binary


def replicas() -> list[int]:
    """The processes of all replicas here."""
    children = psutil.Process().children(recursive=True)
    return [p.pid for p in children if p.is_running() and p.name().startswith("ray::ServeRepl")]


@pytest.mark.slow  # three replicas are killed, ten seconds apart
@pytest.mark.parametrize("keep", [True, False], ids=["kept connections", "new connections"])
def test_of_a_replica_that_is_killed_only_what_is_in_flight_fails(ray_cluster: Any, online_models: Path, keep: bool) -> None:
    name, clients = uuid.uuid4().hex[:8], 8
    others = set(replicas())

    def mine() -> list[int]:
        return [pid for pid in replicas() if pid not in others]

    with (
        served(online_models, f"/{name}", name, models=["linear"], num_replicas=2) as address,
        load(address, f"/{name}{LINEAR}", BODY, clients, keep=keep) as asking,
    ):
        asking.until(lambda seen: len(seen) > 100)
        for _ in range(3):
            before, killed = set(mine()), time.monotonic()
            assert len(before) == 2
            os.kill(min(before), signal.SIGKILL)
            until(lambda before=before: len(set(mine()) - before) == 1)  # type: ignore[misc]
            asking.until(lambda seen: len(seen) > 100)
            until(lambda: serving(name) == 2)
            back = time.monotonic() - killed
            failed = [s for s in asking.seen if s.status != 200 and s.began + s.seconds >= killed]
            over = max((s.began + s.seconds for s in failed), default=killed) - killed
            print(f"{len(failed)} failed, the last {over:.2f} s after the kill; two replicas again after {back:.1f} s")
            assert len(failed) <= 3 * clients, "who asks again at once may meet a process that is not quite dead"
            assert all(s.began <= killed + 0.5 for s in failed), "whoever came later was answered"
            assert max(over, back) <= 10
            assert all(is_retryable(s) for s in failed), Counter((s.status, s.body) for s in failed)
            time.sleep(max(0.0, killed + 10 - time.monotonic()))
    assert {s.body for s in asking.seen if s.status == 200} == {b'{"predictions":[[14.0]]}'}


def serving(name: str) -> int:
    from ray import serve

    return int(serve.status().applications[name].deployments["predict"].replica_states.get("RUNNING", 0))


def is_retryable(seen: Seen) -> bool:
    """503, as HAProxy says it; or the end of the connection without an answer, which HAProxy was seen to give new ones, too: a
    question to a model may be asked again in any case."""
    return not seen.status or (
        seen.status == 503 and seen.retry_after.isdecimal() and orjson.loads(seen.body)["code"] == "unavailable"
    )


@pytest.mark.slow  # a minute of five times too much
def test_five_times_too_much_is_answered_or_refused_at_once(ray_cluster: Any, tmp_path: Path) -> None:
    name = f"slow-{uuid.uuid4().hex[:8]}"
    testing.repository(tmp_path / "models", {name: testing.slow(tmp_path / "slow.onnx", layers=1000)})
    path = f"/{name}/v2/models/{name}/infer"
    options = {"default_model": name, "overrides": {name: {"max_rows": ROWS, "max_queue_rows": QUEUED * ROWS}}}
    with served(tmp_path / "models", f"/{name}", name, **options) as address:
        with load(address, path, WIDE, 4, headers={"inference-header-content-length": "0"}) as asking:
            asking.until(lambda seen: len(seen) > 80)
        warm = asking.seen[20:]
        capacity = len(warm) / (warm[-1].began + warm[-1].seconds - warm[0].began)

        async def too_much() -> tuple[list[Seen], list[Seen]]:
            live = open_loop(address, f"/{name}/v2/health/live", rate=20, seconds=60)
            return tuple(await asyncio.gather(open_loop(address, path, WIDE, rate=5 * capacity, seconds=60), live))

        seen, live = asyncio.run(too_much())
        after = asyncio.run(open_loop(address, path, WIDE, rate=capacity / 4, seconds=10))
        refused = refusals(seen)
        late = [s.began - after[0].began for s in refusals(after)]
        print(
            f"capacity {capacity:.0f}/s; sent {len(seen)}: {len(seen) - len(refused)} answered, {len(refused)} refused; p99 of "
            f"these {p99(refused) * 1e3:.1f} ms, of liveness beside them {p99(live) * 1e3:.1f} ms; afterwards {len(late)} "
            f"refused, the last after {max(late, default=0.0):.1f} s; the queue takes {QUEUED / capacity:.2f} s"
        )
        assert len(seen) == int(300 * capacity)
        assert {s.status for s in live} == {200}
        assert len(refused) > len(seen) / 2
        assert p99(refused) < max(0.05, 2 * p99(live)), "no slower than what asks for nothing, on a machine that is not ours"
        assert p99(refused) < QUEUED / capacity / 4, "on any machine: nobody waits in the queue to be refused"
        assert max(late, default=0.0) <= 5
        sent = [*asking.seen, *seen, *after]
        told = Counter(s.status for s in sent)
        until(lambda: counted(ray_cluster, name) == {"ok": told[200], "overloaded": told[429]})
        assert counted(ray_cluster, name).total() == len(sent), "each was answered or refused, once"


def refusals(seen: list[Seen]) -> list[Seen]:
    """All others were answered."""
    refused = [s for s in seen if s.status == 429]
    assert {orjson.loads(s.body)["code"] for s in refused} <= {"overloaded"}
    assert all(s.status in (200, 429) for s in seen), Counter(s.status for s in seen)
    return refused


def p99(seen: list[Seen]) -> float:
    return sorted(s.seconds for s in seen)[int(len(seen) * 0.99)]


@pytest.mark.slow  # a million requests, good and bad
def test_memory_does_not_grow_with_the_requests(ray_cluster: Any, online_models: Path) -> None:
    name, others = uuid.uuid4().hex[:8], set(replicas())
    mixed = b"".join(
        f"{method} /{name}{path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        for method, path, body in [
            *[("POST", LINEAR, BODY)] * 16,
            ("POST", "/v1/models/lookup:predict", b'{"instances": [99]}'),
            ("POST", LINEAR, BODY[:-1]),
            ("POST", f"/v1/models/{uuid.uuid4().hex}:predict", BODY),
            ("GET", "/v2/models/linear", b""),
        ]
    )
    with served(online_models, f"/{name}", name) as address:
        (pid,) = set(replicas()) - others
        process, resident = psutil.Process(pid), []
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(CLIENTS) as clients:
                statuses = sum(clients.map(lambda _: pipelined(address, mixed, TWENTIES), range(CLIENTS)), Counter())
            assert statuses.total() == CLIENTS * TWENTIES * 20
            assert set(statuses) == {200, 400, 404, 422}, statuses
            resident.append(process.memory_info().rss >> 20)
    print(f"resident, in MiB, every {CLIENTS * TWENTIES * 20} requests:", *resident)
    assert max(resident[-4:]) - max(resident[4:8]) < 16


def pipelined(address: tuple[str, int], twenty: bytes, times: int) -> Counter[int]:
    """The statuses of so many times twenty requests, sent at once over one connection.

    HAProxy closes it where it takes up that an application of an earlier test is gone: then these twenty are sent over a new one.
    """
    statuses: Counter[int] = Counter()
    connections = 0
    while times:
        connections += 1
        assert connections <= 5, f"{connections - 1} connections were closed, after {statuses.total()} answers"
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(address, timeout=60) as connection,
            connection.makefile("rb") as answers,
        ):
            while times:
                connection.sendall(twenty)
                statuses.update([answered(answers) for _ in range(20)])
                times -= 1
    return statuses


def answered(answers: BinaryIO) -> int:
    """The status of the next answer, which is read to its end. Raises `ConnectionError` where it does not come."""
    length, first = 0, answers.readline()
    while line := answers.readline().lower():
        if line == b"\r\n" and len(answers.read(length)) == length:
            return int(first.split()[1])
        length = int(line[16:]) if line.startswith(b"content-length: ") else length
    raise ConnectionError("closed")


def test_what_is_too_much_is_refused_and_counted(tmp_path: Path) -> None:
    """The same without Serve, for a second: every request is answered or refused, and has one record that says so."""
    testing.repository(tmp_path / "models", {"slow": testing.slow(tmp_path / "slow.onnx")})
    telemetry = testing.RecordingTelemetry()
    options = {"default_model": "slow", "overrides": {"slow": {"max_rows": ROWS, "max_queue_rows": 2 * ROWS}}}
    with running(tmp_path / "models", telemetry, **options) as app:
        headers = [(b"inference-header-content-length", b"0")]
        calls = [app.begin("POST", SLOW, headers, [WIDE]) for _ in range(300)]
        answers = [call.result(60) for call in calls]
        assert app.request("POST", SLOW, headers, [WIDE]).status == 200, "and then all is well again"
    seen = Counter(answer.status for answer in answers)
    assert set(seen) == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status == 429)
    assert Counter(r.code for r in telemetry.records) == {"ok": seen[200] + 1, "overloaded": seen[429]}
