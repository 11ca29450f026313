"""The usual Ray Serve application: FastAPI as the ingress, all settings as they are.

    python -m benchmarks.servers.ray_fastapi PORT

Source: docs.ray.io, "Set Up FastAPI and HTTP" (serve/http-guide.html).
"""

# FastAPI reads the annotations, which must be types here, not text: no `from __future__ import annotations`.
import signal
import sys
import threading
from typing import Any

CPUS = 4  # logical ones, of each Ray that is measured


def serve_until_told(app: Any, port: int) -> None:
    """A Ray of its own and the application on it, until SIGTERM."""
    import ray
    from ray import serve

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ray.init("local", num_cpus=CPUS, include_dashboard=False, logging_level="WARNING")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app, route_prefix="/")
    while not ended.wait(1.0):
        pass
    serve.shutdown()
    ray.shutdown()


def main() -> None:
    from fastapi import FastAPI
    from pydantic import BaseModel
    from ray import serve

    from benchmarks.servers.model import open_model

    class Rows(BaseModel):
        x: list[list[float]]

    api = FastAPI()

    @serve.deployment
    @serve.ingress(api)
    class Predict:
        def __init__(self) -> None:
            self.model = open_model()

        @api.post("/predict")
        def predict(self, rows: Rows) -> list[list[float]]:
            answer: list[list[float]] = self.model(rows.x).tolist()
            return answer

    serve_until_told(Predict.bind(), int(sys.argv[1]))


if __name__ == "__main__":
    main()
