"""`Predict`: a stage for your own Ray Data pipeline, Arrow in, Arrow out, with the batch job's answers.

    ds.map_batches(
        Predict,
        fn_constructor_args=Predict.pinned("s3://bucket/models", "flight-delay@stable"),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )

    pa.Table -> rows of at most 32,768 or 32 MB -> triform/answering.py -> the same table with the answers beside it

Needs no Ray itself: `Predict(*Predict.pinned("models", "churn"))(table)` works anywhere. It promises nothing about a whole data
set; for each row exactly once, whatever is killed, run the job (`python -m batch run`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch.actor import pinned_predictor
from triform import arrow, buffers
from triform.answering import Answered, Side, answer
from triform.batch_rows import BATCH_BYTES, BATCH_ROWS
from triform.errors import InvalidInput
from triform.features import Features
from triform.repository import open_repository, resolve
from triform.runs.plan import Pinned
from triform.runtime import RuntimeOptions

STAMPS: Final = (pa.field("_model_version", pa.string()), pa.field("_error", pa.string()), pa.field("_reason", pa.string()))


class Predict:
    """The callable class of `map_batches`. Rows in = rows out, in their order; all columns of the input stay as they are.

    | column | type | holds |
    | --- | --- | --- |
    | the model's output columns | as in the batch job's output (`arrow.output_schema`) | the answer; null for a refused row |
    | `_model_version` | string | `name/version`, of every row |
    | `_error` | string | null, or why the row was refused: a dead letter's code, such as `missing_value` or `run_failed` |
    | `_reason` | string | null, or the same in words |

    The schema does not depend on the rows. Filter by `_error IS NULL`, or write both: nothing is dropped here.
    """

    def __init__(self, repository: str, ref: str, digest: str, options: RuntimeOptions | None = None) -> None:
        """Loads and verifies the model, once an actor; `Predict.pinned` makes the first three. `ref` is `name/version`.

        Raises `DigestMismatch` where the repository holds another package under that name, `PackageError`, `StoreError`,
        `ProviderUnavailable`: Ray Data then ends the pipeline with the message.
        """
        self._predictor = pinned_predictor(repository, Pinned(ref, digest), options or RuntimeOptions())
        self._features = Features(self._predictor.signature, self._predictor.manifest.config)

    @staticmethod
    def pinned(repository: str, model: str) -> tuple[str, str, str]:
        """What `model` (`name`, `name@stable`, `name/3`) means now, as constructor arguments: repository, `name/version`, digest.

        Called once, by the driver, so that all actors and those that are started anew load the same bytes, wherever the alias
        moves meanwhile. Raises `ModelNotFound`, `VersionNotFound`, `AliasNotFound`, `InvalidReference`.
        """
        found = open_repository(repository)
        manifest = found.package(*resolve(found, model)).manifest
        return found.location, manifest.ref, manifest.digest

    def __call__(self, table: pa.Table) -> pa.Table:
        """Raises `InvalidInput` where a column of the model is missing, has a type that cannot feed it, or is called like one of
        the columns to be added; `ResourceExhausted` where memory does not do for one row."""
        arrow.check_schema(self._features.inputs, table.schema)
        added = pa.schema([*arrow.output_schema(self._features), *STAMPS])
        if clash := set(added.names) & set(table.column_names):
            raise InvalidInput(f"the column '{min(clash)}' is one that the model adds: rename it or drop it before")
        answers = [self._answer(batch, added) for batch in self._batches(table)]
        new = pa.Table.from_batches(answers, schema=added)
        for name in added.names:
            table = table.append_column(added.field(name), new[name])
        return table

    def _batches(self, table: pa.Table) -> Iterator[pa.RecordBatch]:
        """The model's columns in pieces of bounded size, whatever size the table has."""
        table = table.select(self._features.columns)
        rows = int(np.clip(BATCH_BYTES * table.num_rows // max(1, table.nbytes), 1, BATCH_ROWS))
        for start in range(0, table.num_rows, rows):
            yield from table.slice(start, rows).combine_chunks().to_batches()

    def _answer(self, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        answered = answer(Side(self._predictor, self._features), batch)
        version = buffers.repeated_text(self._predictor.manifest.ref, batch.num_rows)
        if not answered.refused:
            nothing = pa.nulls(batch.num_rows, pa.string())
            return pa.RecordBatch.from_arrays([*answered.columns.values(), version, nothing, nothing], schema=schema)
        places = _places(answered, batch.num_rows)
        refused = {r.row: r for r in answered.refused}
        told = [refused.get(row) for row in range(batch.num_rows)]
        error = pa.array([r and r.code for r in told], pa.string())
        reason = pa.array([r and r.reason for r in told], pa.string())
        columns = [column.take(places) for column in answered.columns.values()]
        return pa.RecordBatch.from_arrays([*columns, version, error, reason], schema=schema)


def _places(answered: Answered, rows: int) -> pa.Array:
    """For each row of the batch where its answer stands; null where it has none."""
    places = np.zeros(rows, dtype=np.int64)
    places[answered.rows] = np.arange(len(answered.rows))
    there = np.zeros(rows, dtype=np.bool_)
    there[answered.rows] = True
    return pc.if_else(buffers.from_numpy(there), buffers.from_numpy(places), None)
