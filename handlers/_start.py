"""What makes a start short: import this first, call `resume` when all is loaded.

The garbage collector is off meanwhile: what a start makes stays, so collecting in between finds nothing, and takes a twentieth of
the imports' time (numpy's and ONNX Runtime's included). Then what is there is frozen: no later collection looks at it again.

OpenBLAS, which numpy brings, gets no threads of its own, unless the function's settings ask for some. Nothing here multiplies
matrices in numpy, and a thread that waits for work spins for its first tenth of a second, in which each page that the imports
touch costs an interrupt of the other core. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import gc
import os

gc.disable()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def resume() -> None:
    gc.freeze()
    gc.enable()
