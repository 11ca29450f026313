"""The nonces of signed requests, each good once: in memory for a host of one process, in Redis for several."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from triform.errors import ConfigurationError, Overloaded, StoreError

MEMORY: Final = "memory"
MOST: Final = 1 << 18  # nonces of five minutes: 870 signed requests a second, some 50 MB
REDIS_SECONDS: Final = 1.0  # that one question to Redis may take
_MINUTE: Final = 60

Run = Callable[..., Awaitable[Any]]


class Nonces(Protocol):
    async def spend(self, nonce: str, *, until: float, now: float) -> bool:
        """Whether the nonce is new; from now on it is not, at least `until` then. Times are Unix times.

        Raises `Overloaded` or `StoreError` where that cannot be told: then the request must not be answered.
        """


class MemoryNonces:
    """Of one process: another one, or this one started anew, knows nothing of them. Thread-safe.

    What was once forgotten is refused, so that a clock which is set back brings nothing to life again.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._spent: dict[int, set[str]] = {}  # by the minute after which they are of no use
        self._forgotten = -1

    async def spend(self, nonce: str, *, until: float, now: float) -> bool:
        minute = int(until) // _MINUTE
        with self._lock:
            for past in [m for m in self._spent if (m + 1) * _MINUTE <= now]:
                del self._spent[past]
                self._forgotten = max(self._forgotten, past)
            if minute <= self._forgotten or any(nonce in spent for spent in self._spent.values()):
                return False
            if sum(map(len, self._spent.values())) >= self.most:
                raise Overloaded("too many signed requests in five minutes for one process to remember")
            self._spent.setdefault(minute, set()).add(nonce)
            return True


class RedisNonces:
    """Of every process that asks the same Redis. `run`: how to wait for an answer elsewhere, such as `asyncio.to_thread`."""

    def __init__(self, client: Any, run: Run | None = None) -> None:
        self._client = client
        self._run = run

    async def spend(self, nonce: str, *, until: float, now: float) -> bool:
        seconds = math.ceil(until - now) + _MINUTE  # clocks differ
        return bool(await self._run(self._set, nonce, seconds) if self._run else self._set(nonce, seconds))

    def _set(self, nonce: str, seconds: int) -> bool:
        from redis.exceptions import RedisError

        name, ours = f"triform:nonce:{nonce}", os.urandom(8)
        try:
            if self._client.set(name, ours, nx=True, ex=seconds):
                return True
            return bool(self._client.get(name) == ours)  # it was set, the answer was lost, and the client asked again
        except RedisError as error:
            raise StoreError(f"the nonces' store does not answer ({type(error).__name__})") from error


def open_nonces(where: str, run: Run | None = None) -> Nonces:
    """`memory`, or the address of a Redis. Raises `ConfigurationError`."""
    if where == MEMORY:
        return MemoryNonces()
    if not where.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigurationError("nonces: expected 'memory' or the address of a Redis, redis://host:port/number")
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"nonces: a Redis needs {error.name}: install triform[redis]") from error
    try:
        timeouts = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        return RedisNonces(redis.Redis.from_url(where, retry=Retry(NoBackoff(), 1), **timeouts), run)
    except ValueError:  # what it says may quote a password
        raise ConfigurationError("nonces: no address of a Redis: expected redis://host:port/number") from None
