"""ONNX Runtime on the machine that there really is: CPUs, providers, and builds that should not have been installed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from triform import testing
from triform.errors import ConfigurationError, PackageError, ProviderUnavailable
from triform.runtime import RuntimeOptions, available_cpus, brief, check_assignment, open_session, thread_count

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, HERE),
        ({"cpu.max": "max 100000\n"}, HERE),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "199999 100000\n"}, 1),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, HERE),
        ({"cpu.max": "nonsense\n"}, HERE),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HERE),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n"}, HERE),
    ],
)
def test_the_cgroup_caps_the_cpus(files: Mapping[str, str], cpus: int, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_cpus(tmp_path) == cpus


def test_the_affinity_mask_caps_the_cpus(tmp_path: Path) -> None:
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert available_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, mask)


def test_threads_are_the_packages_unless_told_and_never_more_than_cpus(caplog: pytest.LogCaptureFixture) -> None:
    have = available_cpus()
    assert thread_count(RuntimeOptions(), 1) == 1
    assert thread_count(RuntimeOptions(threads=1), have) == 1
    assert thread_count(RuntimeOptions(threads=have), 1) == have
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert thread_count(RuntimeOptions(), 10_000) == have
    assert "10000 wanted" in caplog.text


@pytest.mark.parametrize(
    ("given", "key"), [({"provider": "gpu"}, "provider"), ({"threads": 0}, "threads"), ({"gpu_mem_limit": -1}, "gpu_mem_limit")]
)
def test_an_option_that_cannot_be(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: expected"):
        RuntimeOptions(**given)


def test_a_node_that_runs_elsewhere_is_named(tmp_path: Path) -> None:
    """A real session on the CPU, asked whether all of it runs on CUDA."""
    options = RuntimeOptions(required_providers=("CPUExecutionProvider",))
    session = open_session(testing.linear(tmp_path / "linear.onnx"), options, 1)
    check_assignment(session, [])
    check_assignment(session, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailable) as error:
        check_assignment(session, ["CUDAExecutionProvider"])
    assert str(error.value) == (
        "required_providers: 1 node(s) run outside CUDAExecutionProvider: 1 x MatMul on CPUExecutionProvider"
    )


def test_a_session_never_moves_to_another_provider(tmp_path: Path) -> None:
    """ONNX Runtime would, after an error on a GPU: at the start, and in the middle of its work."""
    assert open_session(testing.linear(tmp_path / "linear.onnx"), RuntimeOptions(), 1)._enable_fallback is False


def test_a_file_that_does_not_load_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(PackageError, match=r"^ONNX Runtime cannot load model\.onnx: ") as error:
        open_session(tmp_path / "model.onnx", RuntimeOptions(), 1)
    assert "/" not in str(error.value)


def test_brief_is_one_short_line_without_paths() -> None:
    told = brief(
        RuntimeError("[ONNXRuntimeError] : 2 : INVALID : /onnx/core.cc:12 bad\n  index 99 in /srv/me/secret " + "x" * 999)
    )
    assert told.startswith("bad index 99 in x")
    assert len(told) == 300


# Which builds of onnxruntime are there: a fresh interpreter without the environment's packages, but for msgspec, sees only a
# folder that looks like what pip leaves behind.
COMPLETE = "InferenceSession = None\n"
BUILDS = {
    "none": ([], None, "ONNX Runtime is not installed"),
    "both": (["onnxruntime", "onnxruntime_gpu"], COMPLETE, "both onnxruntime and onnxruntime-gpu are installed"),
    "one of two uninstalled": (["onnxruntime_gpu"], "", "installed in part only"),
    "cpu": (["onnxruntime"], COMPLETE, None),
    "gpu": (["onnxruntime_gpu"], COMPLETE, None),
}


@pytest.mark.parametrize("builds", list(BUILDS))
def test_installed_builds(builds: str, tmp_path: Path) -> None:
    names, module, told = BUILDS[builds]
    for name in names:
        (tmp_path / f"{name}-1.31.1.dist-info").mkdir()
    if module is not None:
        (tmp_path / "onnxruntime").mkdir()
        if module:
            (tmp_path / "onnxruntime/__init__.py").write_text(module)
    (tmp_path / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    (tmp_path / "triform").symlink_to(Path(testing.__file__).parent)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import triform.runtime"
    child = subprocess.run(
        [sys.executable, "-S", "-E", "-B", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if told is None:
        assert child.returncode == 0, child.stderr
    else:
        last = child.stderr.splitlines()[-1]
        assert last.startswith("triform.errors.ConfigurationError: ")
        assert told in last
        assert "triform[cpu] or triform[gpu]" in last
