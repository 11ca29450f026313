"""How many rows of a Parquet file are read at a time, so that a batch fits in memory whatever the file's encoding hides.

    footer: encoded sizes -> the larger of both -> rows
    a few rows, decoded   ---^

A dictionary holds a text of a megabyte once, however many rows have it, and so the footer may know a thousandth of what the rows
take up when they are decoded. Only columns of varying length are tried: the others' widths are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS: Final = 32_768
BATCH_BYTES: Final = 32 << 20
PROBES: Final = 3  # row groups of a part that are looked into
PROBE_ROWS: Final = 8


def batch_rows(source: pq.ParquetFile, row_groups: Sequence[int], columns: Sequence[str], *, most: int = BATCH_ROWS) -> int:
    """Rows, from 1 to `most`, that take up about BATCH_BYTES in memory. Raises what Arrow does for pages that are damaged."""
    row = max(_encoded(source, row_groups), _decoded(source, row_groups, columns), 1.0)
    return max(1, min(most, int(BATCH_BYTES / row)))


def _encoded(source: pq.ParquetFile, row_groups: Sequence[int]) -> float:
    groups = [source.metadata.row_group(i) for i in row_groups]
    return float(sum(g.total_byte_size for g in groups) / max(1, sum(g.num_rows for g in groups)))


def _decoded(source: pq.ParquetFile, row_groups: Sequence[int], columns: Sequence[str]) -> float:
    """Bytes of a row: the worst of the first rows of the first, the last and a middle row group. Columns that the file lacks are
    refused elsewhere."""
    schema = source.schema_arrow
    types = {name: schema.field(at).type for name in columns if (at := schema.get_field_index(name)) >= 0}
    vary = [name for name, kind in types.items() if _varies(kind)]
    fixed = float(sum(kind.bit_width / 8 for name, kind in types.items() if name not in vary))
    if not vary or not row_groups:
        return fixed
    tried = {row_groups[i] for i in np.linspace(0, len(row_groups) - 1, PROBES).astype(int)}
    return fixed + max(_of_first_rows(source, group, vary) for group in tried)


def _varies(kind: pa.DataType) -> bool:
    try:
        return not kind.bit_width
    except ValueError:  # no width: text, binary, lists
        return True


def _of_first_rows(source: pq.ParquetFile, row_group: int, columns: list[str]) -> float:
    batches = source.iter_batches(PROBE_ROWS, row_groups=[row_group], columns=columns, use_threads=False)
    first = next(batches, None)
    return float(first.nbytes / first.num_rows) if first is not None and first.num_rows else 0.0
