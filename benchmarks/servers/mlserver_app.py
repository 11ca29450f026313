"""MLServer with a custom runtime.

    mlserver start FOLDER          settings.json and model-settings.json are in FOLDER, see `ways.py`

Source: docs.seldon.ai/mlserver, "Custom Inference Runtimes" (user-guide/custom), the simplified interface.
"""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import decode_args

from benchmarks.servers.model import open_model


class Perceptron(MLModel):
    async def load(self) -> bool:
        self.model = open_model()
        return True

    @decode_args
    async def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model(x)
