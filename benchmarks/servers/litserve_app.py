"""LitServe.

    python -m benchmarks.servers.litserve_app PORT

Source: lightning.ai/docs/litserve, "Quick start" (get-started) and "LitAPI" (api-reference/litapi).
"""

from __future__ import annotations

import sys

import litserve as ls

from benchmarks.servers.model import open_model


class Perceptron(ls.LitAPI):
    def setup(self, device):  # noqa: ARG002 - LitServe calls it so, and looks at annotations: there are none
        self.model = open_model()

    def decode_request(self, request):
        return request["x"]

    def predict(self, x):
        return self.model(x)

    def encode_response(self, output):
        return {"y": output.tolist()}


if __name__ == "__main__":
    server = ls.LitServer(Perceptron(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
