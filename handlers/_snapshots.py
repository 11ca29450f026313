"""SnapStart: what a function does before its memory is copied, and after it was.

Copies share what was random and connected in the original: chance is seeded anew, connections are dropped. The environments' own
models stay: they are what the copy is for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from handlers._boot import Booted
from triform.headers import forget_ids


def register(booted: Booted, *forget: Callable[[], None]) -> None:
    """Registers the hooks where Lambda's runtime has them; `forget` drops connections."""
    if booted.telemetry.initialization != "snap-start":
        return
    import random

    from snapshot_restore_py import (  # type: ignore[import-untyped]  # it ships no types
        register_after_restore,
        register_before_snapshot,
    )

    def before() -> None:
        for drop in forget:
            drop()
        gc.collect()

    def after() -> None:
        random.seed()
        forget_ids()
        booted.telemetry.restored()

    register_before_snapshot(before)
    register_after_restore(after)
