"""The layers as they are built: what is in them, that they suffice, and that they are the same twice."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.layers import cli, models, trim, wheels
from infra.layers.archive import Weight
from infra.layers.build import BUILT, CACHE, LIMIT_BYTES, LOCK, PACKAGES, Built, Wanted, build, check_limits, compile_all
from infra.layers.online import online_modules
from infra.layers.target import HERE, Target, find_interpreter
from triform import testing
from triform.errors import ConfigurationError, DigestMismatch, InvalidRequest, VersionNotFound
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog
from triform.repository import ModelRepository, open_repository, resolve

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelRepository:
    return tiny_repository(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory, source: ModelRepository) -> Path:
    """Built for the Python that runs here."""
    out = tmp_path_factory.mktemp("layers")
    build(Wanted(target=RUNNING, refs=("linear", "lookup"), each=True), out, source)
    return out


def read_built(layers: Path) -> Built:
    return msgspec.json.decode((layers / BUILT).read_bytes(), type=Built)


SERVE = """
import json, sys
from pathlib import Path
from triform.http import HttpRequest, HttpSurface
from triform.predictor import Predictor
from triform.repository import open_repository, resolve
from triform.service import InferenceService, Models
import aws_lambda_powertools, handlers

root = Path(sys.argv[1])
repository = open_repository(root)
models = Models(form="lambda")
for model, pinned in json.loads((root / "pinned.json").read_text())["models"].items():
    for alias, version in pinned["aliases"].items():
        package = repository.package(model, version)
        assert package.manifest.digest == pinned["digests"][str(version)]
        models.add(model, version, lambda package=package: Predictor.load(package, verification="sealed"), aliases=(alias,))
surface = HttpSurface(InferenceService(models))

def post(path, body):
    answer = surface.handle(HttpRequest("POST", path, body=json.dumps(body).encode()))
    return [answer.status, json.loads(answer.body)]

told = {
    "stable": post("/v1/models/linear:predict", {"instances": [[1, 1, 1]]}),
    "canary": post("/v1/models/linear/labels/canary:predict", {"instances": [[1, 1, 1]]}),
    "lookup": post("/v2/models/lookup/infer", {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [3]}]}),
    "resolved": [resolve(repository, ref) for ref in ("linear", "linear@canary", "lookup")],
    "files": sorted({m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)}),
    "cached": [m.__cached__ for m in sys.modules.values() if getattr(m, "__name__", "").startswith("triform.")],
}
print(json.dumps(told))
"""


def run_in_layers(layers: Path, code: str, *args: str, cwd: Path) -> Any:
    """What the code prints as JSON, in a Python that knows its own library and the layers' folders, nothing else."""
    folders = [layers / name / RUNNING.site_packages for name in ("runtime", "powertools", "core")]
    assert all(folder.is_dir() for folder in folders)
    environ = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_layers_alone_import_and_predict(layers: Path, tmp_path: Path) -> None:
    told = run_in_layers(layers, SERVE, str(layers / "models/models"), cwd=tmp_path)
    assert told["stable"] == [200, {"predictions": [[6.0]]}]
    assert told["canary"] == [200, {"predictions": [[9.0, 12.0]]}]
    assert told["lookup"][0] == 200
    assert told["lookup"][1]["outputs"][0]["data"] == [30.0]
    assert told["resolved"] == [["linear", 1], ["linear", 2], ["lookup", 1]]
    library = Path(os.__file__).parent
    strangers = [
        file for file in told["files"] if not Path(file).is_relative_to(layers) and not Path(file).is_relative_to(library)
    ]
    assert strangers == []
    assert not any("site-packages" in file for file in told["files"] if not file.startswith(str(layers)))
    assert told["cached"]
    assert all(Path(cached).is_file() for cached in told["cached"])


def test_the_runtime_layer_is_small_and_all_is_within_the_limit(layers: Path) -> None:
    """Small by 3.13's wheels: the numpy that 3.11 is locked to is 6 MB larger, and Lambda's 3.11 runs neither."""
    weights = read_built(layers).layers
    assert set(weights) == {"core", "powertools", "runtime", "models", "models-linear", "models-lookup"}
    unpacked = wheels.unpack(LOCK, PACKAGES["runtime"], Target(), CACHE)
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()]
    assert sum((unpacked / name).stat().st_size for name in names if trim.kept(name)) <= 71 << 20  # and bytecode: 3 MB
    assert sum(weight.unzipped for weight in weights.values()) < LIMIT_BYTES
    for name, weight in weights.items():
        files = [path for path in (layers / name).rglob("*") if path.is_file()]
        assert (len(files), sum(path.stat().st_size for path in files)) == (weight.files, weight.unzipped)


