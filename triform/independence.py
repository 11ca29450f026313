"""Does a row's answer depend on the company it keeps? Tested, not believed.

    each sample row alone -> the reference        the same rows in company -> compared bit by bit -> exact | close | dependent

Company means: all together, reversed, in other batch sizes, at other positions, beside extreme rows; each on the package's
thread count, on 1 and on 2 threads. Why it matters: a declared batch axis may lie (a quiet clip batched with a loud one), and
kernels sum in another order for another batch size. Rows of a `dependent` model are never batched with strangers' rows.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triform.errors import ResourceExhausted, RunFailed
from triform.golden import Tolerance
from triform.package import Deviation, Independence
from triform.predictor import joined
from triform.signature import Array, rows_of

Run = Callable[[Mapping[str, Array]], dict[str, Array]]

# What rounding in another order may do; beyond it rows mix. By numpy dtype: (atol, rtol).
CLOSE: Final = {"float64": (1e-9, 1e-7), "float32": (1e-5, 1e-3), "float16": (1e-2, 2e-2)}
LARGE_BATCH: Final = 200
LARGE_BATCH_BYTES: Final = 64 << 20  # of inputs; activations may take twenty times that
MARGIN: Final = 4  # how far beyond the seen deviation the recorded tolerance reaches: samples are few, production is not


class Difference(NamedTuple):
    """The largest differences between answers and their references."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int = 0
    close: bool = True

    def merged(self, other: Difference) -> Difference:
        return Difference(
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            max(self.max_ulp, other.max_ulp),
            self.close and other.close,
        )

    @property
    def kind(self) -> Independence:
        return "dependent" if not self.close else "close" if self.max_ulp or self.max_abs else "exact"


def alone(run: Run, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The answers of the rows when each is run by itself: the reference, and what golden.npz records."""
    rows = [run({n: a[i : i + 1] for n, a in inputs.items()}) for i in range(rows_of(inputs))]
    return joined(rows)


def deviation(run: Run, inputs: Mapping[str, Array], reference: Mapping[str, Array], threads: int) -> Deviation:
    """How far the answers moved in any company, at one thread count (that of the session behind `run`)."""
    rows = rows_of(inputs)
    strangers = extreme_rows(inputs)
    everyone = {n: np.concatenate([a, strangers[n]]) for n, a in inputs.items()}
    worst = difference(reference, alone(run, inputs))
    largest = min(LARGE_BATCH, LARGE_BATCH_BYTES * rows // max(sum(a.nbytes for a in inputs.values()), 1))
    for company in _companies(rows, rows_of(strangers), largest):
        try:
            answers = run({n: a[company] for n, a in everyone.items()})
        except (RunFailed, ResourceExhausted):
            if company.max() >= rows:
                continue  # the model cannot take such an extreme row, or not in this memory: nothing is learnt from it
            raise
        ours = company < rows
        expected = {n: a[company[ours]] for n, a in reference.items()}
        worst = worst.merged(difference(expected, {n: a[ours] for n, a in answers.items()}))
    return Deviation(threads, worst.kind, _rounded(worst.max_abs), _rounded(worst.max_rel), worst.max_ulp)


def _companies(rows: int, strangers: int, largest: int) -> Iterator[NDArray[np.intp]]:
    """Row numbers to run together; those from `rows` on are extreme rows."""
    everyone = np.arange(rows)
    yield everyone
    yield everyone[::-1].copy()
    yield np.roll(everyone, 1)
    for size in (2, 3, 7):
        yield from (everyone[at : at + size] for at in range(0, rows, size))
    yield np.resize(everyone, max(largest, rows))
    for stranger in range(rows, rows + strangers):
        yield np.insert(everyone, [0, rows // 2, rows], stranger)


def extreme_rows(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Four rows unlike the samples: all zero, far above and far below them, and NaN where there are floats.

    Integers stay within what the samples show, because a larger one may be an index out of range.
    """
    return {name: np.stack([_extreme(a, how) for how in range(4)]) for name, a in inputs.items()}


def _extreme(array: Array, how: int) -> Array:
    row = array[0].copy() if array.dtype.kind != "O" else np.array(array[0], dtype=object)
    kind = array.dtype.kind
    if kind == "f":
        finite = array[np.isfinite(array)]
        far = 1000.0 * float(np.abs(finite).max() if finite.size else 1.0) + 1.0
        far = min(far, float(np.finfo(array.dtype).max) / 4)
        return np.full_like(row, (0.0, far, -far, np.nan)[how])
    if kind in "iu" and array.size:
        return np.full_like(row, (array.min(), array.max(), array.min(), array.max())[how])
    if kind in "OU":
        return np.full(np.shape(row), ("", "?" * 40)[how % 2], dtype=object)
    return np.full_like(row, how % 2)


def difference(reference: Mapping[str, Array], answers: Mapping[str, Array]) -> Difference:
    """Compares bits (any NaN equals any NaN); floats that differ are measured, anything else that differs is not close."""
    worst = Difference()
    for name, want in reference.items():
        have = answers[name]
        if want.shape != have.shape:
            return Difference(np.inf, np.inf, 0, close=False)
        if want.dtype.kind != "f":
            worst = worst.merged(Difference(close=bool(np.array_equal(want, have))))
        elif not np.array_equal(_bits(want), _bits(have)):
            worst = worst.merged(_float_difference(want, have))
    return worst


def _float_difference(want: Array, have: Array) -> Difference:
    atol, rtol = CLOSE[want.dtype.name]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        apart = np.abs(have.astype(np.float64) - want.astype(np.float64))
        apart[(want == have) | (np.isnan(want) & np.isnan(have))] = 0.0
        scale = np.abs(want.astype(np.float64))
        relative = apart[scale > atol] / scale[scale > atol]
        ulp = np.abs(_ordered(want) - _ordered(have))[np.isfinite(want) & np.isfinite(have)]
    close = bool(np.isfinite(apart).all() and (apart <= atol + rtol * scale).all())
    return Difference(float(apart.max()), float(relative.max(initial=0.0)), int(np.clip(ulp.max(initial=0.0), 1, 2**31)), close)


def _bits(array: Array) -> Array:
    """The bit patterns, with one NaN for all."""
    array = np.where(np.isnan(array), np.array(np.nan, dtype=array.dtype), array)
    return array.view(f"u{array.dtype.itemsize}")


def _ordered(array: Array) -> NDArray[np.float64]:
    """Floats mapped to numbers that count representable values, so that their distance is in units of the last place."""
    bits = np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}").astype(np.int64)
    lowest = np.iinfo(np.int64).min if array.dtype.itemsize == 8 else -(2 ** (8 * array.dtype.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits).astype(np.float64)


def tolerance(seen: list[Deviation]) -> Tolerance:
    """The bound to record for a model that is close: what was seen, with a margin."""
    return Tolerance(_rounded(MARGIN * max(d.max_abs for d in seen)), _rounded(MARGIN * max(d.max_rel for d in seen)))


def _rounded(value: float) -> float:
    """Two digits: the rest is noise."""
    return float(f"{value:.1e}") if np.isfinite(value) else float(np.finfo(np.float64).max)


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The vector instructions that decide which kernels ONNX Runtime picks, e.g. "x86_64 avx2 avx512f"."""
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        flags = []
    deciding = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
    return " ".join([platform.machine(), *(f for f in deciding if f in flags)])
