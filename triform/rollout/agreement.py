"""Do two versions' answers agree? Element by element, within the tolerance that their packages record.

    numbers  equal, or |first - second| <= atol + rtol * |first|; NaN equals NaN, infinity only the same infinity
    others   equal: classes, labels, text, booleans; a number never equals a text

Two sound versions of one model may each be off by as much as its manifest says, on this provider; so the wider of both counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from triform.golden import Tolerance
from triform.package import Manifest
from triform.rollout.evalues import Floats
from triform.signature import Array

NUMBERS = "fiub"  # numpy's kinds


class Apart(NamedTuple):
    """Of each element: whether it disagrees, and by how much, absolutely and as a share of the first; 0 where that is no
    number."""

    mask: npt.NDArray[np.bool_]
    by: Floats
    share: Floats


def widest(tolerances: Iterable[Tolerance]) -> Tolerance:
    """The wider one, in both its parts; exact where there are none."""
    found = list(tolerances)
    return Tolerance(max((t.atol for t in found), default=0.0), max((t.rtol for t in found), default=0.0))


def recorded(manifest: Manifest, provider: str, dtype: np.dtype[Any]) -> Tolerance:
    """What a package's answers of that dtype may be off by on that provider."""
    tables = manifest.tolerances
    table = tables.get(provider, tables.get("CPUExecutionProvider", {}))
    return table.get(dtype.name, Tolerance(0.0, 0.0))


def apart(first: Array, second: Array, tolerance: Tolerance) -> Apart:
    """Compares arrays of one shape; texts are `str` objects."""
    zeros = np.zeros(first.shape)
    numbers = first.dtype.kind in NUMBERS, second.dtype.kind in NUMBERS
    if not all(numbers):
        return Apart(np.full(first.shape, True) if any(numbers) else np.asarray(first != second, dtype=np.bool_), zeros, zeros)
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(a - b)
    measured = np.isfinite(off)
    by = np.where(measured, off, 0.0)
    share = np.divide(by, np.abs(a), out=np.zeros_like(by), where=measured & (a != 0))
    if "f" not in (first.dtype.kind, second.dtype.kind):
        return Apart(np.asarray(first != second), by, share)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        near = measured & (off <= tolerance.atol + tolerance.rtol * np.abs(a))
    return Apart(~(equal | near), by, share)
