"""What CUDA and TensorRT are told. Whether they do as told is seen on a GPU alone: those tests are marked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triform import testing
from triform.accelerators import building, engine_folder, for_model, profile
from triform.errors import ConfigurationError, ProviderUnavailable, ResourceExhausted
from triform.package import ModelPackage
from triform.predictor import Predictor
from triform.runtime import RuntimeOptions, ort, provider_options

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PADDED = "[batching]\npad_to = [1, 8, 32]\n"


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., ModelPackage]:
    def make(model: Path | None = None, config: str = PADDED) -> ModelPackage:
        model = model or testing.linear(tmp_path / "m.onnx", features=256, outputs=256)
        return testing.repository(tmp_path / "models", {"m": model}, config={"m": config}).package("m", 1)

    return make


@pytest.mark.parametrize(
    ("provider", "options", "told"),
    [
        ("CPUExecutionProvider", RuntimeOptions(gpu_mem_limit=5, provider_options={"cuda": {"a": "b"}}), {}),
        (CUDA, RuntimeOptions(), {"device_id": "0"}),
        (
            CUDA,
            RuntimeOptions(gpu_mem_limit=1 << 30, device_id=1),
            {"device_id": "1", "gpu_mem_limit": "1073741824", "arena_extend_strategy": "kSameAsRequested"},
        ),
        (TENSORRT, RuntimeOptions(gpu_mem_limit=1 << 30), {"device_id": "0", "trt_max_workspace_size": "1073741824"}),
        (
            CUDA,
            RuntimeOptions(
                gpu_mem_limit=7,
                provider_options={"cuda": {"use_tf32": "0", "gpu_mem_limit": "9"}, "tensorrt": {"trt_fp16_enable": "1"}},
            ),
            {"device_id": "0", "gpu_mem_limit": "9", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"},
        ),
        (
            TENSORRT,
            RuntimeOptions(provider_options={"cuda": {"use_tf32": "0"}, "tensorrt": {"trt_fp16_enable": "1"}}),
            {"device_id": "0", "trt_fp16_enable": "1"},
        ),
    ],
)
def test_each_provider_is_told_its_own_options(provider: str, options: RuntimeOptions, told: dict[str, str]) -> None:
    assert provider_options(provider, options) == told


def test_options_of_another_provider_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^provider_options: .* got 'rocm'"):
        RuntimeOptions(provider_options={"rocm": {}})


def test_one_profile_over_all_of_pad_to(package: Callable[..., ModelPackage]) -> None:
    assert profile(package().manifest) == {
        "trt_profile_min_shapes": "x:1x256",
        "trt_profile_opt_shapes": "x:32x256",
        "trt_profile_max_shapes": "x:32x256",
    }


def test_the_profile_has_every_input_as_the_graph_has_it(package: Callable[..., ModelPackage], tmp_path: Path) -> None:
    """Rows on axis 1 of one input, on axis 0 of the other, which holds one number a row."""
    from onnx import helper

    nodes = [
        helper.make_node("Transpose", ["a"], ["rows"], perm=[1, 0, 2]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["summed"], keepdims=0),
        helper.make_node("Add", ["summed", "b"], ["y"]),
    ]
    inputs = [testing.value("a", "FP32", [2, "N", 3]), testing.value("b", "FP32", ["N"])]
    model = testing.save(
        tmp_path / "axes.onnx", nodes, inputs, [testing.value("y", "FP32", ["N"])], {"axes": np.array([1, 2], np.int64)}
    )
    manifest = package(model, "[inputs.a]\nbatch_axis = 1\n" + PADDED).manifest
    assert profile(manifest)["trt_profile_min_shapes"] == "a:2x1x3,b:1"
    assert profile(manifest)["trt_profile_max_shapes"] == "a:2x32x3,b:32"


@pytest.mark.parametrize("padded", [False, True])
def test_no_profile_where_shapes_are_free(package: Callable[..., ModelPackage], tmp_path: Path, padded: bool) -> None:
    free = testing.identity(tmp_path / "free.onnx", "FP32", shape=["N", "width"])
    manifest = package(free if padded else None, PADDED if padded else "").manifest
    assert profile(manifest) == {}


def test_what_is_said_of_tensorrt_counts_more(package: Callable[..., ModelPackage], caplog: pytest.LogCaptureFixture) -> None:
    manifest = package().manifest
    given = {"cuda": {"use_tf32": "0"}, "tensorrt": {"trt_profile_opt_shapes": "x:8x256", "trt_fp16_enable": "1"}}
    options = for_model(RuntimeOptions(provider="tensorrt", provider_options=given), manifest)
    assert options.provider_options["cuda"] == given["cuda"]
    told = provider_options(TENSORRT, options)
    assert (told["trt_profile_opt_shapes"], told["trt_profile_max_shapes"]) == ("x:8x256", "x:32x256")
    assert told["trt_fp16_enable"] == "1"
    assert "trt_engine_cache_enable" not in told
    assert not caplog.records


def test_a_model_without_pad_to_is_told_of(package: Callable[..., ModelPackage], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for_model(RuntimeOptions(provider="tensorrt"), package(config="").manifest)
    assert "m/1: without pad_to TensorRT builds its engines anew" in caplog.text


def test_only_tensorrt_is_told_of_shapes(package: Callable[..., ModelPackage]) -> None:
    for provider in "cpu", "cuda":
        options = RuntimeOptions(provider=provider, engine_cache="/nowhere")
        assert for_model(options, package().manifest) is options
        assert engine_folder(options, package().manifest) is None


def test_engines_are_kept_by_package_and_runtime(package: Callable[..., ModelPackage], tmp_path: Path) -> None:
    manifest = package().manifest
    options = RuntimeOptions(provider="tensorrt", engine_cache=str(tmp_path / "engines"))
    folder = engine_folder(options, manifest)
    assert folder == tmp_path / f"engines/m-1-{manifest.digest[:16]}-ort{ort.__version__}"
    told = provider_options(TENSORRT, for_model(options, manifest))
    assert {told["trt_engine_cache_path"], told["trt_timing_cache_path"]} == {str(folder)}
    assert (told["trt_engine_cache_enable"], told["trt_timing_cache_enable"]) == ("1", "1")


def test_one_process_of_a_node_builds(tmp_path: Path) -> None:
    order: list[str] = []
    held, released = threading.Event(), threading.Event()

    def first() -> None:
        with building(tmp_path / "engines/m"):
            held.set()
            assert released.wait(60)
            order.append("built")

    def second() -> None:
        with building(tmp_path / "engines/m"):
            order.append("read")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert held.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert order == []
    released.set()
    for thread in threads:
        thread.join(60)
    assert order == ["built", "read"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(ConfigurationError, match=r"^engine_cache: .*engines cannot be written"), building(tmp_path / "engines/m"):
        pass


@pytest.mark.gpu
def test_an_option_that_the_provider_does_not_know_is_named(package: Callable[..., ModelPackage]) -> None:
    """ONNX Runtime itself would go on with the CPU."""
    with pytest.raises(ProviderUnavailable, match='Unknown provider option: "use_tf33"'):
        Predictor.load(package(), RuntimeOptions(provider="cuda", provider_options={"cuda": {"use_tf33": "0"}}))


@pytest.mark.gpu
def test_the_memory_limit_is_kept(package: Callable[..., ModelPackage]) -> None:
    options = RuntimeOptions(provider="cuda", required_providers=(CUDA,), gpu_mem_limit=32 << 20)
    predictor = Predictor.load(package(config=""), options)
    assert predictor.predict({"x": np.ones((8, 256), np.float32)})["y"].shape == (8, 256)
    with pytest.raises(ResourceExhausted):
        predictor.run_graph({"x": np.ones((1 << 18, 256), np.float32)})  # 256 MiB of input


@pytest.mark.gpu
def test_tensorrt_builds_once_and_answers_at_every_shape(package: Callable[..., ModelPackage], tmp_path: Path) -> None:
    packed = package()
    rows = np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32)
    wanted = Predictor.load(packed).predict({"x": rows})["y"]
    options = RuntimeOptions(provider="tensorrt", required_providers=(TENSORRT,), engine_cache=str(tmp_path / "engines"))
    built: dict[Path, int] = {}
    for _ in range(2):
        predictor = Predictor.load(packed, options)
        for count in 1, 3, 8, 9, 32, 40:
            answer = predictor.predict({"x": rows[:count]})["y"]
            np.testing.assert_allclose(answer, wanted[:count], rtol=1e-2, atol=1e-2 * np.abs(wanted).max())
        engines = {file: file.stat().st_mtime_ns for file in (tmp_path / "engines").rglob("*.engine")}
        assert engines
        assert built in ({}, engines)
        built = engines
