"""What tests build layers of, and for which Python."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from infra.layers.build import BUILT, Built
from infra.layers.target import HERE, Target
from triform import testing
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog
from triform.repository import ModelRepository

RUNNING = Target(os.uname().machine.replace("aarch64", "arm64"), HERE)


def tiny_repository(folder: Path) -> ModelRepository:
    """`linear` with versions 1 and 2, released as stable and canary at revision 2; `lookup`, never released."""
    repository = testing.repository(
        folder / "models", {"linear": testing.linear(folder / "linear.onnx"), "lookup": testing.lookup(folder / "lookup.onnx")}
    )
    package_model(testing.linear(folder / "wide.onnx", outputs=2), name="linear", repository=repository)
    ReleaseLog(repository, "linear").set(stable=1)
    ReleaseLog(repository, "linear").set(canary=Canary(2, 0.1))
    return repository


def read_built(layers: Path) -> Built:
    return msgspec.json.decode((layers / BUILT).read_bytes(), type=Built)
