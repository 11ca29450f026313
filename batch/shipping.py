"""The code that the workers of somebody else's cluster run: this driver's own.

    runtime_env() -> ray.init(address, runtime_env=...)               a driver ships its code; `--address` does
                  -> JobSubmissionClient.submit_job(runtime_env=...)   a job brings its code
                  -> ray job submit --runtime-env-json "$(python -m batch.shipping)" -- python -m batch run ...

Only the two packages travel, about 0.3 MB. What they import (onnxruntime, msgspec, orjson, pyarrow) is the image's business, and
so are credentials and settings: no environment variable is shipped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import batch
import triform

OF_A_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job API for the process that it starts


def runtime_env() -> dict[str, Any]:
    """Ray's `runtime_env` with the packages `triform` and `batch` as this process imported them, from a checkout or installed."""
    packages = [Path(str(package.__file__)).parent for package in (triform, batch)]
    return {"py_modules": [str(folder) for folder in packages], "excludes": ["__pycache__/", "*.pyc"]}


def of_driver() -> dict[str, Any] | None:
    """What a driver ships to the cluster it connects to. Within a Ray job nothing: its workers have what the job was given, and
    Ray refuses a driver that names again what its job's `runtime_env` names."""
    return None if OF_A_JOB in os.environ else runtime_env()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(runtime_env()) + "\n")
