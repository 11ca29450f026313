"""Prints what each import and stage of a start takes in this fresh process, as JSON: name -> seconds.

TRIFORM_REPOSITORY as for the function; BENCH_BEGUN: `time.time()` right before the process was started.
"""

import json
import os
import sys
import time

spent: dict[str, float] = {"Python": time.time() - float(os.environ.pop("BENCH_BEGUN"))}
last = time.perf_counter()


def lap(name: str) -> None:
    global last
    now = time.perf_counter()
    spent[name] = now - last
    last = now


import awslambdaric.bootstrap  # noqa: E402, F401 - the order is what is measured

lap("awslambdaric")
import numpy  # noqa: E402, F401

lap("numpy")
import onnxruntime  # noqa: E402, F401

lap("onnxruntime")
import msgspec  # noqa: E402, F401
import orjson  # noqa: E402, F401

lap("msgspec, orjson")
import handlers._boot  # noqa: E402
import handlers._function  # noqa: E402

lap("triform, handlers")
if os.environ.get("TRIFORM_TELEMETRY", "emf") == "emf":
    import aws_lambda_powertools.logging
    import aws_lambda_powertools.metrics.provider.cloudwatch_emf.cloudwatch  # noqa: F401

    lap("Powertools")
booted = handlers._boot.boot(os.environ)
lap("boot")
for load in booted.telemetry._loads:
    for stage, seconds in load.stages.items():
        spent[f"boot: {stage}"] = seconds
        spent["boot"] -= seconds
json.dump(spent, sys.stdout)
