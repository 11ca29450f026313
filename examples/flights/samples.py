"""The sample rows that each package keeps as golden inputs: spread over the year, with every kind of hole."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from examples.flights.mapping import Columns

SAMPLES = 64
HOLES_PER_COLUMN = 5


def choose_samples(table: pa.Table, columns: Columns) -> pa.Table:
    """`SAMPLES` rows of `table`, in its order, with the models' input columns only.

    No required column is null; each nullable one is null in `HOLES_PER_COLUMN` rows or more.
    """
    inputs = table.select(columns.all)
    usable = _all_valid(inputs, columns.required)
    chosen: set[int] = set()
    for name in sorted(columns.nullable):
        chosen.update(_spread(pc.and_(usable, pc.is_null(inputs[name])), HOLES_PER_COLUMN))
    chosen.update(_spread(_all_valid(inputs, columns.all), SAMPLES - len(chosen)))
    return inputs.take(sorted(chosen))


def _all_valid(table: pa.Table, names: list[str]) -> pa.ChunkedArray:
    valid = pc.is_valid(table[names[0]])
    for name in names[1:]:
        valid = pc.and_(valid, pc.is_valid(table[name]))
    return valid


def _spread(mask: pa.ChunkedArray, count: int) -> list[int]:
    """The positions of `count` rows, evenly spaced among those where `mask` is true."""
    found = np.flatnonzero(mask.to_numpy())
    return [int(found[at]) for at in np.linspace(0, len(found) - 1, count).astype(int)]
