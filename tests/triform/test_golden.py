"""golden.npz: what goes in comes out, nothing hostile does; the child process that tries models ends whatever they do."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import helper

from triform import golden, testing
from triform.errors import GoldenMismatch, ModelCrashed, PackageError
from triform.golden import Golden, Tolerance
from triform.package import ModelPackage
from triform.predictor import Predictor
from triform.signature import DATATYPES, Signature, TensorMetadata
from triform.testing import save, value

TEXT = np.array([["", "naïve"], ["日本", "a\0b"]], dtype=object)


def test_every_datatype_survives_and_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = {d.oip: np.array([[0, 1], [1, 0]]).astype(d.numpy) for d in DATATYPES if d.oip != "BYTES"}
    arrays |= {"text": TEXT, "no rows": np.empty((0, 2), object), "nan": np.array([np.nan, np.inf]), "a/b:0": np.arange(3)}
    for name in ("one.npz", "two.npz"):
        golden.write(tmp_path / name, Golden(arrays, {"y": TEXT}))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    read = golden.read(tmp_path / "one.npz")
    assert read.inputs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read.inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(read.inputs[name], array)
    np.testing.assert_array_equal(read.outputs["y"], TEXT)


def npz(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"in/{name}.npy", content)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def says_it_is_huge(shape: str) -> bytes:
    return npy_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n") + bytes(8)


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("in/x.npy", "w", force_zip64=True) as file:
        for _ in range(300):
            file.write(bytes(1 << 20))


def lying_zip_bomb(path: Path) -> None:
    """300 MB whose directory entry says 80 bytes."""
    zip_bomb(path)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 80)
    path.write_bytes(content)


def damaged_stream(path: Path) -> None:
    npz(path, x=npy(np.random.default_rng(0).integers(0, 9, 1000)))
    content = bytearray(path.read_bytes())
    content[200:260] = b"\xff" * 60
    path.write_bytes(content)


class Boom:
    """Unpickling it would leave a mark."""

    def __reduce__(self) -> Any:
        return (print, ("UNPICKLED",))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "pickled object": lambda p: npz(p, x=npy(np.array([Boom()], dtype=object), allow_pickle=True)),
    "pickle itself": lambda p: p.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94."),
    "zip bomb": zip_bomb,
    "lying zip bomb": lying_zip_bomb,
    "shape too large": lambda p: npz(p, x=says_it_is_huge(f"({2**60},)")),
    "shape beyond integers": lambda p: npz(p, x=says_it_is_huge(f"({2**70},)")),
    "negative shape": lambda p: npz(p, x=says_it_is_huge("(-1,)")),
    "header that is code": lambda p: npz(p, x=npy_header("__import__('os').system('false')\n")),
    "deep header": lambda p: npz(p, x=npy_header("(" * 9000)),
    "no array": lambda p: npz(p, x=b"just text"),
    "empty member": lambda p: npz(p, x=b""),
    "damaged stream": damaged_stream,
    "empty file": lambda p: p.write_bytes(b""),
    "no file": lambda p: p.unlink(missing_ok=True),
    "text offsets beyond": lambda p: npz(p, **text_parts([0, 5, 99])),
    "text offsets of floats": lambda p: npz(p, **text_parts([0.5, 1.5])),
    "text without offsets": lambda p: npz(p, **text_parts(3)),
    "text of another shape": lambda p: npz(p, **text_parts([0, 1, 2], shape=[7])),
    "text not UTF-8": lambda p: npz(p, **text_parts([0, 1, 2], data=b"\xff\xfe")),
}


def text_parts(offsets: Any, shape: Any = (2,), data: bytes = b"ab") -> dict[str, bytes]:
    parts = {"t.data": np.frombuffer(data, np.uint8), "t.offsets": np.array(offsets), "t.shape": np.array(shape)}
    return {name: npy(array) for name, array in parts.items()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_plain_arrays_is_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    HOSTILE[kind](tmp_path / "golden.npz")
    with pytest.raises(PackageError, match=r"^golden\.npz "):
        golden.read(tmp_path / "golden.npz")
    assert "UNPICKLED" not in capsys.readouterr().out


def compare(want: Any, have: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    golden.compare({"y": np.array(want)}, {"y": np.array(have)}, {"float64": Tolerance(atol, rtol)})


def test_answers_within_tolerance_pass() -> None:
    compare([1.0, np.nan, np.inf], [1.0, np.nan, np.inf])
    compare([1.0, 100.0], [1.01, 100.5], atol=0.01, rtol=0.01)
    compare(["a"], ["a"])
    compare([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("want", "have", "told"),
    [
        ([1.0, 2.0], [1.0, 2.5], r"by up to 0\.5 \(allowed: atol 0\.1"),
        ([1.0, np.nan], [1.0, 2.0], "differs"),
        ([1.0], [np.inf], "differs"),
        ([1, 2, 3], [1, 3, 3], "1 of 3 values differ"),
        (["a"], ["b"], "1 of 1 values differ"),
        ([1.0], [[1.0]], r"recorded with shape \[1\], now \[1, 1\]"),
    ],
)
def test_answers_beyond_tolerance_are_told_with_their_output(want: Any, have: Any, told: str) -> None:
    with pytest.raises(GoldenMismatch, match=f"output 'y'.*{told}"):
        compare(want, have, atol=0.1)


@pytest.mark.parametrize("recorded", [{}, {"y": np.ones(1), "z": np.ones(1)}, {"z": np.ones(1)}])
def test_other_outputs_than_the_models_are_a_mismatch(recorded: dict[str, Any]) -> None:
    with pytest.raises(GoldenMismatch, match="outputs"):
        golden.compare(recorded, {"y": np.ones(1)}, {})


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_golden_rows_that_are_not_the_models_keep_it_from_being_served(
    folder: Path, reseal: Callable[..., None], side: str
) -> None:
    """Whoever can rewrite the golden rows and seal them again still gets no model served that they do not describe."""
    recorded = golden.read(folder / "golden.npz")
    other = {"inputs": (recorded.inputs, {"y": recorded.outputs["y"] + 1}), "outputs": (recorded.inputs, {})}[side]
    golden.write(folder / "golden.npz", Golden(*other))
    reseal(folder)
    package = ModelPackage.open(folder)
    for level in ("sealed", "golden", "full"):
        with pytest.raises(GoldenMismatch):
            Predictor.load(package, verification=level)


def endless(path: Path) -> Path:
    """A Loop that would turn for years."""
    body = helper.make_graph(
        [helper.make_node("Add", ["h", "one"], ["h2"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("i", "INT64", []), value("go", "BOOL", []), value("h", "FP32", ["N"])],
        [value("on", "BOOL", []), value("h2", "FP32", ["N"])],
    )
    constants = {"turns": np.array(2**60), "go": np.array(True), "one": np.ones(1, np.float32)}
    loop = helper.make_node("Loop", ["turns", "go", "x"], ["y"], body=body)
    return save(path, [loop], [value("x", "FP32", ["N"])], [value("y", "FP32", ["N"])], constants)


def swelling(path: Path) -> Path:
    """Fills 3 GB on its way."""
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=7),
        helper.make_node("ConstantOfShape", ["n"], ["big"], value=helper.make_tensor("v", 1, [1], [1.0])),
        helper.make_node("CumSum", ["big", "axis"], ["sums"]),
        helper.make_node("ReduceMax", ["sums"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    return save(path, nodes, [value("x", "FP32", [1])], [value("y", "FP32", [1])], {"axis": np.array(0)})


def put(model: Path, folder: Path, x: float, reseal: Callable[..., None]) -> None:
    """The model in the finished package's place, with one golden row."""
    (folder / "model.onnx").write_bytes(model.read_bytes())
    row = np.array([x], np.float32)
    golden.write(folder / "golden.npz", Golden({"x": row}, {"y": row}))
    tensors = [(TensorMetadata(n, "FP32", ("rows",)),) for n in "xy"]
    reseal(folder, signature=Signature(*tensors))


