"""`handlers.predict.handler`, its time and that of `session.run` within it told in the answer's headers, in nanoseconds."""

import os
import time
from typing import Any

from handlers.predict import function
from triform import predictor

runs: list[int] = []
_run = predictor._run


def run(*args: Any) -> list[Any]:
    started = time.perf_counter_ns()
    try:
        return _run(*args)
    finally:
        runs.append(time.perf_counter_ns() - started)


for served in function.booted.service.models.names():
    function.booted.service.models.get(served).predictor._run_session = run


def handler(event: Any, context: Any) -> dict[str, Any]:
    runs.clear()
    started = time.perf_counter_ns()
    answer = function(event, context)
    took = time.perf_counter_ns() - started
    answer["headers"] = {**answer["headers"], "x-handler-ns": str(took), "x-run-ns": str(sum(runs)), "x-pid": str(os.getpid())}
    return answer
