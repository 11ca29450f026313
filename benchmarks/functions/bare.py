"""The least that a handler of this model can do: numpy, ONNX Runtime, the same file opened. What Triform's start is held against.

BENCH_MODEL: the ONNX file.
"""

import os
from typing import Any

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.inter_op_num_threads = 1
session = ort.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])


def handler(event: Any, context: Any) -> dict[str, Any]:  # noqa: ARG001 - a handler has them
    return {"statusCode": 200, "headers": {}, "body": str(np.__version__)}
