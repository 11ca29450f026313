"""Nonces: each good once, in memory and in a real Redis, for many who ask at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.errors import ConfigurationError, Overloaded, StoreError
from triform.http import at_once
from triform.nonces import MemoryNonces, Nonces, RedisNonces, open_nonces
from triform.signing import SKEW_SECONDS

NOW = 1_800_000_000.0


def spend(nonces: Nonces, nonce: str, timestamp: float = NOW, now: float = NOW) -> bool:
    """As access.py does: what is stale is not asked about."""
    if abs(now - timestamp) > SKEW_SECONDS:
        return False
    return at_once(nonces.spend(nonce, until=timestamp + SKEW_SECONDS, now=now))


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    return "memory" if request.param == "memory" else str(request.getfixturevalue("redis_server"))


def test_a_nonce_is_good_once(store: str, request: pytest.FixtureRequest) -> None:
    nonces, name = open_nonces(store), request.node.name
    assert [spend(nonces, f"{name}:{n}") for n in "aabab"] == [True, False, True, False, False]


def test_of_many_who_ask_at_once_one_is_let_in(store: str, request: pytest.FixtureRequest) -> None:
    nonces, name = open_nonces(store), request.node.name
    started = threading.Barrier(16)

    def ask(_: int) -> list[bool]:
        started.wait(30)
        return [spend(nonces, f"{name}:{n}") for n in range(50)]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert [sum(of_one) for of_one in zip(*answers, strict=True)] == [1] * 50


moments = st.integers(-2 * SKEW_SECONDS, 2 * SKEW_SECONDS)


@given(st.lists(st.tuples(st.sampled_from("abc"), moments, moments), max_size=60))
def test_memory_never_lets_one_in_twice_whatever_the_clock_does(asked: list[tuple[str, int, int]]) -> None:
    """A replay has the timestamp that it had; the clock may jump both ways."""
    nonces = MemoryNonces()
    let_in: list[tuple[str, int]] = []
    for nonce, timestamp, now in asked:
        if spend(nonces, nonce, NOW + timestamp, NOW + now):
            let_in.append((nonce, timestamp))
    assert len(let_in) == len(set(let_in))


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-SKEW_SECONDS, SKEW_SECONDS), st.integers(0, 900)), max_size=60))
def test_while_the_clock_goes_on_memory_refuses_only_what_was_there(asked: list[tuple[str, int, int]]) -> None:
    nonces = MemoryNonces()
    now, last_use = NOW, dict[str, float]()
    for nonce, skew, later in asked:
        now += later
        until = now + skew + SKEW_SECONDS
        if not spend(nonces, nonce, now + skew, now):
            assert last_use.get(nonce, 0.0) + 60 >= now  # a minute's worth is forgotten together
        else:
            assert last_use.get(nonce, 0.0) < now
            last_use[nonce] = until


def test_memory_is_bounded_and_full_means_no() -> None:
    nonces = MemoryNonces(most=100)
    assert all(spend(nonces, str(n)) for n in range(100))
    with pytest.raises(Overloaded):
        spend(nonces, "one more")
    assert not spend(nonces, "7")
    later = NOW + 2 * SKEW_SECONDS
    assert all(spend(nonces, str(n), later, later) for n in range(100))


REPLICA = """
import asyncio, sys
from triform.nonces import open_nonces
nonces, now = open_nonces(sys.argv[1]), float(sys.argv[2])
print([asyncio.run(nonces.spend(f"shared:{n}", until=now + 300, now=now)) for n in range(200)])
"""


def test_replicas_share_a_redis(redis_server: str, python: Callable[..., Popen[str]]) -> None:
    children = [python("-c", REPLICA, redis_server, str(NOW)) for _ in range(2)]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    one, other = (eval(out) for out, _ in said)  # noqa: S307 - two lists of booleans
    assert [a + b for a, b in zip(one, other, strict=True)] == [1] * 200


def test_redis_forgets_by_itself(redis_server: str) -> None:
    import redis

    assert spend(open_nonces(redis_server), "in time", NOW - SKEW_SECONDS + 10)
    left = redis.Redis.from_url(redis_server).ttl("triform:nonce:in time")
    assert 10 <= left <= 70


def test_a_redis_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    nonces = open_nonces(f"unix://{tmp_path}/none.sock?password=hunter2")
    with pytest.raises(StoreError) as refusal:
        spend(nonces, "a")
    assert not any(told in str(refusal.value) for told in ("hunter2", "none.sock", str(tmp_path)))


def test_an_answer_that_was_lost_on_the_way_is_asked_for_again(redis_server: str) -> None:
    """The connection ends after Redis has set the nonce: the client asks again, and must not take itself for a stranger."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    class Lossy(redis.UnixDomainSocketConnection):
        lost = 0
        sent = ""

        def send_command(self, *args: Any, **options: Any) -> None:
            self.sent = str(args[0])
            super().send_command(*args, **options)

        def read_response(self, *args: Any, **options: Any) -> Any:
            answer = super().read_response(*args, **options)
            if self.sent == "SET" and not Lossy.lost:
                Lossy.lost += 1
                self.disconnect()
                raise redis.ConnectionError("lost")
            return answer

    at = redis_server.removeprefix("unix://")
    pool = redis.ConnectionPool(connection_class=Lossy, path=at, retry=Retry(NoBackoff(), 1))
    nonces = RedisNonces(redis.Redis(connection_pool=pool))
    assert spend(nonces, "lossy")
    assert Lossy.lost == 1
    assert not spend(nonces, "lossy")


def test_redis_is_waited_for_elsewhere_where_the_host_has_an_event_loop(redis_server: str) -> None:
    seen: list[str] = []

    async def run(ask: Callable[..., bool], *args: Any) -> bool:
        return await asyncio.to_thread(lambda: (seen.append(threading.current_thread().name), ask(*args))[1])

    nonces = open_nonces(redis_server, run)
    assert asyncio.run(nonces.spend("elsewhere", until=time.time() + 1, now=time.time()))
    assert seen != [threading.main_thread().name]


@pytest.mark.parametrize(
    "where", ["", "Memory", "localhost:6379", "http://x", "redis://:hunter2/x@host:y", "redis://host:hunter2"]
)
def test_what_is_no_store_is_told_without_its_password(where: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^nonces: ") as refusal:
        open_nonces(where)
    assert "hunter2" not in str(refusal.value)
