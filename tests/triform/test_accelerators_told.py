"""What ONNX Runtime is told when a predictor loads on a GPU: by a session that says it is on one, and runs on the CPU."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from triform import testing
from triform.accelerators import engine_folder
from triform.package import ModelPackage
from triform.predictor import Predictor
from triform.runtime import PROVIDERS, RuntimeOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
LIMIT = 1 << 30


class Build:
    """Of ONNX Runtime, with the providers: what its sessions were `told`, how they were `run`, whether `lock` was `held` then."""

    def __init__(self, lock: Path | None = None) -> None:
        self.told: list[tuple[Any, int]] = []
        self.run: list[str] = []
        self.held: list[bool] = []
        self._lock = lock
        self._session = onnxruntime.InferenceSession

    def session(self, model: str, settings: Any, *, providers: Any, enable_fallback: int) -> Session:
        self.told.append((providers, enable_fallback))
        self.look()
        return Session(self, self._session(model, settings, providers=[CPU]), [name for name, _ in providers])

    def look(self) -> None:
        if self._lock is not None:
            self.held.append(_is_held(self._lock))


class Session:
    def __init__(self, build: Build, session: Any, providers: list[str]) -> None:
        self._build, self._session = build, session
        self.get_inputs, self.io_binding = session.get_inputs, session.io_binding
        self.get_providers = lambda: providers

    def run(self, *args: Any) -> Any:
        return self._ran("run", *args)

    def run_with_iobinding(self, *args: Any) -> Any:
        return self._ran("run_with_iobinding", *args)

    def _ran(self, way: str, *args: Any) -> Any:
        self._build.run.append(way)
        self._build.look()
        return getattr(self._session, way)(*args)


def _is_held(lock: Path) -> bool:
    """By whoever: each opening of the file stands for itself, as another process's would."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    model = testing.linear(tmp_path / "m.onnx")
    return testing.repository(tmp_path / "models", {"m": model}, config={"m": "[batching]\npad_to = [2, 8]"}).package("m", 1)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, package: ModelPackage) -> Callable[..., tuple[Predictor, Build]]:
    """`on(options, lock)`: the package loaded by a build that has CUDA and TensorRT, and the build."""

    def on(options: RuntimeOptions, lock: Path | None = None) -> tuple[Predictor, Build]:
        build = Build(lock)
        monkeypatch.setattr(onnxruntime, "InferenceSession", build.session)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS["tensorrt"]))
        return Predictor.load(package, options), build

    return on


def test_a_session_on_tensorrt(on: Callable[..., tuple[Predictor, Build]], package: ModelPackage, tmp_path: Path) -> None:
    """Limits for both providers, the profile of `pad_to`, the engine cache, whose lock is held until the shapes are built."""
    options = RuntimeOptions(provider="tensorrt", gpu_mem_limit=LIMIT, device_id=1, engine_cache=str(tmp_path / "engines"))
    folder = engine_folder(options, package.manifest)
    assert folder is not None
    predictor, build = on(options, folder / ".lock")
    assert predictor.provider == TENSORRT
    cuda = {"device_id": "1", "gpu_mem_limit": str(LIMIT), "arena_extend_strategy": "kSameAsRequested"}
    tensorrt = {
        "device_id": "1",
        "trt_max_workspace_size": str(LIMIT),
        "trt_profile_min_shapes": "x:2x3",
        "trt_profile_opt_shapes": "x:8x3",
        "trt_profile_max_shapes": "x:8x3",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    assert build.told == [([(TENSORRT, tensorrt), (CUDA, cuda), (CPU, {})], 0)]
    assert len(build.held) >= 4  # when it was made, for the golden samples and for each shape
    assert all(build.held)
    assert not _is_held(folder / ".lock")
    assert set(build.run) == {"run_with_iobinding"}


def test_a_session_on_cuda(on: Callable[..., tuple[Predictor, Build]], tmp_path: Path) -> None:
    given = {"cuda": {"use_tf32": "0"}}
    engines = tmp_path / "engines"
    predictor, build = on(RuntimeOptions(provider="cuda", provider_options=given, engine_cache=str(engines)))
    assert build.told == [([(CUDA, {"device_id": "0", "use_tf32": "0"}), (CPU, {})], 0)]
    assert predictor.provider == CUDA
    assert predictor.predict({"x": np.array([[1, 2, 3]], np.float32)})["y"].tolist() == [[14]]
    assert set(build.run) == {"run_with_iobinding"}
    assert not engines.exists()
