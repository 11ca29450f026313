"""From a replica that answers callers to one that runs an isolated canary, and back, in time for stable to answer instead.

    Served.elsewhere -> Hop -> canary.py: Deployed -> Serve's handle -> Canary.run -> Batched
                        Hop <- within the time that it may take: Done, or Failed
                        what goes wrong is raised -> triform/canary.py: stable answers

Tensors go over, nothing else: requests are decoded, split by record and encoded where they came in. Once a second, while a
release has a canary, one of its replicas is asked what it holds, so that nobody waits for a canary that is still to come, or to
come back (`NotReady`); `Unavailable` is what ends the requests that were there when it went.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple, Protocol

from triform.errors import DeadlineExceeded, NotReady, Overloaded, TriformError, Unavailable, by_code
from triform.models import Models, Served
from triform.service import Execute, Ran
from triform.signature import Array

log = logging.getLogger(__name__)

PAUSE_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 5.0  # that a replica has to say what it holds, or is not there
SHARE: Final = 0.5  # of the time that a request has left, which the canary may take at most: stable has the rest


class Failed(NamedTuple):
    """A `TriformError` on its way: errors with arguments of their own do not travel."""

    code: str
    message: str

    @classmethod
    def of(cls, error: TriformError) -> Failed:
        return cls(error.code, str(error))

    def error(self) -> TriformError:
        return by_code(self.code)(self.message)


class Done(NamedTuple):
    """What came of a run, and the seconds that it took where it ran, its time in the queue among them."""

    ran: Ran
    seconds: float


class Replicas(Protocol):
    """The canary's. Both raise `Unavailable` where none answers, and `Overloaded`."""

    async def run(self, model: str, version: int, inputs: Mapping[str, Array], seconds: float) -> Done | Failed:
        """The outputs for arrays that fit the version's signature, within so many seconds."""
        ...

    async def look(self) -> dict[str, Failed | None]:
        """What one of them holds, by reference; and why not, of what it would hold otherwise."""
        ...


class Hop:
    """Belongs to the event loop that answers requests. `timeout`: of one run, with the way there and back, in seconds; `most`:
    requests that may be at one canary: one that is slow leaves others their places, and what is beyond is no fault of its."""

    def __init__(self, replicas: Replicas, timeout: float, most: int) -> None:
        self._replicas = replicas
        self._timeout = timeout
        self._most = most
        self._under_way: Counter[str] = Counter()  # by reference
        self._known: dict[str, Failed | None] = {}  # by reference: None where it is held
        self._doubt = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def is_ready(self, ref: str) -> bool:
        return ref in self._known and self._known[ref] is None

    def beside(self, here: Execute) -> Execute:
        """Runs what is elsewhere there, and the rest here."""

        def execute(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Awaitable[Ran]:
            return (self if served.elsewhere else here)(served, inputs, deadline)

        return execute

    async def __call__(self, served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        """Raises `NotReady`, `Unavailable`, `Overloaded`, `DeadlineExceeded`, and what the model's run raised there."""
        manifest = served.manifest
        self._check(manifest.ref)
        seconds = self._timeout if deadline is None else min(self._timeout, SHARE * (deadline - time.monotonic()))
        if self._under_way[manifest.ref] >= self._most:
            raise NotReady(f"{self._most} requests are at {manifest.ref} already: send the request again later")
        began = time.perf_counter()
        self._under_way[manifest.ref] += 1
        try:
            async with asyncio.timeout(seconds):
                said = await self._replicas.run(manifest.name, manifest.version, inputs, seconds)
        except TimeoutError:
            self._lost(manifest.ref)  # or slow: then it says at once that it is there
            raise DeadlineExceeded(f"{manifest.ref} did not answer within the {seconds:.3g} s that it had") from None
        except Unavailable:
            self._lost(manifest.ref)  # there may be other replicas: they are asked at once
            raise
        finally:
            self._under_way[manifest.ref] -= 1
        if isinstance(said, Failed):
            raise said.error()
        return said.ran._replace(hop=time.perf_counter() - began - said.seconds)

    def _check(self, ref: str) -> None:
        """Raises what keeps it from being asked."""
        if ref not in self._known:
            raise NotReady(f"no process that runs {ref} is there now: send the request again later")
        if (failed := self._known[ref]) is not None:
            raise failed.error()

    def _lost(self, ref: str) -> None:
        """Nobody waits for it until it has said anew that it is there, which it is asked at once."""
        self._known.pop(ref, None)
        self._doubt.set()

    def start(self, models: Models) -> None:
        """Looks what is held of `models` that runs elsewhere, from now on."""
        self._task = asyncio.get_running_loop().create_task(self._look_again(models))

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look_again(self, models: Models) -> None:
        while True:
            try:
                await self.look(models)
            except (TimeoutError, Unavailable):
                self._known.clear()
            except Overloaded:
                pass  # it is there
            except Exception:
                log.exception("looking for the canary failed")
            self._doubt.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._doubt.wait(), PAUSE_SECONDS)

    async def look(self, models: Models) -> None:
        """Asks one replica, which starts if there is none; none, so that they may go, where nothing runs elsewhere."""
        wanted = {held.manifest.ref for held in models.elsewhere()}
        async with asyncio.timeout(LOOK_SECONDS):
            said = await self._replicas.look() if wanted else {}
        for ref in wanted & said.keys():
            if not self.is_ready(ref) or said[ref] is None:  # of several replicas one that has it will do
                self._known[ref] = said[ref]
        for ref in self._known.keys() - wanted:
            del self._known[ref]