def test_a_model_that_hangs_is_stopped_and_its_process_gone(tmp_path: Path, folder: Path, reseal: Callable[..., None]) -> None:
    put(endless(tmp_path / "m.onnx"), folder, 1.0, reseal)
    started = time.monotonic()
    with pytest.raises(ModelCrashed, match="longer than 2 s"):
        golden.verify_in_child(folder, seconds=2)
    assert time.monotonic() - started < 10
    assert not children_trying(folder)


def children_trying(folder: Path) -> list[int]:
    return [p.pid for p in psutil.Process().children() if str(folder) in p.cmdline()]


def test_a_model_that_swells_is_stopped(tmp_path: Path, folder: Path, reseal: Callable[..., None]) -> None:
    put(swelling(tmp_path / "m.onnx"), folder, 400e6, reseal)
    with pytest.raises(ModelCrashed, match="more than 400 MB"):
        golden.verify_in_child(folder, memory_bytes=400 << 20)


def test_a_process_that_dies_is_told_with_its_signal(tmp_path: Path, folder: Path, reseal: Callable[..., None]) -> None:
    put(endless(tmp_path / "m.onnx"), folder, 1.0, reseal)

    def kill() -> None:
        while not (found := children_trying(folder)):
            time.sleep(0.05)
        os.kill(found[0], signal.SIGSEGV)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ModelCrashed, match=r"took down the process that tried it \(signal 11\)"):
        golden.verify_in_child(folder, seconds=20)
    killer.join()


def test_what_is_tried_gives_way_to_what_is_served(tmp_path: Path, folder: Path, reseal: Callable[..., None]) -> None:
    """Where CPUs or memory run short, in a container for instance: the child waits, and it is the child that the kernel ends."""
    put(endless(tmp_path / "m.onnx"), folder, 1.0, reseal)
    with subprocess.Popen([sys.executable, "-m", "triform.golden", folder, "60"], env=golden.child_env()) as child:
        try:
            score, deadline = Path(f"/proc/{child.pid}/oom_score_adj"), time.monotonic() + 50
            while score.read_text().strip() != "1000":
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert psutil.Process(child.pid).nice() == min(psutil.Process().nice() + 10, 19)
        finally:
            child.kill()


def test_the_childs_own_error_comes_through(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json cannot be read"):
        golden.verify_in_child(folder.parent)


def test_a_file_that_does_not_load_is_told_as_the_child_says(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(PackageError, match=r"ONNX Runtime cannot load model\.onnx"):
        golden.load_in_child(tmp_path / "model.onnx")
    golden.load_in_child(testing.linear(tmp_path / "good.onnx"))
