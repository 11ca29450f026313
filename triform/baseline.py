"""The reference distribution of each feature, in `baseline.json`: what drift is later measured against.

A numeric column has the inner edges of ten bins with equal shares and the share each bin got (ties make them uneven); a text
column the shares of its commonest values; both the share of nulls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

BINS: Final = 10
COMMONEST: Final = 50


class Reference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One column. `shares` has a share for each of `edges` + 1 bins, or for each of `values`; `nulls` is a share of all rows."""

    rows: int
    nulls: float
    edges: tuple[float, ...] = ()
    values: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


def baseline(columns: Mapping[str, Sequence[Any]]) -> dict[str, Reference]:
    """References for columns given as Python values, None or NaN for null. Columns of lists are left out."""
    return {name: made for name, values in columns.items() if (made := _reference(values)) is not None}


def _reference(values: Sequence[Any]) -> Reference | None:
    present = [v for v in values if v is not None and v == v]
    nulls = 1.0 - len(present) / len(values) if values else 0.0
    if all(isinstance(v, str) for v in present):
        common = sorted(Counter(present).items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]
        shares = tuple(_share(n, len(present)) for _, n in common)
        return Reference(len(values), _share(nulls, 1), values=tuple(v for v, _ in common), shares=shares)
    if not all(isinstance(v, int | float) for v in present):
        return None
    numbers = np.asarray(present, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return Reference(len(values), _share(nulls, 1))
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
    counts = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
    shares = tuple(_share(int(n), numbers.size) for n in counts)
    return Reference(len(values), _share(nulls, 1), edges=tuple(edges.tolist()), shares=shares)


def _share(part: float, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
