"""BentoML.

    bentoml serve benchmarks.servers.bentoml_app:Perceptron --port PORT

Source: docs.bentoml.com, "Create online API Services" (build-with-bentoml/services) and "Define input and output types".
"""

from __future__ import annotations

import bentoml
import numpy as np

from benchmarks.servers.model import open_model


@bentoml.service(workers=1)
class Perceptron:
    def __init__(self) -> None:
        self.model = open_model()

    @bentoml.api
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model(x)
