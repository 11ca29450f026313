"""Whether the sessions of a replica still answer: one golden row through each, in a thread of its own, for a bounded time."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from triform.errors import DeadlineExceeded, RunFailed, TriformError
from triform.models import Models

log = logging.getLogger(__name__)

SHARE: Final = 0.05  # of the time, at most, that checks take


class Health:
    """`seconds`: that one look at all sessions may take."""

    def __init__(self, models: Models, *, seconds: float) -> None:
        self._models = models
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="triform-health")
        self._look: Future[None] | None = None
        self._next = 0.0

    async def check(self) -> None:
        """Raises `RunFailed` where a session failed or gave another answer, `DeadlineExceeded` where it gave none in time.

        A canary whose keys stable can answer is cut off instead (triform/canary.py), and of another version beside stable a line
        of the log tells: the replica is as good as without it.
        A look that takes long is not taken each time. One that never came back is not followed by another.
        """
        if self._look is None or (self._look.done() and (self._look.exception() is not None or time.monotonic() >= self._next)):
            self._look = self._thread.submit(self._look_at_all)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._look)), self._seconds)
        except TimeoutError:
            raise DeadlineExceeded(f"a model has not answered its golden row in {self._seconds:g} s") from None

    def _look_at_all(self) -> None:
        began = time.monotonic()
        for predictor in self._models.predictors():
            try:
                predictor.check(deadline=began + self._seconds)
            except TriformError as error:
                manifest, told = predictor.manifest, f"does not answer its golden row as it did: {error}"
                if self._models.splits.covers(manifest.name, manifest.version, f"it {told}"):
                    continue
                if not self._models.is_beside(manifest.name, manifest.version):
                    raise RunFailed(f"{manifest.ref} {told}") from error
                log.warning("%s, which is not stable, %s", manifest.ref, told)
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE

    def end(self) -> None:
        self._thread.shutdown(wait=False)
