"""Builds the layers into a folder of their own.

<out>/runtime/, powertools/, core/, models/, models-<name>/     what Lambda unpacks into /opt
<out>/<layer>.zip                                               what is deployed
<out>/built.json                                                what went in
<out>/function.zip                                              the functions' own package, written last: the target alone, so
                                                                that a model's release leaves the functions without it as they are
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from infra.layers import models, online, trim, wheels
from infra.layers.archive import Weight, archive
from infra.layers.target import Target, find_interpreter
from triform.errors import ConfigurationError, InvalidRequest
from triform.repository import ModelRepository

ROOT: Final = Path(__file__).parent.parent.parent
LOCK: Final = ROOT / "requirements/lambda.txt"
CACHE: Final = ROOT / "build/wheels"
BUILT: Final = "built.json"
MARK: Final = ".triform-layers"  # what lies in a folder with this file is ours to remove
PACKAGES: Final = {
    "runtime": ("onnxruntime", "numpy", "msgspec", "orjson"),
    "powertools": ("aws-lambda-powertools", "jmespath", "typing-extensions"),
}
LIMIT_BYTES: Final = (
    250 << 20
)  # https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html: all layers and the function, unzipped
LIMIT_LAYERS: Final = 5
COMPILE_SECONDS: Final = 600.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`each`: a layer for each model too, for functions of one model; `code`: packages of the user's, such as processors;
    `other_layers`: layers of other makers that the functions have beside these."""

    target: Target = Target()
    refs: tuple[str, ...] = ()
    each: bool = False
    code: tuple[Path, ...] = ()
    other_layers: int = 0


class Built(msgspec.Struct, frozen=True):
    """What `built.json` says; `bytecode`: whether the modules were compiled; `left_out`: handlers that need more than the layers
    have."""

    arch: str
    python: str
    bytecode: bool
    layers: dict[str, Weight]
    models: dict[str, models.PinnedModel]
    left_out: tuple[str, ...] = ()


