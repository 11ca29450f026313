"""Golden samples: the inputs a package was tried with and the outputs it gave, in `golden.npz`.

    record: arrays -> write() -> golden.npz         verify: read() -> Predictor.run -> compare() within the manifest's tolerances

`python -m triform.golden PACKAGE` does the verification in a process of its own (`verify_in_child` starts it and limits its
time and memory), so that a model that crashes or swells takes down that process and not the server. Nothing is ever pickled:
a BYTES tensor is stored as `<name>.data` uint8, `<name>.offsets` int64 and `<name>.shape` int64.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from triform.errors import GoldenMismatch, ModelCrashed, PackageError, TriformError, by_code
from triform.signature import Array

if TYPE_CHECKING:
    import subprocess

MAX_GOLDEN_BYTES: Final = 256 << 20


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """|got - recorded| <= atol + rtol * |recorded|, element by element; NaN equals NaN."""

    atol: float
    rtol: float


class Golden(NamedTuple):
    inputs: dict[str, Array]
    outputs: dict[str, Array]


def write(path: Path, golden: Golden) -> None:
    """Writes the npz; the same arrays give the same bytes (numpy dates every member 1980)."""
    members: dict[str, Array] = {}
    for side, arrays in (("in", golden.inputs), ("out", golden.outputs)):
        for name, array in arrays.items():
            members |= _members(f"{side}/{name}", array)
    with path.open("wb") as file:
        np.savez(file, **members)  # type: ignore[arg-type]  # numpy's stub takes only its own keyword


def _members(key: str, array: Array) -> dict[str, Array]:
    if array.dtype.kind not in "OU":
        return {key: np.ascontiguousarray(array)}
    encoded = [str(s).encode() for s in array.ravel().tolist()]
    return {
        f"{key}.data": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        f"{key}.offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        f"{key}.shape": np.array(array.shape, dtype=np.int64),
    }


def read(path: Path) -> Golden:
    """Reads the npz. Raises `PackageError` for anything that is not plain arrays, or unpacks to more than 256 MB."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if sum(member.file_size for member in stored.zip.infolist()) > MAX_GOLDEN_BYTES:
                raise PackageError(f"{path.name} unpacks to more than {MAX_GOLDEN_BYTES >> 20} MB")
            members = {key: stored[key] for key in stored.files}
        if odd := [key for key, member in members.items() if not isinstance(member, np.ndarray)]:
            raise ValueError(f"{odd[0]} is no array")
        texts = {k.removesuffix(".offsets") for k in members if k.endswith(".offsets")}
        texts = {k for k in texts if f"{k}.data" in members and f"{k}.shape" in members}
        parts = {f"{k}.{part}" for k in texts for part in ("data", "offsets", "shape")}
        golden = Golden({}, {})
        for key in sorted(texts | (members.keys() - parts)):
            side, _, tensor = key.partition("/")
            arrays = golden.inputs if side == "in" else golden.outputs
            arrays[tensor] = _text(members, key) if key in texts else members[key]
    except PackageError:
        raise
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise a dozen unrelated classes for what is no such file
        raise PackageError(f"{path.name} is not a readable file of plain arrays: {str(error)[:200]}") from error
    return golden


def _text(members: Mapping[str, Array], key: str) -> Array:
    data, offsets = members[f"{key}.data"].tobytes(), members[f"{key}.offsets"].tolist()
    if offsets[0] != 0 or offsets[-1] != len(data) or offsets != sorted(offsets):
        raise ValueError(f"{key}.offsets do not cut {key}.data")
    text = np.empty(len(offsets) - 1, dtype=object)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        text[i] = data[start:stop].decode()
    return text.reshape(tuple(members[f"{key}.shape"].tolist()))


