"""A shadow: what stable has answered is asked of another version, too, whose answers nobody gets.

    stable's answer is made ──► sampled? ──► room in the queue? ──► what was asked waits      the caller has his answer
                                                  no: dropped, and recorded as `overloaded`
    one task: what was asked ──► decoded, run as the shadow, with a deadline of its own ──► compared, where an answer would be
              written ──► tally.py: the canary's side of a window, and the rows that disagree

A caller waits for none of this, and no fault of the shadow is his. The shadow has a queue of its own before the model, runs one
request at a time, and is given as long as the caller was ready to wait. Belongs to the event loop that answers requests.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from triform.errors import Overloaded, TriformError
from triform.protocols.bodies import Call, Encoded
from triform.rollout.agreement import apart, recorded, widest
from triform.signature import Array

if TYPE_CHECKING:  # canary.py has the shadow
    from triform.canary import Answer, Decode, Split, Way
    from triform.models import Served
    from triform.service import Exchange

    class Counted(Way, Protocol):
        """A way whose run is counted, and what it was given and has come to."""

        inputs: Mapping[str, Array]
        outputs: Mapping[str, Array]


log = logging.getLogger(__name__)

MOST_REQUESTS: Final = 64  # that wait ...
MOST_BYTES: Final = 64 << 20  # ... with what was asked and what stable has answered
PAUSE_SECONDS: Final = 0.001  # before each, in which answers that are made go out
SECONDS: Final = 60.0  # for the answer to a request that had no deadline


class Asked(NamedTuple):
    """A request that stable has answered with `outputs`. `size`: of what is to be decoded; `bytes`: that are kept of it;
    `seconds`: that its caller would have waited."""

    exchange: Exchange
    answer: Answer
    decode: Decode
    size: int
    outputs: Mapping[str, Array]
    bytes: int
    seconds: float


class Shadowing:
    """Of a share (`sample`) of the requests of a split that has a shadow in its canary's place, which gets no keys.

    `way`: of an exchange whose run is counted; `chance`: 0 to 1, anew each time.
    """

    def __init__(
        self, split: Split, way: Callable[[Exchange], Counted], sample: float, chance: Callable[[], float] = random.random
    ) -> None:
        self.over = False  # the shadow is cut off, another revision is in force, or the host ends
        self._split = split
        self._way = way
        self._sample = sample
        self._chance = chance
        self._waiting: deque[Asked] = deque()
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None

    async def answer(self, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> Encoded:
        """Stable's answer, as if there were no shadow. Raises as `HttpSurface.answer`."""
        now = time.monotonic()
        way, tally = self._way(exchange), self._split.tally
        try:
            encoded = await answer(way, partial(decode, exchange.chosen), size)
        except Exception as error:
            failed = "execute" in exchange.stages and not isinstance(error, Overloaded)
            tally.request("stable", time.perf_counter() - exchange.started, failed=failed)
            raise
        tally.request("stable", time.perf_counter() - exchange.started)
        kept = max(size, sum(array.nbytes for array in way.inputs.values())) + _kept(way.outputs)
        seconds = SECONDS if exchange.deadline is None else exchange.deadline - now
        self.offer(Asked(exchange, answer, decode, size, way.outputs, kept, seconds))
        return encoded

    def offer(self, asked: Asked) -> None:
        """Takes what was asked, if it is sampled and there is room. Neither waits nor raises."""
        if self.over or self._chance() >= self._sample:
            return
        if len(self._waiting) >= MOST_REQUESTS or self._bytes + asked.bytes > MOST_BYTES:
            self._drop(asked)
            return
        self._waiting.append(asked)
        self._bytes += asked.bytes
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def _drop(self, asked: Asked) -> None:
        asked.exchange.again(self._served()).ended(Overloaded.code, 0.0)

    def _served(self) -> Served:
        return self._split.served(self._split.traffic.canary)

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0.0 if self.over else PAUSE_SECONDS)
            asked = self._waiting.popleft()
            self._bytes -= asked.bytes
            try:
                if not self.over:
                    await self._ask(asked)
            except Exception:
                log.exception("a shadow could not be asked")

    async def _ask(self, asked: Asked) -> None:
        began, served, code = time.perf_counter(), self._served(), "ok"
        again = asked.exchange.again(served)
        again.deadline = time.monotonic() + asked.seconds
        compared = _Compared(self._way(again), asked, served)
        try:
            await asked.answer(compared, partial(asked.decode, served), asked.size)
        except Exception as error:
            code = error.code if isinstance(error, TriformError) else TriformError.code
            if not isinstance(error, TriformError) or error.http_status >= 500:
                log.warning("request %s: the shadow %s: %s", again.request_id, again.refs, code, exc_info=error)
        again.ended(code, time.perf_counter() - began)
        if code == Overloaded.code:  # others' work was in the way: it has not been asked
            return
        self._split.tally.request("canary", None, failed=code != "ok")
        if code == "ok":
            self._split.tally.shadowed(compared.rows, compared.disagreed)


class _Compared:
    """The shadow's exchange: in the place of writing its answer it is compared with stable's, row by row."""

    def __init__(self, way: Way, asked: Asked, served: Served) -> None:
        self.deadline = way.deadline
        self.begin, self.end = way.begin, way.end
        self.infer_checked = way.infer_checked
        self.rows = self.disagreed = 0
        self._way = way
        self._outputs = asked.outputs
        self._both = (asked.exchange.chosen, served)

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]:
        call, inputs = self._way.read(decode)
        return call._replace(say=self._compare, columns=None), inputs

    def _compare(self, outputs: Mapping[str, Array]) -> Encoded:
        """In a thread, where the outputs are large (`HttpSurface.answer`)."""
        pairs = [(first, outputs[name]) for name, first in self._outputs.items() if name in outputs]
        if pairs:  # else there is nothing to compare, which speaks for nobody
            mask = np.zeros(len(pairs[0][0]), dtype=np.bool_)
            for pair in pairs:
                mask |= rows_apart(*pair, *self._both)
            self.rows, self.disagreed = len(mask), int(mask.sum())
        return Encoded(b"")


def rows_apart(first: Array, second: Array, stable: Served, shadow: Served) -> npt.NDArray[np.bool_]:
    """Which rows of an output differ by more than both packages record for their providers."""
    rows = len(first)
    if first.shape != second.shape:
        return np.full(rows, True)
    versions = (stable, first), (shadow, second)
    tolerance = widest(recorded(one.manifest, one.loaded.provider, array.dtype) for one, array in versions)
    mask: npt.NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)
    mask[np.nonzero(apart(first, second, tolerance).mask)[0]] = True
    return mask


def _kept(arrays: Mapping[str, Array]) -> int:
    """Bytes that stay in memory with them: of requests that ran together each has a part of one array."""
    return sum(
        array.nbytes if array.base is None else max(array.nbytes, getattr(array.base, "nbytes", 0)) for array in arrays.values()
    )
