"""The build of layers: its limits, its targets, users' code, the command."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest

from infra.layers import cli, wheels
from infra.layers.archive import Weight
from infra.layers.build import LOCK, Wanted, build, check_limits, compile_all
from infra.layers.target import HERE, Target, find_interpreter
from tests.infra.built import RUNNING, read_built
from triform.errors import ConfigurationError, InvalidRequest
from triform.repository import ModelRepository

ROOT = Path(__file__).parent.parent.parent


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


def test_a_module_that_does_not_compile_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/broken.py").write_text("def broken(:\n")
    with pytest.raises(ConfigurationError, match=r"layer core: .*broken\.py"):
        compile_all(Path(sys.executable), tmp_path / "core")


def build_core_only(out: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the large wheels, which take seconds to pack."""
    monkeypatch.setattr("infra.layers.build.PACKAGES", {"powertools": ("msgspec", "orjson")})
    build(Wanted(target=RUNNING, code=(code,)), out)


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