def compare(recorded: Mapping[str, Array], got: Mapping[str, Array], tolerances: Mapping[str, Tolerance]) -> None:
    """Raises `GoldenMismatch`, naming the output and the worst element, if an output left its tolerance (by numpy dtype)."""
    if recorded.keys() != got.keys():
        raise GoldenMismatch(f"the recorded outputs are {', '.join(recorded) or 'none'}, the model's {', '.join(got)}")
    for name, want in recorded.items():
        have = got[name]
        if want.shape != have.shape:
            raise GoldenMismatch(f"output '{name}': recorded with shape {list(want.shape)}, now {list(have.shape)}")
        if want.dtype.kind != "f":
            if not np.array_equal(want, have):
                raise GoldenMismatch(
                    f"output '{name}': {int((want != have).sum())} of {want.size} values differ from the recorded ones"
                )
            continue
        allowed = tolerances.get(want.dtype.name, Tolerance(0.0, 0.0))
        if not np.allclose(have, want, atol=allowed.atol, rtol=allowed.rtol, equal_nan=True):
            with np.errstate(invalid="ignore"):
                off = np.abs(have.astype(np.float64) - want.astype(np.float64))
            raise GoldenMismatch(
                f"output '{name}': differs from the recorded answer by up to {np.nanmax(off):.3g} "
                f"(allowed: atol {allowed.atol:g}, rtol {allowed.rtol:g})"
            )


def verify_in_child(folder: Path, *, seconds: float = 120.0, memory_bytes: int = 8 << 30) -> None:
    """Loads the package and runs its golden samples in a child process.

    Raises the child's own `PackageError`, or `ModelCrashed` where the child died, ran longer than `seconds` or grew past
    `memory_bytes` of resident memory.
    """
    _in_child(folder, seconds, memory_bytes)


def load_in_child(model: Path, *, seconds: float = 120.0, memory_bytes: int = 16 << 30) -> None:
    """Opens a bare ONNX file in a child process: what a packager does before it trusts the file with its own process."""
    _in_child(model, seconds, memory_bytes)


def _in_child(path: Path, seconds: float, memory_bytes: int) -> None:
    import subprocess  # a cold start has no child and does not pay for it

    command = [sys.executable, "-m", "triform.golden", str(path), str(seconds)]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=child_env(), **pipes) as child:
        try:
            _wait(child, seconds, memory_bytes)
            answer = child.stdout.read() if child.stdout else b""
        finally:
            if child.poll() is None:
                child.kill()
    if child.returncode == 0:
        return
    if child.returncode == 1 and answer:
        told = msgspec.json.decode(answer, type=dict[str, str])
        raise by_code(told["code"])(told["error"])
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    raise ModelCrashed(f"the model took down the process that tried it ({how})")


def child_env() -> dict[str, str]:
    """This process's environment, with its import path: the child must import the same triform."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}


def _wait(child: subprocess.Popen[bytes], seconds: float, memory_bytes: int) -> None:
    started = time.monotonic()
    while child.poll() is None:
        if time.monotonic() - started > seconds:
            raise ModelCrashed(f"the model took longer than {seconds:g} s")
        if resident_bytes(child.pid) > memory_bytes:
            raise ModelCrashed(f"the model took more than {memory_bytes >> 20} MB of memory")
        time.sleep(0.02)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes, from /proc; 0 where there is none to read (the limit is then not enforced)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def main(path: Path, seconds: float) -> int:
    """The child: a package folder is loaded and warmed up, a file is only opened. Writes its error as JSON and exits with 1.

    An alarm ends it a little after its parent would, in case the parent was killed. What its parent may be serving goes first:
    where memory runs out, whatever the limit, it is this process that the kernel ends.
    """
    import signal

    from triform.package import ModelPackage
    from triform.predictor import Predictor
    from triform.runtime import RuntimeOptions, open_session

    os.nice(10)
    with suppress(OSError):  # no /proc, or one that is read only
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.alarm(int(seconds) + 5)
    try:
        if path.is_dir():
            Predictor.load(ModelPackage.open(path), verification="sealed")
        else:
            open_session(path, RuntimeOptions(), threads=1)
    except TriformError as error:
        sys.stdout.buffer.write(msgspec.json.encode({"code": error.code, "error": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