def build(wanted: Wanted, out: Path, repository: ModelRepository | None = None, *, cache: Path = CACHE) -> Built:
    """Builds all layers. Raises `ConfigurationError` beyond Lambda's limits, `InvalidRequest` for an `out` that holds something
    else, and what resolving, verifying and fetching raise; then there is no `function.zip`."""
    if wanted.refs and repository is None:
        raise ConfigurationError("repository: models are named, but no repository: give --repository, or set TRIFORM_REPOSITORY")
    _clear(out)
    packages = {name: _place_wheels(name, wanted.target, out, cache) for name in PACKAGES}
    left_out = _place_core(wanted, out, {name for found in packages.values() for name in found})
    pinned = _place_models(wanted, out, repository) if repository else models.Pinned({})
    interpreter = find_interpreter(wanted.target.python)
    layers = sorted(folder for folder in out.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if interpreter:
        for folder in layers:
            compile_all(interpreter, folder)
    weights = {folder.name: archive(folder, out / f"{folder.name}.zip") for folder in layers}
    check_limits(weights, other_layers=wanted.other_layers)
    built = Built(wanted.target.arch, wanted.target.python, interpreter is not None, weights, pinned.models, left_out)
    (out / BUILT).write_bytes(msgspec.json.format(msgspec.json.encode(built), indent=2) + b"\n")
    target = {"arch": built.arch, "python": built.python}
    (_made(out / "function") / "target.json").write_bytes(msgspec.json.encode(target) + b"\n")
    archive(out / "function", out / "function.zip")
    return built


def _clear(out: Path) -> None:
    """Removes what an earlier build left; refuses a folder with anything else in it."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARK).is_file():
        raise InvalidRequest(f"out: {out} holds files that no build of layers made: name an empty folder")
    (out / MARK).touch()
    for path in out.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            shutil.rmtree(path)
        elif path.suffix in (".zip", ".tmp") or path.name == BUILT:
            path.unlink()


def _place_wheels(layer: str, target: Target, out: Path, cache: Path) -> set[str]:
    """The packages of a layer, trimmed; the names that they are imported by."""
    source = wheels.unpack(LOCK, PACKAGES[layer], target, cache)
    placed = out / layer / target.site_packages
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and trim.kept(name):
            _copy(path, placed / name)
    return {path.name.partition(".")[0] for path in placed.iterdir() if not path.name.endswith((".dist-info", ".libs"))}


def _place_core(wanted: Wanted, out: Path, shipped: Collection[str]) -> tuple[str, ...]:
    """The handlers that are left out."""
    placed = out / "core" / wanted.target.site_packages
    modules = online.online_modules(ROOT, shipped)
    for path in [*modules.values(), *_data_beside(modules)]:
        _copy(path, placed / path.relative_to(ROOT))
    for package in wanted.code:
        if not (package / "__init__.py").is_file():
            raise InvalidRequest(f"code: {package} is no Python package: it has no __init__.py")
        if (placed / package.name).exists():
            raise InvalidRequest(f"code: a package named {package.name} is there already")
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                _copy(path, placed / package.name / path.relative_to(package))
    handlers = (f"handlers.{path.stem}" for path in sorted((ROOT / "handlers").glob("[a-z]*.py")))
    return tuple(name for name in handlers if name not in modules)


def _data_beside(modules: Mapping[str, Path]) -> Iterator[Path]:
    """Files that are no modules, in the packages' folders."""
    folders = {path.parent for path in modules.values()}
    return (path for folder in sorted(folders) for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".py")


def _place_models(wanted: Wanted, out: Path, repository: ModelRepository) -> models.Pinned:
    pinned = models.place(repository, wanted.refs, _made(out / "models/models"))
    for model, alone in pinned.models.items() if wanted.each else ():
        folder = _made(out / f"models-{model}/models")
        shutil.copytree(out / "models/models" / model, folder / model)
        models.write(models.Pinned({model: alone}), folder)
    return pinned


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def compile_all(interpreter: Path, folder: Path) -> None:
    """Compiles every module of a layer, as Lambda will see its path.

    The bytecode is trusted without a look at its source: Lambda's folders are read-only, and a zip's times are no one's. Strings
    hash alike in every run, so that sets are written in one order. Raises `ConfigurationError` where one does not compile.
    """
    options: list[str | Path] = ["--invalidation-mode", "unchecked-hash", "-s", folder, "-p", "/opt"]
    command: list[str | Path] = [interpreter, "-m", "compileall", "-q", *options, folder]
    environ = {"PYTHONHASHSEED": "0", "PATH": os.environ.get("PATH", "")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False, env=environ)
    if done.returncode:
        raise ConfigurationError(f"layer {folder.name}: {(done.stdout + done.stderr).strip()[-1000:]}")


def check_limits(weights: Mapping[str, Weight], *, other_layers: int = 0) -> None:
    """Raises `ConfigurationError` where a function with these layers would be refused, and names what is big.

    A function takes `models` or one `models-<name>`, never both.
    """
    of_models = [name for name in weights if name.startswith("models")]
    base = [name for name in weights if name not in of_models]
    for chosen in [[name] for name in of_models] or [[]]:
        _check_function(base + chosen, weights, other_layers)


def _check_function(layers: Sequence[str], weights: Mapping[str, Weight], other_layers: int) -> None:
    if len(layers) + other_layers > LIMIT_LAYERS:
        raise ConfigurationError(
            f"{len(layers)} layers ({', '.join(layers)}) and {other_layers} others: Lambda takes {LIMIT_LAYERS}. "
            "Put the others' content into --code, or deploy the image (infra/lambda/Dockerfile)"
        )
    total = sum(weights[name].unzipped for name in layers)
    if total > LIMIT_BYTES:
        heavy = sorted(layers, key=lambda name: -weights[name].unzipped)
        told = ", ".join(f"{name} {megabytes(weights[name].unzipped)}" for name in heavy)
        files = ", ".join(f"{name} {megabytes(size)}" for name, size in weights[heavy[0]].heaviest.items())
        raise ConfigurationError(
            f"the layers have {megabytes(total)} unzipped, Lambda takes {megabytes(LIMIT_BYTES)}: {told}. "
            f"The largest files of {heavy[0]}: {files}. Models that fit no layer go into the image (infra/lambda/Dockerfile)"
        )


def megabytes(size: int) -> str:
    """In Lambda's MB, of 1,048,576 bytes."""
    return f"{size / (1 << 20):.1f} MB"
