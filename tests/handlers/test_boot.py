"""What is loaded when, from where, with how many threads; and what refuses the start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from handlers._boot import PINNED, Booted, Pinned, PinnedModel, boot
from triform import testing
from triform.errors import ConfigurationError, DigestMismatch, TriformError
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog
from triform.repository import open_repository

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """m with versions 1 to 3: 2 is stable and 3 the canary."""
    file = testing.linear(tmp_path / "m.onnx")
    repository = open_repository(tmp_path / "models")
    for _ in range(3):
        package_model(file, name="m", repository=repository)
    ReleaseLog(repository, "m").set(stable=2, canary=Canary(3, 0.1))
    return tmp_path / "models"


def test_on_demand_only_the_default_model_is_loaded_now(started: Callable[..., Booted]) -> None:
    booted = started()
    now = [load.model for load in booted.telemetry._loads]
    assert now == ["linear"]
    booted.service.models.get("words")  # the first request for it
    assert [load.model for load in booted.telemetry._loads] == ["linear", "words"]


@pytest.mark.parametrize("initialization", ["provisioned-concurrency", "snap-start"])
def test_whoever_does_not_keep_a_caller_waiting_loads_all(started: Callable[..., Booted], initialization: str) -> None:
    booted = started(AWS_LAMBDA_INITIALIZATION_TYPE=initialization)
    assert sorted(load.model for load in booted.telemetry._loads) == ["linear", "words"]


def test_aliases_are_the_releases(released: Path) -> None:
    models = boot({"TRIFORM_REPOSITORY": str(released)}).service.models
    assert models.versions("m") == [2, 3]
    assert models.get("m").manifest.version == 2
    assert models.get("m", alias="canary").manifest.version == 3


def test_a_layer_pins_what_its_aliases_mean(released: Path) -> None:
    pinned = Pinned({"m": PinnedModel({"stable": 1, "canary": 2}, revision=7)})
    (released / PINNED).write_bytes(msgspec.json.encode(pinned))
    models = boot({"TRIFORM_REPOSITORY": str(released)}).service.models
    assert models.versions("m") == [1, 2]
    assert models.get("m", alias="canary").manifest.version == 2


def test_another_package_than_the_pinned_one_refuses_the_start(released: Path) -> None:
    pinned = Pinned({"m": PinnedModel({"stable": 1}, digests={"1": "0" * 64})})
    (released / PINNED).write_bytes(msgspec.json.encode(pinned))
    with pytest.raises(DigestMismatch, match="pins"):
        boot({"TRIFORM_REPOSITORY": str(released)})


def test_chosen_models(released: Path) -> None:
    models = boot({"TRIFORM_REPOSITORY": str(released), "TRIFORM_MODELS": "m/1"}).service.models
    assert (models.versions("m"), models.get("m", alias="stable").manifest.version) == ([1], 1)


def test_threads_are_those_that_the_memory_pays_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in "runtime", "packaging":
        monkeypatch.setattr(f"triform.{module}.available_cpus", lambda: 8)
    toml = "[runtime]\nthreads = 4\n"
    testing.repository(tmp_path / "models", {"m": testing.linear(tmp_path / "m.onnx")}, config={"m": toml})

    def threads(**environ: str) -> int:
        return boot({"TRIFORM_REPOSITORY": str(tmp_path / "models"), **environ}).service.models.get("m").predictor.threads

    assert threads() == 4
    assert [threads(AWS_LAMBDA_FUNCTION_MEMORY_SIZE=mb) for mb in ("128", "1769", "3537", "3538", "10240")] == [1, 1, 1, 2, 4]
    assert threads(AWS_LAMBDA_FUNCTION_MEMORY_SIZE="10240", TRIFORM_THREADS="3") == 3


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"TRIFORM_DEFAULT_MODEL": "nobody"}, "TRIFORM_DEFAULT_MODEL"),
        ({"TRIFORM_TELEMETRY": "loud"}, "TRIFORM_TELEMETRY"),
        ({"TRIFORM_DEADLINE_MARGIN": "nan"}, "TRIFORM_DEADLINE_MARGIN"),
        ({"TRIFORM_DEADLINE_MARGIN": "-1"}, "TRIFORM_DEADLINE_MARGIN"),
        ({"TRIFORM_REFERENCE_BYTES": "-1"}, "TRIFORM_REFERENCE_BYTES"),
        ({"TRIFORM_COLOUR": "red"}, "TRIFORM_COLOUR"),
        ({"TRIFORM_MODELS": "nobody"}, "nobody"),
        ({"TRIFORM_MODELS": "../linear"}, "linear"),
        ({"TRIFORM_REPOSITORY": "/nowhere"}, "repository"),
    ],
)
def test_a_bad_setting_refuses_the_start(started: Callable[..., Booted], environ: dict[str, str], names: str) -> None:
    with pytest.raises(TriformError, match=names):
        started(**environ)


def test_without_a_layer_or_a_repository_there_is_no_start() -> None:
    with pytest.raises(ConfigurationError, match="TRIFORM_REPOSITORY"):
        boot({})


def test_a_damaged_pinned_json_refuses_the_start(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / PINNED).write_text('{"models": 3}')
    with pytest.raises(ConfigurationError, match=PINNED):
        boot({"TRIFORM_REPOSITORY": str(tmp_path / "models")})


def test_models_from_s3(s3_bucket: str, tmp_path: Path) -> None:
    repository = open_repository(f"s3://{s3_bucket}/models", cache=tmp_path / "packager")
    package_model(testing.linear(tmp_path / "m.onnx"), name="m", repository=repository)
    booted = boot({"TRIFORM_REPOSITORY": f"s3://{s3_bucket}/models", "TRIFORM_CACHE": str(tmp_path / "cache")})
    assert booted.service.models.get("m").manifest.version == 1
    stages = booted.telemetry._loads[0].stages
    assert list(stages) == ["fetch", "verify", "session", "warmup"]
    assert stages["fetch"] > 0


IMPORTS = """
import gc, json, os, sys, time
from awslambdaric.lambda_context import LambdaContext
import handlers._start, numpy
assert len(os.listdir("/proc/self/task")) == 1, "OpenBLAS has threads of its own"
import handlers.predict
event = json.load(open("tests/events/http-v2.json"))
context = LambdaContext("id", None, None, int(time.time() * 1e3) + 30_000, "arn")
answer = handlers.predict.handler(event, context)
assert answer["statusCode"] == 200, answer
heavy = {
    "boto3", "botocore.session", "botocore.client", "pydantic", "pyarrow", "onnx", "pandas", "ray", "typer", "rich",
    "prometheus_client", "aws_xray_sdk", "ddtrace", "opentelemetry", "aws_lambda_powertools.event_handler",
    "aws_lambda_powertools.utilities.data_classes", "_hashlib", "numpy.typing",
}
found = sorted(heavy & sys.modules.keys())
assert not found, found
assert gc.isenabled()
assert ("aws_lambda_powertools" in sys.modules) == (sys.argv[1] == "emf")
"""


@pytest.mark.parametrize("telemetry", ["emf", "none"])
def test_on_the_layer_path_nothing_heavy_is_imported(models: Path, telemetry: str) -> None:
    settings = {"TRIFORM_REPOSITORY": str(models), "TRIFORM_TELEMETRY": telemetry, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTS, telemetry]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_powertools_the_start_says_what_to_do(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aws_lambda_powertools.logging", None)
    with pytest.raises(ConfigurationError, match="TRIFORM_TELEMETRY=none"):
        boot({"TRIFORM_REPOSITORY": str(models)})


def test_a_snapshot_is_restored_with_chance_and_connections_of_its_own(started: Callable[..., Booted]) -> None:
    import random

    import snapshot_restore_py as hooks

    from handlers._snapshots import register
    from tests.handlers.conftest import context
    from triform import headers
    from triform.headers import request_id

    booted, dropped = started(AWS_LAMBDA_INITIALIZATION_TYPE="snap-start"), []
    before, after = list(hooks._before_snapshot_registry), list(hooks._after_restore_registry)
    try:
        register(booted, lambda: dropped.append("connections"))
        with booted.telemetry.invocation(context()):
            pass
        (drop, _, _), (seed, _, _) = hooks._before_snapshot_registry[-1], hooks._after_restore_registry[-1]
        drop()
        state = random.getstate()
        headers.forget_ids()  # another test may have left one id alone
        request_id([])
        assert headers._new_ids, "made for requests to come, here and in every copy"
        seed()
        assert not headers._new_ids
        assert dropped == ["connections"]
        assert random.getstate() != state
        assert booted.telemetry.invocations == 0
    finally:
        hooks._before_snapshot_registry[:], hooks._after_restore_registry[:] = before, after
