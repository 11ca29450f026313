"""mosec: a worker with JSON at /inference and one with MessagePack at /binary, of which only one is asked at a time.

    python -m benchmarks.servers.mosec_app --address 127.0.0.1 --port PORT

Source: mosecorg.github.io/mosec, "Welcome to MOSEC" (its usage) and "Interface" (reference/interface.html: routes, MsgpackMixin).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mosec import Server, Worker
from mosec.mixin import MsgpackMixin

from benchmarks.servers.model import open_model


class Json(Worker):
    def __init__(self) -> None:
        self.model = open_model()

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.model(data["x"]).tolist()}


class Binary(MsgpackMixin, Worker):
    def __init__(self) -> None:
        self.model = open_model()

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        y = self.model(np.frombuffer(data["x"], np.float32).reshape(data["shape"]))
        return {"y": y.tobytes(), "shape": list(y.shape)}


if __name__ == "__main__":
    server = Server()
    server.append_worker(Json, num=1, route="/inference")
    server.append_worker(Binary, num=1, route="/binary")
    server.run()