def test_the_same_twice(layers: Path, tmp_path: Path, source: ModelRepository) -> None:
    built = build(Wanted(target=RUNNING, refs=("linear", "lookup"), each=True), tmp_path / "again", source)
    assert built == read_built(layers)
    for name in built.layers:
        assert (tmp_path / "again" / f"{name}.zip").read_bytes() == (layers / f"{name}.zip").read_bytes()


def test_a_zip_holds_what_lambda_may_read(layers: Path) -> None:
    with zipfile.ZipFile(layers / "runtime.zip") as zipped:
        entries = zipped.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert all(entry.filename.startswith(RUNNING.site_packages) for entry in entries)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100755, 0o100644}
    assert all(entry.external_attr >> 16 == 0o100755 for entry in entries if entry.filename.endswith(".so"))


def test_bytecode_is_trusted_and_names_the_place_in_lambda(layers: Path) -> None:
    (compiled,) = (layers / "core" / RUNNING.site_packages / "triform/__pycache__").glob("service.*.pyc")
    content = compiled.read_bytes()
    assert struct.unpack("<I", content[4:8]) == (0b01,)  # PEP 552: by hash, not checked
    assert f"/opt/{RUNNING.site_packages}/triform/service.py".encode() in content
    assert str(layers).encode() not in content


def test_a_module_that_does_not_compile_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/broken.py").write_text("def broken(:\n")
    with pytest.raises(ConfigurationError, match=r"layer core: .*broken\.py"):
        compile_all(Path(sys.executable), tmp_path / "core")


def test_the_core_leaves_out_what_needs_more_than_the_layers_have(layers: Path) -> None:
    site = layers / "core" / RUNNING.site_packages
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if "__pycache__" not in path.parts}
    assert {
        "triform/http.py",
        "triform/service.py",
        "triform/stores/local.py",
        "handlers/__init__.py",
        "triform/py.typed",
    } <= there
    assert not {"triform/arrow.py", "triform/scoring.py", "triform/packaging.py", "triform/testing.py", "triform/cli"} & there


def test_the_core_has_every_function_but_that_of_the_image(layers: Path) -> None:
    site = layers / "core" / RUNNING.site_packages / "handlers"
    here = {path.name for path in (ROOT / "handlers").glob("[a-z]*.py")}
    built = {path.name for path in site.glob("[a-z]*.py")}
    assert here - built <= {"s3.py"}
    assert {name.removeprefix("handlers.") for name in read_built(layers).left_out} == {name[:-3] for name in here - built}


def test_modules_that_import_a_missing_one_go_with_it(tmp_path: Path) -> None:
    sources = {
        "triform/__init__.py": "",
        "triform/plain.py": "import json, numpy\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyarrow\n",
        "triform/lazy.py": "def load():\n    import pyarrow\n",
        "triform/heavy.py": "import pyarrow.parquet as pq\n",
        "triform/tried.py": "try:\n    import pandas\nexcept ImportError:\n    pass\n",
        "triform/after.py": "from triform.heavy import table\n",
        "triform/later.py": "from triform import after\n",
        "triform/box/__init__.py": "import onnx\n",
        "triform/box/inner.py": "",
        "handlers/__init__.py": "",
        "handlers/predict.py": "import boto3\nfrom triform.plain import number\n",
        "handlers/s3.py": "from triform import heavy, plain\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = online_modules(tmp_path, {"numpy"})
    assert set(kept) == {"triform", "triform.plain", "triform.lazy", "handlers", "handlers.predict"}


def test_pinned_says_what_is_served(layers: Path, source: ModelRepository) -> None:
    pinned = json.loads((layers / "models/models/pinned.json").read_text())
    digests = {
        model: {str(v): source.package(model, v).manifest.digest for v in source.versions(model)} for model in source.models()
    }
    assert pinned == {
        "models": {
            "linear": {"revision": 2, "aliases": {"stable": 1, "canary": 2}, "digests": digests["linear"]},
            "lookup": {"revision": 0, "aliases": {"stable": 1}, "digests": digests["lookup"]},
        },
        "format": 1,
    }
    alone = json.loads((layers / "models-lookup/models/pinned.json").read_text())
    assert alone["models"] == {"lookup": pinned["models"]["lookup"]}
    assert not (layers / "models-lookup/models/linear").exists()
    baked = open_repository(layers / "models/models")
    assert ReleaseLog(baked, "linear").current() == ReleaseLog(source, "linear").current()


@pytest.mark.parametrize(
    ("refs", "expected"),
    [
        (["linear@stable"], (2, {"stable": 1})),
        (["linear@canary"], (2, {"canary": 2})),
        (["linear@canary", "linear@stable"], (2, {"stable": 1, "canary": 2})),
        (["linear/2"], (0, {"stable": 2})),
        (["linear/2", "linear/2"], (0, {"stable": 2})),
    ],
)
def test_what_a_reference_takes(source: ModelRepository, refs: list[str], expected: Any) -> None:
    assert models.pin(source, refs) == {"linear": expected}


@pytest.mark.parametrize("refs", [["linear/1", "linear/2"], ["linear@stable", "linear/1"]])
def test_references_that_disagree_are_refused(source: ModelRepository, refs: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="disagrees with another reference to 'linear'"):
        models.pin(source, refs)


def test_part_of_a_release_is_not_passed_off_as_it(source: ModelRepository, tmp_path: Path) -> None:
    pinned = models.place(source, ["linear@stable"], tmp_path)
    assert pinned.models["linear"].revision == 2
    assert resolve(open_repository(tmp_path), "linear") == ("linear", 1)
    assert not (tmp_path / "linear/releases").exists()


def test_a_model_that_fails_full_verification_is_not_placed(tmp_path: Path) -> None:
    repository = testing.repository(tmp_path / "models", {"lookup": testing.lookup(tmp_path / "lookup.onnx")})
    model = repository.package("lookup", 1).folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestMismatch):
        models.place(repository, ["lookup"], tmp_path / "layer")
    assert not (tmp_path / "layer/pinned.json").exists()
    with pytest.raises(VersionNotFound):
        models.place(repository, ["lookup/9"], tmp_path / "layer")


