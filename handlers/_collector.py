"""The garbage collector, off while an environment starts: import this first, call `resume` when all is loaded.

What a start makes stays, so collecting in between finds nothing, and takes a twentieth of the imports' time (numpy's and ONNX
Runtime's included). Then what is there is frozen: no later collection looks at it again.
"""

from __future__ import annotations

import gc

gc.disable()


def resume() -> None:
    gc.freeze()
    gc.enable()
