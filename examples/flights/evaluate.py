"""Hold scored Parquet against what happened: AUC, Brier score and log loss of the last quarter.

Flow: scored folder (id, p_late) + input folder (id, outcome) -> join by id -> figures.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from examples.flights.mapping import read_columns

EVALUATION_MONTHS = range(10, 13)
LATE_MINUTES = 15

Floats = np.ndarray[Any, np.dtype[Any]]


def metrics(late: Floats, p_late: Floats) -> dict[str, float]:
    """Figures of `p_late` (float [N], probability of late) against `late` (0 or 1, [N]), to 9 decimals."""
    p = p_late.astype(np.float64)
    figures = {
        "auc": roc_auc_score(late, p),
        "brier": brier_score_loss(late, p),
        "log_loss": log_loss(late, p),
        "rows": len(late),
    }
    # numpy's sums differ in the last bit with where an array lies in memory, and a package's digest with them.
    return {name: round(float(value), 9) for name, value in figures.items()}


def evaluate(scored_folder: Path, input_folder: Path) -> dict[str, float]:
    """AUC, Brier score, log loss and rows of Oct..Dec for the scored Parquet under `scored_folder`.

    `scored_folder` is a batch run's output, its `run=...` or the `data` in that: all Parquet beneath it is
    read, except dead letters and hidden folders.

    Flights with no known delay (cancelled, diverted) are left out. Rows that lack a required column are dead
    letters, so they may be absent from the scored rows; every other input row must be there.

    Raises ValueError if an id comes twice on either side, if a scored id is not in the input, if a row that
    should have been scored was not, or if a probability is null or not in [0, 1].
    """
    scored = _read(scored_folder, ["id", "p_late"])
    given = _read(input_folder, ["id", "month_of_year", "arr_delay", "cancelled", *_required()])
    _check_ids(scored["id"], "scored")
    _check_ids(given["id"], "input")
    _check_probabilities(scored["p_late"])
    _check_nothing_lost(scored, given)
    joined = given.filter(_evaluated(given)).join(scored, "id", join_type="inner")
    if not joined.num_rows:
        raise ValueError(f"no scored flight of months {list(EVALUATION_MONTHS)} has a known delay")
    return metrics(joined["arr_delay"].to_numpy() >= LATE_MINUTES, joined["p_late"].to_numpy())


def _required() -> list[str]:
    return read_columns().required


def _read(folder: Path, columns: list[str]) -> pa.Table:
    # Names that start with `_` or `.` (markers, unfinished files) are not data, as Hive and pyarrow have it.
    files = [path for path in sorted(folder.rglob("*.parquet")) if not _hidden(path.relative_to(folder))]
    if not files:
        raise ValueError(f"no Parquet files under {folder}")
    data = ds.dataset(files, format="parquet")
    missing = [name for name in columns if name not in data.schema.names]
    if missing:
        raise ValueError(f"{folder} lacks the columns {missing}")
    return data.to_table(columns=columns)


def _hidden(path: Path) -> bool:
    return any(part.startswith(("_", ".")) or part == "dead_letters" for part in path.parts)


def _check_ids(ids: pa.ChunkedArray, side: str) -> None:
    if ids.null_count:
        raise ValueError(f"{ids.null_count} {side} rows have no id")
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ValueError(f"{len(repeated)} {side} ids come more than once, such as {_some(repeated)}")


def _check_probabilities(p_late: pa.ChunkedArray) -> None:
    p = p_late.to_numpy()
    wrong = int(np.count_nonzero(~((p >= 0) & (p <= 1))))  # so written, NaN is wrong too
    if wrong:
        raise ValueError(f"{wrong} values of p_late are null or outside [0, 1]")


def _check_nothing_lost(scored: pa.Table, given: pa.Table) -> None:
    unknown = scored["id"].filter(pc.invert(pc.is_in(scored["id"], given["id"])))
    if len(unknown):
        raise ValueError(f"{len(unknown)} scored ids are not in the input, such as {_some(unknown)}")
    lost = given["id"].filter(pc.and_(_complete(given), pc.invert(pc.is_in(given["id"], scored["id"]))))
    if len(lost):
        raise ValueError(f"{len(lost)} complete input rows were not scored, such as ids {_some(lost)}")


def _complete(given: pa.Table) -> pa.ChunkedArray:
    complete = pc.is_valid(given["id"])
    for name in _required():
        complete = pc.and_(complete, pc.is_valid(given[name]))
    return complete


def _evaluated(given: pa.Table) -> pa.ChunkedArray:
    in_season = pc.is_in(given["month_of_year"], pa.array(EVALUATION_MONTHS, pa.int16()))
    known = pc.and_(pc.is_valid(given["arr_delay"]), pc.invert(given["cancelled"]))
    return pc.and_(in_season, known)


def _some(ids: pa.Array) -> list[int]:
    return [int(value) for value in ids.slice(0, 3).to_pylist()]


if __name__ == "__main__":
    for name, value in evaluate(Path(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{name:9}{value:.6g}")