def weight(megabytes: float, **heaviest: int) -> Weight:
    return Weight(1, int(megabytes * (1 << 20)), 1, "", heaviest)


def test_beyond_250_mb_the_error_names_what_is_big() -> None:
    weights = {"core": weight(1), "runtime": weight(75), "models": weight(175, **{"models/big/1/model.onnx": 170 << 20})}
    with pytest.raises(ConfigurationError) as raised:
        check_limits(weights)
    told = str(raised.value)
    assert "251.0 MB unzipped, Lambda takes 250.0 MB: models 175.0 MB, runtime 75.0 MB, core 1.0 MB" in told
    assert "models/big/1/model.onnx 170.0 MB" in told
    check_limits(weights | {"models": weight(174)})


def test_a_function_takes_one_layer_of_models() -> None:
    each = {f"models-{i}": weight(100) for i in range(8)}
    check_limits({"core": weight(1), "powertools": weight(5), "runtime": weight(75), **each})
    with pytest.raises(ConfigurationError, match="models-big 170"):
        check_limits({"core": weight(1), "powertools": weight(5), "runtime": weight(75), "models-big": weight(170)})


def test_beyond_five_layers_is_refused() -> None:
    weights = {name: weight(1) for name in ("core", "powertools", "runtime", "models")}
    check_limits(weights, other_layers=1)
    with pytest.raises(ConfigurationError, match=r"4 layers .* and 2 others: Lambda takes 5"):
        check_limits(weights, other_layers=2)


def test_code_of_the_users_travels_with_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(InvalidRequest, match=r"no __init__\.py"):
        build_core_only(tmp_path / "out", mine, monkeypatch)
    (mine / "__init__.py").write_text("")
    (mine / "words.json").write_text("[]")
    build_core_only(tmp_path / "out", mine, monkeypatch)
    assert (tmp_path / "out/core" / RUNNING.site_packages / "mine/words.json").is_file()
    clash = tmp_path / "triform"
    clash.mkdir()
    (clash / "__init__.py").write_text("")
    with pytest.raises(InvalidRequest, match="named triform is there already"):
        build_core_only(tmp_path / "out", clash, monkeypatch)


