"""Which runs of a model are so short that to hand one to a thread and back would take longer."""

from __future__ import annotations

from typing import Final

from triform.predictor import Predictor

SHORT: Final = 250e-6  # seconds of CPU time
_FORGETS: Final = 0.97  # of what a run has taken, with each run of its size: after 10 ms the next 121 are not short


class Pace:
    """How much CPU time runs have lately taken at most, by their size: rows and bytes, each to the power of two.

    Where a run waits for others (ONNX Runtime's own threads, a GPU) that says nothing, and none is called short. Nor is one of a
    size that was never seen. `short`: in seconds.
    """

    def __init__(self, predictor: Predictor, short: float = SHORT) -> None:
        self._short = short
        self._tells = predictor.threads == 1 and predictor.provider == "CPUExecutionProvider"
        self._most: dict[tuple[int, int], float] = {}

    def is_short(self, rows: int, size: int) -> bool:
        """Whether a run of so many rows and bytes is likely to be."""
        return self._most.get((rows.bit_length(), size.bit_length()), self._short) < self._short

    def ran(self, rows: int, size: int, seconds: float) -> None:
        """One has taken so many seconds of its thread's CPU time."""
        if self._tells:
            key = rows.bit_length(), size.bit_length()
            self._most[key] = max(seconds, self._most.get(key, 0.0) * _FORGETS)
