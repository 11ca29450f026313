"""What the peers share: the model, opened in the same way. Runs in their environments, too: numpy and ONNX Runtime alone.

BENCH_MODEL: the ONNX file, x FP32[rows, features] -> y FP32[rows, outputs].
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort


def open_session() -> Any:
    """An `onnxruntime.InferenceSession` with one thread, which sleeps where there is nothing to do, as Triform's do."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])


def open_model() -> Callable[[Any], Any]:
    """The model as a function: anything that numpy takes as [rows, features] -> float32 [rows, outputs]."""
    session = open_session()

    def predict(x: Any) -> Any:
        return session.run(["y"], {"x": np.asarray(x, dtype=np.float32)})[0]

    return predict
