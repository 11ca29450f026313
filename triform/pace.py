"""Which runs of a model are so short that to hand one to a thread and back would take longer.

What a run took in a thread says little of a short one: beside a busy event loop it was seen to take several times the CPU time
that it takes on the loop. So a size that may be short is tried there, and what runs take there decides where the next ones go.
"""

from __future__ import annotations

from typing import Final

from triform.predictor import Predictor

SHORT: Final = 1e-3  # seconds of CPU time: a batch of 32 loses about as much on its way to a thread and back
_TRIED: Final = 4.0  # times as long a run in a thread may have taken for one on the loop to be tried
_SHARE: Final = 0.125  # of the latest run in what is known of its size
_FORGETS: Final = 0.97  # of what is known of a size that goes to threads, with each run
_LONG: Final = 2.0  # times `short` that one counts as at least which was not: it is not tried again for 23 runs


class Pace:
    """How much CPU time runs take, by their size: rows and bytes, each to the power of two.

    Where a run waits for others (ONNX Runtime's own threads, a GPU) that says nothing, and none is called short. Nor is one of a
    size that was never seen. `short`: in seconds.
    """

    def __init__(self, predictor: Predictor, short: float = SHORT) -> None:
        self._short = short
        self._tells = predictor.threads == 1 and predictor.provider == "CPUExecutionProvider"
        self._known: dict[tuple[int, int], float] = {}  # below `short`: on the loop

    def is_short(self, rows: int, size: int) -> bool:
        """Whether a run of so many rows and bytes is likely to be."""
        return self._known.get((rows.bit_length(), size.bit_length()), self._short) < self._short

    def ran(self, rows: int, size: int, seconds: float, *, here: bool) -> None:
        """One has taken so many seconds of its thread's CPU time; `here`: on the event loop."""
        if not self._tells:
            return
        key = rows.bit_length(), size.bit_length()
        known = self._known.get(key, seconds if here else 0.0)
        if here:
            known += (seconds - known) * _SHARE
            self._known[key] = known if known < self._short else max(known, self._short * _LONG)
        elif not 0.0 < known < self._short:
            self._known[key] = max(seconds / _TRIED, known * _FORGETS)
