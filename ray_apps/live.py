"""What a replica does beside its requests: it follows the release logs of its models, on the event loop that answers.

    each model, about once a second: Follower.step in a thread -> what is served no more lets go of its queue, and so is freed
    a repository served as a whole:  its list of models, now and then -> a follower for each new one

Pauses differ at random, so that neither replicas nor nodes ask in step.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from triform.batched import Batched
from triform.errors import TriformError
from triform.following import Follower, Node, tell
from triform.models import Models
from triform.repository import Ref
from triform.telemetry import UNKNOWN

log = logging.getLogger(__name__)

T = TypeVar("T")
THREADS: Final = 4  # models that are verified or loaded at the same time
PAUSE_SECONDS: Final = 1.0


class Live:
    """Belongs to the event loop that answers requests. `more`: follows the models that come into the repository."""

    def __init__(
        self,
        followers: Sequence[Follower],
        node: Node,
        models: Models,
        batched: Batched,
        more: Callable[[Ref], Follower] | None = None,
    ) -> None:
        self._followers = {follower.ref.model: follower for follower in followers}
        self._node = node
        self._models = models
        self._batched = batched
        self._more = more
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="triform-follow")
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        for follower in self._followers.values():
            if follower.ref.version is None:
                self._begin(follower)
        if self._more is not None:
            self._tasks.add(asyncio.get_running_loop().create_task(self._discover(self._more)))

    async def end(self) -> None:
        """What a thread is at goes on until it is done, and then changes nothing that matters any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, follower: Follower) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(self._follow(follower)))

    async def _follow(self, follower: Follower) -> None:
        while True:
            await self._pause()
            await self._try(follower.ref.model, follower.step)
            self._batched.retain(self._models.predictors())

    async def _discover(self, follow: Callable[[Ref], Follower]) -> None:
        while True:
            await self._pause()
            for name in await self._try(UNKNOWN, self._node.names) or ():
                if name not in self._followers:
                    self._followers[name] = follow(Ref(name))
                    self._begin(self._followers[name])
                    self._batched.share(len(self._followers))

    async def _pause(self) -> None:
        await asyncio.sleep(min(PAUSE_SECONDS, self._node.every) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret

    async def _try(self, model: str, work: Callable[[], T]) -> T | None:
        """In a thread. What goes wrong is told, and tried again: following never ends with an error."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TriformError as error:
            tell(self._models, model, None, None, error)
        except Exception:
            log.exception("following '%s' failed", model)
        return None
