"""All the versions that a service has, each with its queue and its slots: the `Execute` of hosts with an event loop.

Served, arrays -> the batcher of this very predictor (batching.py) -> Ran
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Collection, Mapping
from concurrent.futures import Executor
from typing import Annotated

import msgspec

from triform.batching import MAX_QUEUE_BYTES, MAX_QUEUE_ROWS, MAX_ROWS, DynamicBatcher
from triform.models import Served
from triform.pace import SHORT
from triform.predictor import Predictor
from triform.service import Ran
from triform.signature import Array


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model. `max_rows`: of one run, a request that has more is cut; the package's own is the most. None: the largest of
    its `pad_to`, else `MAX_ROWS` together, and of one request as many as the package takes. `max_queue_requests` None: as
    many as find a place."""

    slots: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_rows: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_queue_rows: Annotated[int, msgspec.Meta(ge=1)] = MAX_QUEUE_ROWS
    max_queue_requests: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_queue_bytes: Annotated[int, msgspec.Meta(ge=1)] = MAX_QUEUE_BYTES


def half_of(places: int) -> int:
    """Two at least: with one, whoever comes beside another would be refused."""
    return max(2, places // 2)


class Batched:
    """A `service.Execute`: each loaded version has its own queue and slots, all of them the same threads. One event loop's.

    `options`: by model; `places`: of the host, for requests that wait or run; `short`: as of `DynamicBatcher`. Of several models
    (`share`) each version has half of the places, so that one that is slow leaves others theirs; but one whose model has a
    `max_queue_requests` of its own is bound by that alone.
    """

    def __init__(
        self,
        executor: Executor,
        options: Mapping[str, BatchOptions] | None = None,
        *,
        places: int = sys.maxsize,
        short: float = SHORT,
    ) -> None:
        self._executor = executor
        self._places = self._max_requests = places
        self._short = short
        self._options = options or {}
        self._batchers: dict[Predictor, DynamicBatcher] = {}

    def __call__(self, served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Awaitable[Ran]:
        return self.batcher(served.predictor).submit(inputs, deadline)

    def batcher(self, predictor: Predictor) -> DynamicBatcher:
        """That of this very predictor; a version that was loaded anew has a new one."""
        found = self._batchers.get(predictor)
        if found is None:
            options = self._options_of(predictor)
            found = DynamicBatcher(
                predictor,
                self._executor,
                slots=options.slots,
                max_rows=_max_rows(predictor, options),
                cuts=options.max_rows is not None,
                max_queue_rows=options.max_queue_rows,
                max_queue_requests=options.max_queue_requests or sys.maxsize,
                max_queue_bytes=options.max_queue_bytes,
                max_requests=self._most(options),
                short=self._short,
            )
            self._batchers[predictor] = found
        return found

    def share(self, models: int) -> None:
        """The host has so many."""
        self._max_requests = half_of(self._places) if models > 1 else self._places
        for predictor, batcher in self._batchers.items():
            batcher.max_requests = self._most(self._options_of(predictor))

    def _options_of(self, predictor: Predictor) -> BatchOptions:
        return self._options.get(predictor.manifest.name, BatchOptions())

    def _most(self, options: BatchOptions) -> int:
        return self._max_requests if options.max_queue_requests is None else sys.maxsize

    @property
    def waiting_seconds(self) -> float:
        """The longest that anybody has waited for any model."""
        return max((batcher.waiting_seconds for batcher in self._batchers.values()), default=0.0)

    def retain(self, predictors: Collection[Predictor]) -> None:
        """Lets go of every other predictor, but for one that still has work."""
        for predictor, batcher in [*self._batchers.items()]:
            if predictor not in predictors and batcher.idle:
                del self._batchers[predictor]

    async def drain(self) -> None:
        """Waits until nothing waits or runs."""
        for batcher in [*self._batchers.values()]:
            await batcher.drain()


def _max_rows(predictor: Predictor, options: BatchOptions) -> int:
    batching = predictor.manifest.config.batching
    largest = batching.pad_to[-1] if batching.pad_to else batching.max_rows
    return min(options.max_rows or (largest if batching.pad_to else MAX_ROWS), largest)
