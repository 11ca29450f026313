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

from infra.layers import trim, wheels
from infra.layers.build import CACHE, LIMIT_BYTES, LOCK, PACKAGES, Wanted, build
from infra.layers.online import online_modules
from infra.layers.target import Target
from tests.infra.built import RUNNING, read_built
from triform.repository import ModelRepository

ROOT = Path(__file__).parent.parent.parent
SERVE = """
import json, sys
from pathlib import Path
from triform.http import HttpRequest, HttpSurface
from triform.predictor import Predictor
from triform.repository import open_repository, resolve
from triform.models import Models
from triform.service import InferenceService
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


def test_licences_stay_and_tests_go(layers: Path) -> None:
    site = layers / "runtime" / RUNNING.site_packages
    assert (site / "onnxruntime/LICENSE").is_file()
    assert list(site.glob("numpy-*.dist-info/licenses/*"))
    assert list(site.glob("onnxruntime-*.dist-info/METADATA"))
    assert not list(site.rglob("tests"))
    assert (site / "onnxruntime/capi/libonnxruntime_providers_shared.so").is_file()
    assert not trim.kept("onnxruntime/capi/libonnxruntime.so.1.31.1")
    assert trim.kept("numpy/linalg/_linalg.py")
