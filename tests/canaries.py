"""Models with a canary beside stable, and what a request's key means by their release, for tests of every host."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from onnx import helper

from triform import testing
from triform.http import HttpRequest, HttpResponse, HttpSurface
from triform.models import Models
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import Canary, ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.service import Execute, InferenceService, run_here
from triform.splitting import TrafficSplit
from triform.testing import RecordingTelemetry

CONFIG = """
[inputs.x]
columns = ["a", "b"]
[outputs.y]
columns = ["sum", "label"]
[key]
header = "X-User"
column = "user"
"""
USERS = [f"user-{i}" for i in range(24)]


class Released(NamedTuple):
    """A repository whose models have stable 1 and canary 2 at a half of the keys."""

    repository: ModelRepository
    root: Path

    def log(self, model: str = "scored") -> ReleaseLog:
        return ReleaseLog(self.repository, model)

    def split(self, model: str = "scored") -> TrafficSplit:
        release = self.log(model).current()
        assert release is not None
        return TrafficSplit.of(release)

    def keys_of(self, version: int, model: str = "scored", wanted: int = 10) -> list[str]:
        """Keys that this version answers."""
        split, keys = self.split(model), (f"key-{i}" for i in range(10_000))
        return [key for _, key in zip(range(wanted), (k for k in keys if split.choose(k.encode()) == version), strict=False)]


def build(folder: Path) -> Released:
    """A repository with

    scored   columns a, b (x FP32[rows, 2]) -> sum = version * (a + b), label: the version; the key is X-User, else column user
    lookup   x INT64[rows] -> y FP32[rows] = 10 * x; stable has 0..99, the canary 0..9; the key is the request's id
    """
    root = Path(shutil.copytree(_built(), folder / "models"))
    return Released(open_repository(root), root)


@cache
def _built() -> Path:
    """Packaged once a process, which takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="canaries-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    toml = folder / "scored.toml"
    toml.write_text(CONFIG)
    repository = open_repository(folder / "models")
    for version in 1, 2:
        package_model(_scored(folder / f"{version}.onnx", version), name="scored", repository=repository, config=toml)
        file = testing.lookup(folder / "lookup.onnx", entries=100 if version == 1 else 10)
        package_model(file, name="lookup", repository=repository)
    for model in "scored", "lookup":
        ReleaseLog(repository, model).set(stable=1, canary=Canary(2, 0.5))
    return folder / "models"


def _scored(path: Path, version: int) -> Path:
    """y = [version * (a + b), version]."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["sums"]), helper.make_node("Add", ["sums", "label"], ["y"])]
    weights = np.array([[version, 0], [version, 0]], np.float32)
    constants = {"w": weights, "label": np.array([0, version], np.float32)}
    return testing.save(path, nodes, [testing.value("x", "FP32", ["N", 2])], [testing.value("y", "FP32", ["N", 2])], constants)


def records(users: list[Any]) -> list[dict[str, Any]]:
    """One for each user: a is its number, b is 1."""
    return [{"a": i, "b": 1, "user": user} for i, user in enumerate(users)]


def answers(users: list[Any], versions: list[int]) -> list[dict[str, float]]:
    """What these versions answer to them."""
    return [{"sum": float(v * (i + 1)), "label": float(v)} for i, (_, v) in enumerate(zip(users, versions, strict=True))]


def take(models: Models, released: Released, model: str) -> None:
    """As a host takes a release up: its versions loaded, its keys shared."""
    release = released.log(model).current()
    assert release is not None
    loaded = {version: Predictor.load(released.repository.package(model, version)) for version in release.versions()}
    models.replace(model, loaded, release.aliases(), release)


class Host(NamedTuple):
    """Both models behind the surface, with stable and canary loaded."""

    surface: HttpSurface
    models: Models
    telemetry: RecordingTelemetry

    def predict(self, model: str, rows: list[Any], choice: str = "", **headers: str) -> HttpResponse:
        body = orjson.dumps({"instances": rows})
        given = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return self.surface.handle(HttpRequest("POST", f"/v1/models/{model}{choice}:predict", given, body))

    def look_up(self, key: str, *numbers: int) -> int:
        return self.predict("lookup", [*numbers], x_request_id=key).status

    def refs(self) -> list[tuple[str, str, str, int]]:
        return [(f"{r.model}/{r.version}", r.variant, r.code, r.rows) for r in self.telemetry.records]


def host(released: Released, execute: Execute = run_here) -> Host:
    telemetry = RecordingTelemetry()
    models = Models(form="serve", telemetry=telemetry)
    for model in released.repository.models():
        take(models, released, model)
    return Host(HttpSurface(InferenceService(models, execute)), models, telemetry)
