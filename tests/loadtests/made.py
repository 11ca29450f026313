"""Payloads and results made by hand, for tests that need no flights."""

from __future__ import annotations

import numpy as np

from loadtests.driving import Driven
from loadtests.order import Generated, Order, Protocol
from loadtests.payloads import Payload, Payloads
from loadtests.records import COLUMNS, OK
from loadtests.results import Result, result
from loadtests.shapes import stages
from loadtests.watching import Watched
from loadtests.wording import GRPC_PATH

MODEL = "flight-delay"
PATH = f"/v1/models/{MODEL}:predict"


def payloads(answer: float = 0.25, bound: float = 1e-6, over: Protocol = "tfs") -> Payloads:
    """One request of one row; right is `answer`, give or take `bound`."""
    expected, bounds = np.float32([answer]).tobytes(), np.float64([bound]).tobytes()
    path = GRPC_PATH if over == "oip-grpc" else PATH
    one = Payload(over, 1, path, {"content-type": "application/json"}, b'{"instances": [{}]}', expected, bounds)
    return Payloads(MODEL, "probabilities", 1, "p_late", [one])


def found(*requests: tuple[float, float, str], shape: str = "soak", saturated: float | None = None, **counters: object) -> Result:
    """A result of ten seconds' requests: when each was due in seconds from the start, how long it waited, its outcome."""
    outcomes = list(dict.fromkeys(outcome for *_, outcome in requests)) or [OK]
    columns = [
        [1000.0 + due for due, *_ in requests],
        [0.0] * len(requests),
        [waited for _, waited, _ in requests],
        [0] * len(requests),
        [outcomes.index(outcome) for *_, outcome in requests],
        [1] * len(requests),
    ]
    records = {name: np.array(column, kind) for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)}
    order = Order(host="http://127.0.0.1:1", stages=stages(shape, 10.0), rate=10.0, users=1)
    told = Generated(
        outcomes=outcomes,
        examples={name: f"why {name}" for name in outcomes},
        protocols=["tfs"],
        workers=1,
        began=1000.0,
        saturated=saturated,
        locust_requests=len(requests),
        locust_failures=0,
        locust_warned=False,
    )
    names = {"target": "serve", "title": "a target", "unit": "replicas", "shape": shape}
    return result(order, Driven(records, told), Watched(), counters, **names)
