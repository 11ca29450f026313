"""A model package: reading and verifying one. `packaging.py` builds them.

    <repository>/<model>/<version>/{manifest.json, model.onnx, model.toml, golden.npz, baseline.json, external data}

    ModelPackage.open(folder) -> .verify(level) -> Predictor.load(package)

The manifest lists every file with its sha256 and size, and carries a digest of itself: the package digest names exactly one
model. Verification has three levels; each includes the golden run that `Predictor.load` makes as its warm-up.

    sealed   file sizes                      a Lambda layer or image, verified in full when it was built
    golden   sha256 of every file            a replica's or an actor's start
    full     golden + no stranger's files, and the golden run first in a child process (`golden.verify_in_child`)
"""

from __future__ import annotations

import os
import re
import stat
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Final, Literal

import msgspec

from triform import golden
from triform.config import ModelConfig
from triform.errors import DigestMismatch, PackageError, UnsafePackage
from triform.golden import Tolerance
from triform.signature import Signature

Verification = Literal["sealed", "golden", "full"]
Independence = Literal["exact", "close", "dependent"]

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
CONFIG: Final = "model.toml"
GOLDEN: Final = "golden.npz"
BASELINE: Final = "baseline.json"
MAX_MANIFEST_BYTES: Final = 16 << 20
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:-]{0,199}")  # one part of a file's path within a package
RESERVED: Final = frozenset({MANIFEST, MODEL, CONFIG, GOLDEN, BASELINE})


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size: int  # bytes


class Deviation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a row's answer moved with the company it kept, at one thread count."""

    threads: int
    kind: Independence
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int = 0  # informative


class RowIndependence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kind` holds at the package's thread count; `by_threads` has every count that was tried."""

    kind: Independence
    tolerance: Tolerance
    by_threads: tuple[Deviation, ...]
    reasons: tuple[str, ...] = ()
    provider: str = "CPUExecutionProvider"
    instruction_set: str = ""

    def at(self, threads: int) -> Independence:
        """The kind at a thread count; one that was never tried makes `exact` no more than `close`.

        A `dependent` model is so at every count: the graph may say it where the samples did not show it.
        """
        if self.kind == "dependent":
            return "dependent"
        for seen in self.by_threads:
            if seen.threads == threads:
                return seen.kind
        return "close" if self.kind == "exact" else self.kind


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):  # dict: for `ref`
    format: Literal[1] = 1
    name: str
    version: int
    signature: Signature
    config: ModelConfig
    opset: dict[str, int]
    producer: str
    onnxruntime: str  # the version that the golden samples and row independence were recorded with
    precision: str
    row_independence: RowIndependence
    tolerances: dict[str, dict[str, Tolerance]]  # provider -> numpy dtype name -> tolerance
    evaluation: dict[str, float]
    files: dict[str, FileEntry]
    digest: str = ""

    @cached_property
    def ref(self) -> str:
        return f"{self.name}/{self.version}"

    def sealed(self) -> Manifest:
        """The same manifest with its digest: sha256 over its canonical JSON without the digest."""
        canonical = msgspec.json.encode(msgspec.structs.replace(self, digest=""), order="sorted")
        return msgspec.structs.replace(self, digest=_sha256(canonical))


def _sha256(content: bytes) -> str:
    """In hexadecimal, by Python's own function where it has one: hashlib loads OpenSSL, which takes 3 ms of a cold start."""
    try:
        own = import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256")
    except ImportError:
        own = import_module("hashlib")
    digest: str = own.sha256(content).hexdigest()
    return digest


class Names(msgspec.Struct, frozen=True):
    """What every format of a manifest has, so that one of a later Triform is understood this far."""

    digest: str
    files: dict[str, FileEntry]


def named_in(manifest: bytes) -> Names | None:
    """The digest and the files that a manifest names, of whatever format; None where it cannot be read."""
    try:
        return msgspec.json.decode(manifest, type=Names)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class ModelPackage(msgspec.Struct, frozen=True):
    """A package on local disk."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> ModelPackage:
        """Reads the manifest. Raises `PackageError` for one that is missing, malformed or altered."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise PackageError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES >> 20} MB")
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except OSError as error:
            raise PackageError(f"no package here: {MANIFEST} cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PackageError(f"{MANIFEST} is not a manifest of this version of Triform: {error}") from error
        if manifest.sealed().digest != manifest.digest:
            raise DigestMismatch(f"{MANIFEST} of {manifest.ref} was altered: its content does not match its digest")
        return cls(folder, manifest)

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    def golden(self) -> golden.Golden:
        return golden.read(self.folder / GOLDEN)

    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())

    def verify(self, level: Verification) -> None:
        """Checks the files at the given level (see the module). Raises `UnsafePackage`, `DigestMismatch` or, at `full`,
        whatever the golden run in the child process raised."""
        files = self.manifest.files
        if missing := {MODEL, GOLDEN} - files.keys():
            raise PackageError(f"{MANIFEST} of {self.manifest.ref} lists no {', '.join(sorted(missing))}")
        for name, entry in files.items():
            self._check_file(name, entry, read=level != "sealed")
        if level == "full":
            if strangers := sorted(_files_below(self.folder) - files.keys() - {MANIFEST}):
                raise UnsafePackage(
                    f"{self.manifest.ref} holds files that its manifest does not list: {', '.join(strangers[:5])}"
                )
            golden.verify_in_child(self.folder, memory_bytes=max(8 << 30, 4 * self.size()))

    def _check_file(self, name: str, entry: FileEntry, *, read: bool) -> None:
        if not all(FILE.fullmatch(part) for part in name.split("/")):
            raise UnsafePackage(f"{self.manifest.ref} lists a file with an unsafe name: {name[:100]!r}")
        path, ref = self.folder / name, self.manifest.ref
        check_no_links(self.folder, path, f"{ref}: {name}")
        if path.stat().st_size != entry.size:
            raise DigestMismatch(f"{ref}: {name} has {path.stat().st_size} bytes, the manifest says {entry.size}")
        if read and file_entry(path).sha256 != entry.sha256:
            raise DigestMismatch(f"{ref}: {name} is not the file that was packaged (its sha256 differs)")


def check_no_links(folder: Path, path: Path, what: str) -> None:
    """Raises `UnsafePackage` unless `path` is a plain file with one name, reached from `folder` without a symbolic link."""
    for part in [path, *path.parents]:
        if part == folder:
            break
        try:
            found = part.lstat()
        except OSError as error:
            raise PackageError(f"{what} cannot be read ({error.strerror})") from error
        if stat.S_ISLNK(found.st_mode) or (part == path and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1)):
            raise UnsafePackage(f"{what} is a link or no plain file; a package holds its own copies")


def file_entry(path: Path) -> FileEntry:
    import hashlib

    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


def _files_below(folder: Path) -> set[str]:
    """Every name below the folder that is not itself a plain folder, links to folders included."""
    names: set[str] = set()
    for at, folders, files in os.walk(folder):
        names.update(str((Path(at) / name).relative_to(folder)) for name in files)
        names.update(str((Path(at) / name).relative_to(folder)) for name in folders if (Path(at) / name).is_symlink())
    return names
