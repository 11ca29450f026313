"""ONNX Runtime, set up for the machine that the process really has.

    RuntimeOptions + package -> open_session(path) -> onnxruntime.InferenceSession, its nodes checked against the providers

The thread count is the package's, because a row's last bits may depend on it; the CPUs a process may use (affinity, cgroup
quota) only cap it. Providers fail closed: a required one that does not run every node refuses the start.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from triform.errors import ConfigurationError, PackageError, ProviderUnavailable

log = logging.getLogger(__name__)


def _import_onnxruntime() -> Any:
    """onnxruntime, or an error naming what to install: the CPU and GPU builds overwrite one another's files."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError(f"ONNX Runtime is not installed ({error}): install triform[cpu] or triform[gpu]") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what is left when one of two builds was uninstalled
        raise ConfigurationError(
            "ONNX Runtime is installed in part only: uninstall onnxruntime and onnxruntime-gpu, then install exactly one of "
            "triform[cpu] or triform[gpu]"
        )
    site = Path(onnxruntime.__file__).parent.parent
    builds = {n.split("-")[0] for n in os.listdir(site) if n.startswith("onnxruntime") and n.endswith(".dist-info")}
    if {"onnxruntime", "onnxruntime_gpu"} <= builds:
        raise ConfigurationError(
            "both onnxruntime and onnxruntime-gpu are installed and overwrite each other: uninstall both, then install "
            "exactly one of triform[cpu] or triform[gpu]"
        )
    return onnxruntime


ort: Final = _import_onnxruntime()

PROVIDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class RuntimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model here. `threads` None: the package's. Sizes in bytes."""

    provider: str = "cpu"  # cpu, cuda, tensorrt, or auto (the best of those that this build and machine have)
    required_providers: tuple[str, ...] = ()  # each node must run on one of these, or the session is refused
    threads: int | None = None
    gpu_mem_limit: int | None = None
    device_id: int = 0
    engine_cache: str | None = None  # the folder for TensorRT's engines; None: built at each start
    provider_options: Mapping[str, Mapping[str, str]] = {}  # of cuda and tensorrt, in ONNX Runtime's words; they count most

    def __post_init__(self) -> None:
        if self.provider not in (*PROVIDERS, "auto"):
            raise ConfigurationError(f"provider: expected cpu, cuda, tensorrt or auto, got '{self.provider}'")
        if self.threads is not None and self.threads < 1:
            raise ConfigurationError(f"threads: expected a positive number, got {self.threads}")
        if self.gpu_mem_limit is not None and self.gpu_mem_limit < 1:
            raise ConfigurationError(f"gpu_mem_limit: expected a positive number of bytes, got {self.gpu_mem_limit}")
        if unknown := self.provider_options.keys() - {"cuda", "tensorrt"}:
            raise ConfigurationError(f"provider_options: expected those of cuda and tensorrt, got '{min(unknown)}'")


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPUs this process may really use: its affinity mask, capped by the cgroup's quota (v2, then v1); at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup)
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def _cgroup_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time the cgroup grants, or None where it grants all (kernel docs: cgroup-v2 `cpu.max`, v1 CFS)."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else float(quota) / float(period)
    except (OSError, ValueError):
        return None


def thread_count(options: RuntimeOptions, packaged: int) -> int:
    """The threads a session gets: explicit, else the package's; never more than the CPUs there are (and then it says so)."""
    wanted = options.threads or packaged
    have = available_cpus()
    if wanted > have:
        log.warning("threads: %d wanted, but this process has %d CPU(s); running with %d", wanted, have, have)
    return min(wanted, have)


