"""What `build_app` takes of accelerators, for all models and for one."""

from __future__ import annotations

from typing import Any

import pytest

from ray_apps.arguments import Arguments
from ray_apps.predict import build_app
from triform.batched import BatchOptions
from triform.errors import ConfigurationError
from triform.runtime import RuntimeOptions

HERE = {"repository": "models", "allow_anonymous": True}
GPU = {**HERE, "num_gpus": 0.25, "gpu_mem_limit": 6 << 30}


def runtime(model: str = "m", environ: dict[str, str] | None = None, **args: Any) -> RuntimeOptions:
    arguments = Arguments.of(args)
    return arguments.runtime(arguments.settings(environ or {}), model)


def test_without_a_word_models_run_on_the_cpu() -> None:
    assert runtime(**HERE) == RuntimeOptions()


def test_a_share_of_a_gpu_means_cuda_unless_told_otherwise() -> None:
    assert runtime(**GPU) == RuntimeOptions(provider="cuda", gpu_mem_limit=6 << 30)
    assert runtime(**GPU, provider="tensorrt").provider == "tensorrt"
    assert runtime(**GPU, provider="cpu").provider == "cpu"
    assert runtime(**GPU, environ={"TRIFORM_PROVIDER": "auto"}).provider == "auto"


def test_a_model_has_its_own_options_and_the_rest_of_all_models() -> None:
    own = {
        "provider": "tensorrt",
        "gpu_mem_limit": 2 << 30,
        "slots": 2,
        "provider_options": {"tensorrt": {"trt_fp16_enable": "1"}},
    }
    args = {**GPU, "engine_cache": "/engines", "provider_options": {"cuda": {"use_tf32": "0"}}, "overrides": {"big": own}}
    assert runtime(**args) == RuntimeOptions(
        provider="cuda", gpu_mem_limit=6 << 30, engine_cache="/engines", provider_options={"cuda": {"use_tf32": "0"}}
    )
    assert runtime("big", **args) == RuntimeOptions(
        provider="tensorrt",
        gpu_mem_limit=2 << 30,
        engine_cache="/engines",
        provider_options={"tensorrt": {"trt_fp16_enable": "1"}},
    )
    options = Arguments.of(args).overrides["big"]
    assert isinstance(options, BatchOptions)
    assert options.slots == 2


def test_the_environment_says_what_the_arguments_do_not() -> None:
    environ = {"TRIFORM_ENGINE_CACHE": "/engines", "TRIFORM_REQUIRED_PROVIDERS": "CUDAExecutionProvider"}
    options = runtime(**GPU, environ=environ)
    assert (options.engine_cache, options.required_providers) == ("/engines", ("CUDAExecutionProvider",))
    assert runtime(**GPU, environ=environ, required_providers=["CPUExecutionProvider"]).required_providers == (
        "CPUExecutionProvider",
    )


def test_what_a_replica_asks_ray_for() -> None:
    slice_ = {**HERE, "num_gpus": 1, "num_cpus": 2, "resources": {"mig-1g.10gb": 1}, "accelerator_type": "H100"}
    assert Arguments.of(slice_).ray_actor_options() == {
        "num_cpus": 2.0,
        "num_gpus": 1.0,
        "resources": {"mig-1g.10gb": 1.0},
        "accelerator_type": "H100",
    }
    assert "accelerator_type" not in Arguments.of(HERE).ray_actor_options()


def isolated(**canary: Any) -> Arguments:
    args = {**GPU, "num_cpus": 2, "num_replicas": 3, "threads": 2, "timeout_s": 20, "resources": {"a": 1}, "canary": canary}
    made = Arguments.of(args).isolated()
    assert made is not None
    return made