def test_the_functions_package_says_nothing_of_models(
    source: ModelRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is every function's, so what is in it makes new versions of all of them."""
    monkeypatch.setattr("infra.layers.build.PACKAGES", {"powertools": ("msgspec", "orjson")})
    built = {ref: build(Wanted(target=RUNNING, refs=(ref,)), tmp_path / ref, source) for ref in ("linear", "lookup")}
    assert built["linear"].layers["models"] != built["lookup"].layers["models"]
    assert (tmp_path / "linear/function.zip").read_bytes() == (tmp_path / "lookup/function.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "linear/function.zip") as zipped:
        assert json.loads(zipped.read("target.json")) == {"arch": RUNNING.arch, "python": RUNNING.python}
        assert zipped.namelist() == ["target.json"]
    assert read_built(tmp_path / "linear") == built["linear"]


def build_core_only(out: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the large wheels, which take seconds to pack."""
    monkeypatch.setattr("infra.layers.build.PACKAGES", {"powertools": ("msgspec", "orjson")})
    build(Wanted(target=RUNNING, code=(code,)), out)


def test_without_the_targets_python_there_is_no_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.layers.build.PACKAGES", {"powertools": ("msgspec", "orjson")})
    monkeypatch.setenv("PATH", str(tmp_path))
    target = Target(python="3.12" if HERE != "3.12" else "3.13")
    built = build(Wanted(target=target), tmp_path / "out")
    assert built.bytecode == (find_interpreter(target.python) is not None) == any((tmp_path / "out").rglob("*.pyc"))
    assert (tmp_path / "out/core" / target.site_packages / "triform/errors.py").is_file()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.onnx").write_text("")
    with pytest.raises(InvalidRequest, match="holds files that no build of layers made"):
        build(Wanted(target=RUNNING), tmp_path)
    assert (tmp_path / "models/mine.onnx").exists()


def test_what_the_lock_lacks_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"lambda\.txt does not lock nothing-such"):
        wheels.locked(LOCK, ["numpy", "nothing-such"])
    numpy = wheels.locked(LOCK, ["numpy"])
    assert numpy.count("numpy==") == numpy.count("python_full_version") == 2
    assert "onnxruntime" not in numpy


@pytest.mark.parametrize("target", [{"arch": "riscv64"}, {"python": "3.14"}, {"python": "3.10"}, {"python": "13"}])
def test_a_target_that_lambda_has_not_is_refused(target: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="expected one of"):
        Target(**target)


def test_a_python_is_found_by_its_version() -> None:
    found = find_interpreter(HERE)
    assert found
    assert found.is_file()
    assert find_interpreter("3.99") is None


def test_licences_stay_and_tests_go(layers: Path) -> None:
    site = layers / "runtime" / RUNNING.site_packages
    assert (site / "onnxruntime/LICENSE").is_file()
    assert list(site.glob("numpy-*.dist-info/licenses/*"))
    assert list(site.glob("onnxruntime-*.dist-info/METADATA"))
    assert not list(site.rglob("tests"))
    assert (site / "onnxruntime/capi/libonnxruntime_providers_shared.so").is_file()
    assert not trim.kept("onnxruntime/capi/libonnxruntime.so.1.31.1")
    assert trim.kept("numpy/linalg/_linalg.py")


def test_the_command_prints_sizes_and_says_what_lambda_would_not_run(
    layers: Path, capsys: pytest.CaptureFixture[str], source: ModelRepository
) -> None:
    from rich.console import Console

    built = msgspec.structs.replace(read_built(layers), bytecode=False, left_out=("handlers.s3",))
    cli.show(built, Wanted(target=Target(python="3.11"), refs=("linear",)), Console(width=150))
    told = capsys.readouterr().out
    for part in (
        "runtime",
        "together",
        "linear: stable 1, canary 2 (release 2)",
        "lookup: stable 1 (no release)",
        "handlers.s3 is not in core",
    ):
        assert part in told
    assert f"No bytecode: there is no python{HERE} on this machine" in told
    assert "Lambda's python3.11 has glibc 2.26" in told


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.layers", "build", *args], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--arch", "sparc"], "arch: 'sparc'"),
        (["--model", "x"], "no model repository"),
        (["--model", "no model", "--repository", "."], "not a model reference"),
    ],
)
def test_wrong_use_is_one_line_and_2(tmp_path: Path, args: list[str], told: str) -> None:
    done = command(*args, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "machine"), [("x86_64", 62), ("arm64", 183)])
@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_another_machine_and_python(tmp_path: Path, arch: str, machine: int, python: str, source: ModelRepository) -> None:
    done = command(
        "--arch", arch, "--python", python, "--model", "linear", "--repository", source.location, "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    built = read_built(tmp_path)
    assert built.layers["runtime"].unzipped <= 75 << 20
    site = tmp_path / "runtime" / Target(arch, python).site_packages
    libraries = list(site.rglob("*.so"))
    assert len(libraries) > 10
    for library in libraries:
        assert struct.unpack_from("<H", library.read_bytes(), 18) == (machine,)  # e_machine
    pythons = {path.name.split(".")[1].split("-")[1] for path in site.rglob("*.cpython-*.so")}
    assert pythons == {python.replace(".", "")}
    assert built.bytecode == any(tmp_path.rglob("*.pyc"))