def candidates(options: RuntimeOptions) -> list[tuple[str, ...]]:
    """The provider lists to try, best first. Raises `ProviderUnavailable` where this build lacks what was asked for."""
    available = ort.get_available_providers()
    lacking = [p for p in options.required_providers if p not in available]
    if lacking:
        raise ProviderUnavailable(f"required_providers: {', '.join(lacking)} not in this ONNX Runtime build")
    names = ("tensorrt", "cuda", "cpu") if options.provider == "auto" else (options.provider,)
    chosen = [PROVIDERS[n] for n in names if PROVIDERS[n][0] in available]
    if not chosen:
        raise ProviderUnavailable(
            f"provider: {PROVIDERS[options.provider][0]} is not in this ONNX Runtime build (it has {', '.join(available)}): "
            "install triform[gpu] on a machine with an NVIDIA driver, or use provider = cpu"
        )
    return [tuple(p for p in c if p in available) for c in chosen]


def provider_options(provider: str, options: RuntimeOptions) -> dict[str, str]:
    """What the execution provider is told.

    The memory limit is that of a session's arena in CUDA, and of the scratch space of an engine in TensorRT, whose weights come
    on top. A session on TensorRT has both providers: what TensorRT does not take runs on CUDA.
    """
    if provider == "CPUExecutionProvider":
        return {}
    name = "cuda" if provider == "CUDAExecutionProvider" else "tensorrt"
    settings = {"device_id": str(options.device_id)}
    if options.gpu_mem_limit is not None and name == "cuda":
        settings["gpu_mem_limit"] = str(options.gpu_mem_limit)
        settings["arena_extend_strategy"] = "kSameAsRequested"  # the default doubles, and would overshoot the limit
    if options.gpu_mem_limit is not None and name == "tensorrt":
        settings["trt_max_workspace_size"] = str(options.gpu_mem_limit)
    return settings | dict(options.provider_options.get(name, {}))


def open_session(model: Path, options: RuntimeOptions, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` for the model file (from its path: bytes would break external data).

    `auto` takes the first provider that starts; a named one starts or raises `ProviderUnavailable`.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # what it would log is in the exception
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads sleep: neighbours need the CPU
    if options.required_providers:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    refused = "see ONNX Runtime's log for the library it lacks"
    for providers in candidates(options):
        if providers[0] != "CPUExecutionProvider":
            ort.preload_dlls()  # CUDA from NVIDIA's wheels, where they are installed
        chosen = [(p, provider_options(p, options)) for p in providers]
        try:  # no fallback: a session on a GPU would go on, on the CPU, after the first error there
            session = ort.InferenceSession(str(model), settings, providers=chosen, enable_fallback=0)
        except (RuntimeError, ValueError) as error:  # what a provider raises that cannot start, or knows no such option
            refused = brief(error)
            continue
        except Exception as error:  # the binding raises a dozen unrelated classes; all mean "does not load"
            raise PackageError(f"ONNX Runtime cannot load {model.name}: {brief(error)}") from error
        if providers[0] in session.get_providers():  # ONNX Runtime drops, with a log line, a provider whose libraries it lacks
            check_assignment(session, options.required_providers)
            return session
    raise ProviderUnavailable(f"provider: {options.provider} did not start on this machine: {refused}")


def check_assignment(session: Any, required: Sequence[str]) -> None:
    """Raises `ProviderUnavailable` if any node runs elsewhere: `get_providers()` hides single nodes that fell back."""
    if not required:
        return
    elsewhere: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        if subgraph.ep_name not in required:
            elsewhere.update(f"{node.op_type} on {subgraph.ep_name}" for node in subgraph.get_nodes())
    if elsewhere:
        worst = ", ".join(f"{n} x {what}" for what, n in elsewhere.most_common(5))
        raise ProviderUnavailable(
            f"required_providers: {sum(elsewhere.values())} node(s) run outside {', '.join(required)}: {worst}"
        )


_NOISE: Final = r"\[ONNXRuntimeError\] : \d+ : \w+ : |\S*/\S+|\S+\.(cc|h):\d+"


def brief(error: BaseException, limit: int = 300) -> str:
    """An ONNX Runtime message on one line, without its source locations and file paths: fit for a client."""
    text = " ".join(re.sub(_NOISE, "", str(error)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
