"""Triton Inference Server with its Python backend, by PyTriton.

    python -m benchmarks.servers.triton_app HTTP_PORT GRPC_PORT METRICS_PORT

Source: triton-inference-server.github.io/pytriton, "Quick Start" and "Binding Models to Triton". Its dynamic
batching is on, which is the default.
"""

from __future__ import annotations

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.servers.model import open_session


def main() -> None:
    session = open_session()
    features, outputs = session.get_inputs()[0].shape[1], session.get_outputs()[0].shape[1]

    @batch
    def predict(x: np.ndarray) -> list[np.ndarray]:
        return session.run(["y"], {"x": x})

    http, grpc, metrics = map(int, sys.argv[1:])
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    addresses = dict.fromkeys(("http_address", "grpc_address", "metrics_address"), "127.0.0.1")
    with Triton(config=TritonConfig(**ports, **addresses)) as triton:
        triton.bind(
            model_name="perceptron",
            infer_func=predict,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(features,))],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(outputs,))],
            config=ModelConfig(max_batch_size=1024),
        )
        triton.serve()


if __name__ == "__main__":
    main()
