"""What NVIDIA's execution providers have to be told of a model: shapes to build TensorRT's engines for, and where to keep them.

    RuntimeOptions + manifest -> for_model -> RuntimeOptions -> open_session        building: one process of a node at a time

Sources: ONNX Runtime, "TensorRT Execution Provider" and "CUDA Execution Provider". Of several optimization profiles TensorRT's
provider uses the first alone (microsoft/onnxruntime#31624), so that there is one, over all of `pad_to`.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from triform.errors import ConfigurationError
from triform.package import Manifest
from triform.runtime import RuntimeOptions, ort

log = logging.getLogger(__name__)

ENGINES: Final = ("tensorrt", "auto")  # providers that may build engines


def for_model(options: RuntimeOptions, manifest: Manifest) -> RuntimeOptions:
    """The options with this model's own in `provider_options["tensorrt"]`; what stands there already counts more."""
    if options.provider not in ENGINES:
        return options
    given = options.provider_options.get("tensorrt", {})
    own = {**profile(manifest), **_cache(engine_folder(options, manifest)), **given}
    if options.provider == "tensorrt" and "trt_profile_opt_shapes" not in own:
        log.warning("%s: without pad_to TensorRT builds its engines anew while requests wait for them", manifest.ref)
    return msgspec.structs.replace(options, provider_options={**options.provider_options, "tensorrt": own})


def profile(manifest: Manifest) -> dict[str, str]:
    """The optimization profile: from the smallest shape of `pad_to` to the largest, and best at that, which busy hosts run.

    Empty without `pad_to`, and where a row's own shape is free: TensorRT then goes by the shapes that it sees.
    """
    sizes = manifest.config.batching.pad_to
    rows = {tensor.name: tensor.row_shape for tensor in manifest.signature.inputs}
    if not sizes or any(not isinstance(dim, int) or dim < 0 for shape in rows.values() for dim in shape):
        return {}

    def shapes(size: int) -> str:
        return ",".join(f"{name}:{_dims(manifest, name, shape, size)}" for name, shape in rows.items())

    smallest, largest = shapes(sizes[0]), shapes(sizes[-1])
    return {"trt_profile_min_shapes": smallest, "trt_profile_opt_shapes": largest, "trt_profile_max_shapes": largest}


def _dims(manifest: Manifest, name: str, row_shape: tuple[int | str, ...], size: int) -> str:
    """A tensor's shape as the graph has it, with its rows on the batch axis."""
    axis = manifest.config.input(name).batch_axis
    return "x".join(map(str, [*row_shape[:axis], size, *row_shape[axis:]]))


def engine_folder(options: RuntimeOptions, manifest: Manifest) -> Path | None:
    """Where the engines of this very package and this ONNX Runtime are: the provider itself tells neither from others'."""
    if options.engine_cache is None or options.provider not in ENGINES:
        return None
    return Path(options.engine_cache) / f"{manifest.name}-{manifest.version}-{manifest.digest[:16]}-ort{ort.__version__}"


def _cache(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    at = str(folder)
    engines = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": at}
    return {**engines, "trt_timing_cache_enable": "1", "trt_timing_cache_path": at}


@contextmanager
def building(folder: Path | None) -> Iterator[None]:
    """Holds the folder's lock: of the processes that would build the same engines, for minutes, one does and the others read.

    The lock ends with its holder, however that ends. Raises `ConfigurationError` where the folder cannot be written.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"engine_cache: {folder.parent} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
