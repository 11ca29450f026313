"""Reading and verifying a package: each level notices what it promises to, and nothing altered is served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from triform import golden, testing
from triform.errors import DigestMismatch, GoldenMismatch, ModelCrashed, PackageError, UnsafePackage
from triform.package import FileEntry, Manifest, ModelPackage, RowIndependence
from triform.predictor import Predictor

Level = Literal["sealed", "golden", "full"]
LEVELS: tuple[Level, ...] = ("sealed", "golden", "full")
Reseal = Callable[..., None]


def refused_by(folder: Path, error: type[Exception], match: str = "") -> set[str]:
    """The levels at which the package is not served; each must say the same."""
    told: dict[str, str] = {}
    for level in LEVELS:
        try:
            Predictor.load(ModelPackage.open(folder), verification=level)
        except error as raised:
            told[level] = str(raised)
    assert all(match in message for message in told.values())
    assert not any(str(folder) in message for message in told.values())  # a client may see it
    return set(told)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_sound_package_is_served_at_every_level(folder: Path) -> None:
    assert refused_by(folder, PackageError) == set()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_cut_file_is_noticed_by_its_size(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert refused_by(folder, DigestMismatch, f"linear/1: {name} has ") == set(LEVELS)


def test_an_altered_file_is_noticed_by_its_digest(folder: Path) -> None:
    producer = b"triform.testing"
    content = (folder / "model.onnx").read_bytes()
    assert producer in content  # a place where a change alters nothing that the model computes
    (folder / "model.onnx").write_bytes(content.replace(producer, b"TRIFORM.testing"))
    assert refused_by(folder, DigestMismatch, "its sha256 differs") == {"golden", "full"}


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    assert refused_by(folder, PackageError, "model.onnx") == set(LEVELS)


def test_an_altered_manifest_is_noticed(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fp32"', '"fp64"'))
    assert refused_by(folder, DigestMismatch, "manifest.json of linear/1 was altered") == set(LEVELS)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": 2}', b"[" * 100_000, b"null", b" " * (17 << 20)],
    ids=["empty", "cut", "list", "bare", "not UTF-8", "another format", "deep", "null", "too large"],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"manifest\.json"):
        ModelPackage.open(folder)


@pytest.mark.parametrize("where", ["nothing", "file"])
def test_no_package_here(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="no package here"):
        ModelPackage.open(tmp_path / where)


@pytest.mark.parametrize("name", ["weights.bin", ".hidden", "deep/er/file", "model.py"])
def test_a_strangers_file_is_noticed_in_full(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("surprise")
    assert refused_by(folder, UnsafePackage, name) == {"full"}


def test_a_strangers_link_to_a_folder_is_noticed_in_full(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path)
    assert refused_by(folder, UnsafePackage, "more") == {"full"}


def as_symbolic_link(file: Path) -> None:
    file.symlink_to(file.parent / "elsewhere")


def as_hard_link(file: Path) -> None:
    os.link(file.parent / "elsewhere", file)


@pytest.mark.parametrize("link", [as_symbolic_link, as_hard_link])
def test_a_link_in_a_files_place_is_refused_at_every_level(folder: Path, link: Callable[[Path], None]) -> None:
    """What a link leads to can change after it was verified."""
    (folder / "model.onnx").rename(folder / "elsewhere")
    link(folder / "model.onnx")
    assert refused_by(folder, UnsafePackage, "linear/1: model.onnx is a link") == set(LEVELS)


UNSAFE = ["../secret", "/etc/passwd", "a/../../secret", "", ".", "a//b", "a\0b", ".hidden", "x" * 300, "a\n"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_in_a_sealed_manifest_are_refused(folder: Path, reseal: Reseal, name: str) -> None:
    manifest = ModelPackage.open(folder).manifest
    reseal(folder, files={**manifest.files, name: FileEntry("0" * 64, 5)})
    assert refused_by(folder, UnsafePackage, "unsafe name") == set(LEVELS)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_manifest_must_list_model_and_golden_rows(folder: Path, reseal: Reseal, name: str) -> None:
    files = dict(ModelPackage.open(folder).manifest.files)
    del files[name]
    reseal(folder, files=files)
    assert refused_by(folder, PackageError, f"lists no {name}") == set(LEVELS)


def test_a_model_that_answers_otherwise_is_not_served_even_if_sealed_anew(folder: Path, reseal: Reseal) -> None:
    flip_sign(folder / "model.onnx")
    reseal(folder)
    assert refused_by(folder, GoldenMismatch, "output 'y': differs from the recorded answer by up to") == set(LEVELS)


def flip_sign(model: Path) -> None:
    content = model.read_bytes()
    weights = np.array([1, 2, 3], np.float32)
    assert weights.tobytes() in content
    model.write_bytes(content.replace(weights.tobytes(), (-weights).tobytes()))


def test_a_model_with_another_input_than_the_manifest_says_is_not_served(folder: Path, reseal: Reseal) -> None:
    testing.identity(folder / "model.onnx", "FP32", shape=["N", 7])
    reseal(folder)
    assert refused_by(folder, PackageError) == set(LEVELS)


def test_golden_rows_that_do_not_fit_the_signature_are_the_package_s_fault(folder: Path, reseal: Reseal) -> None:
    recorded = ModelPackage.open(folder).golden()
    golden.write(folder / "golden.npz", golden.Golden({"z": recorded.inputs["x"]}, recorded.outputs))
    reseal(folder)
    assert refused_by(folder, PackageError, "the golden samples do not run") == set(LEVELS)


def test_a_model_file_that_does_not_load_is_not_served(folder: Path, reseal: Reseal) -> None:
    (folder / "model.onnx").write_bytes(b"garbage")
    reseal(folder)
    assert refused_by(folder, PackageError, "cannot load model.onnx") == set(LEVELS)


def test_full_verification_has_run_the_model_elsewhere_first(folder: Path, reseal: Reseal, monkeypatch: Any) -> None:
    """A child process that cannot start is a model that cannot be verified in full, though it runs here."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert refused_by(folder, ModelCrashed, "exit code 1") == {"full"}


def test_a_broken_package_does_not_keep_the_next_one_from_being_served(three_versions: Path) -> None:
    flip_a_byte(three_versions / "linear/2/model.onnx")
    assert refused_by(three_versions / "linear/2", PackageError) >= {"golden", "full"}
    assert refused_by(three_versions / "linear/3", PackageError) == set()


def test_an_untried_thread_count_makes_exact_no_more_than_close(folder: Path) -> None:
    seen = ModelPackage.open(folder).manifest.row_independence
    assert isinstance(seen, RowIndependence)
    assert (seen.at(1), seen.at(64)) == ("exact", "close")


def test_the_digest_covers_everything_but_itself(folder: Path) -> None:
    manifest = ModelPackage.open(folder).manifest
    assert manifest.sealed() == manifest
    assert Manifest.sealed(manifest).digest == manifest.digest
    changed = msgspec.structs.replace(manifest, evaluation={"auc": 1.0})
    assert changed.sealed().digest != manifest.digest