def test_an_isolated_canary_has_what_stable_has_but_for_what_is_said_and_how_many() -> None:
    assert Arguments.of(HERE).isolated() is None
    same = isolated()
    assert (same.num_replicas, same.autoscaling, same.canary, same.timeout_s) == (None, None, None, 20)
    assert same.ray_actor_options() == {"num_cpus": 2.0, "num_gpus": 0.25, "resources": {"a": 1.0}}
    assert same.runtime(same.settings_of_models({}), "m") == RuntimeOptions(provider="cuda", gpu_mem_limit=6 << 30, threads=2)
    own = isolated(num_replicas=2, num_gpus=0, num_cpus=0.5, provider="cpu", resources={}, timeout_s=1, max_ongoing_requests=7)
    assert own.ray_actor_options() == {"num_cpus": 0.5, "num_gpus": 0.0, "resources": {}}
    assert (own.num_replicas, own.timeout_s, own.max_ongoing_requests) == (2, 20, 7)
    assert own.runtime(own.settings_of_models({}), "m").provider == "cpu"


def test_several_replicas_for_canaries_share_no_nonces() -> None:
    """No caller reaches them."""
    args = {**HERE, "nonces": "memory", "canary": {"num_replicas": 3}}
    assert Arguments.of(args).settings({}).nonces == "memory"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"canary": {"num_gpus": 0.5}}, "canary: num_gpus below 1 shares a GPU: gpu_mem_limit"),
        ({"canary": {"num_gpus": 1.5}}, "canary: num_gpus: expected a share"),
        ({"canary": {"provider": "cuda"}}, "canary: provider cuda needs num_gpus above 0"),
        ({"canary": {"num_replicas": 1, "autoscaling": {"max_replicas": 2}}}, "canary: num_replicas and autoscaling"),
        ({"canary": {"autoscaling": {"max_replicas": 2, "min_replicas": 3}}}, "canary: autoscaling: min_replicas 3"),
        ({"canary": {"timeout_s": 0}}, "timeout_s"),
        ({"canary": {"weight": 0.1}}, "weight"),
        ({"canary": True}, "canary"),
        ({"provider": "cuda"}, "provider cuda needs num_gpus above 0"),
        ({"overrides": {"m": {"provider": "cuda"}}}, r"overrides\.m: provider cuda needs num_gpus above 0"),
        ({"num_gpus": 0.25}, "num_gpus below 1 shares a GPU: gpu_mem_limit"),
        ({"num_gpus": 0.25, "provider": "auto"}, "num_gpus below 1 shares a GPU: gpu_mem_limit"),
        ({"num_gpus": 0.25, "provider": "cpu", "overrides": {"m": {"provider": "auto"}}}, r"overrides\.m: num_gpus below 1"),
        ({"max_queued_requests": 0}, "max_queued_requests"),
        ({"received_bytes": 1000, "request_bytes": 1001}, "received_bytes 1000 is below request_bytes 1001"),
        ({"num_gpus": 1.5, "provider": "cuda"}, "num_gpus: expected a share of one GPU or whole ones, got 1.5"),
        ({"provider": "rocm"}, "provider"),
        ({"resources": {"mig": 0}}, "resources"),
        ({"overrides": {"m": {"gpu_mem_limit": 0}}}, "gpu_mem_limit"),
        ({"provider_options": {"cuda": {"use_tf32": 0}}}, "provider_options"),
        ({"provider_options": {"rocm": {}}}, "provider_options|rocm"),
    ],
)
def test_what_can_not_be_is_named(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^args: .*({told})"):
        Arguments.of({**HERE, **args}).settings({})


def test_auto_needs_no_gpu_and_of_a_whole_one_no_share() -> None:
    assert runtime(**HERE, provider="auto") == RuntimeOptions(provider="auto")
    assert runtime(**HERE, provider="auto", num_gpus=1) == RuntimeOptions(provider="auto")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"canary": {"resources": {"CPU": 1}}}, "canary: .*CPU"),
        ({"resources": {"CPU": 1}}, "CPU"),
        ({"resources": {"mig": 1e-5}}, "mig"),
        ({"num_cpus": 1e-5}, "num_cpus"),
    ],
)
def test_what_ray_does_not_take_is_a_configuration_error(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^args: .*{told}"):
        build_app({**HERE, **args})
