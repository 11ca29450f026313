"""Dead letters say where a row came from, why it was refused, and what it was, whatever the file holds."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triform import dead_letters
from triform.dead_letters import FOOTER_KEY, DeadLetter
from triform.sources import Sources


def bury(
    folder: Path, table: pa.Table, rows: list[int], *, key: tuple[str, ...] = (), groups: list[int] | None = None, size: int = 4
) -> pa.Table:
    """Dead letters for these rows of the given row groups (`size` rows each) of a file that holds the table."""
    pq.write_table(table, folder / "source.parquet", row_group_size=size)
    with Sources().open(str(folder / "source.parquet")) as source:
        groups = list(range(source.parquet.num_row_groups)) if groups is None else groups
        dead_letters.write(
            folder / "dead.parquet",
            source,
            row_groups=groups,
            first_row=groups[0] * size if groups else 0,
            letters=[DeadLetter(row, "code", f"reason {row}") for row in rows],
            key=key,
            footer={"run": "r"},
        )
    return pq.read_table(folder / "dead.parquet")


@settings(deadline=None)
@given(st.lists(st.integers(0, 59), unique=True, min_size=1), st.integers(0, 9), st.integers(1, 25))
def test_each_letter_carries_its_own_row(tmp_path_factory: Any, rows: list[int], first_group: int, size: int) -> None:
    """Whatever the row groups, the part's place in the file, and the order in which the rows were refused."""
    folder = tmp_path_factory.mktemp("dead")
    skipped = first_group * size
    table = pa.table({"id": range(skipped + 60), "v": [f"v{i}" for i in range(skipped + 60)]})
    groups = list(range(first_group, -(-table.num_rows // size)))
    dead = bury(folder, table, rows, key=("id",), groups=groups, size=size)
    expected = [skipped + row for row in sorted(rows)]
    assert dead["row_number"].to_pylist() == dead["id"].to_pylist() == expected
    assert dead["reason"].to_pylist() == [f"reason {row}" for row in sorted(rows)]
    assert [json.loads(row) for row in dead["raw_row"].to_pylist()] == [{"id": i, "v": f"v{i}"} for i in expected]


def test_more_rows_than_one_batch_holds(tmp_path: Path) -> None:
    many = 3 * dead_letters.BATCH_ROWS
    table = pa.table({"id": range(many)})
    dead = bury(tmp_path, table, list(range(many)), size=2 * dead_letters.BATCH_ROWS + 5)
    assert dead["row_number"].to_pylist() == list(range(many))


def test_columns_and_footer(tmp_path: Path) -> None:
    dead = bury(tmp_path, pa.table({"b": ["x"], "a": [1]}), [0], key=("a", "b"))
    assert dead.column_names == ["a", "b", "source_file", "row_number", "code", "reason", "raw_row"]
    assert dead.to_pylist()[0] | {"raw_row": ""} == {
        "a": 1, "b": "x", "source_file": str(tmp_path / "source.parquet"),
        "row_number": 0, "code": "code", "reason": "reason 0", "raw_row": "",
    }  # fmt: skip
    assert orjson.loads(pq.read_metadata(tmp_path / "dead.parquet").metadata[FOOTER_KEY]) == {"run": "r"}


ODD_VALUES: list[tuple[pa.Array, Any]] = [
    (pa.array([b"\x00\xff"]), "00ff"),
    (pa.array([decimal.Decimal("1.50")]), "1.50"),
    (pa.array([datetime.date(2013, 1, 2)]), "2013-01-02"),
    (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    (pa.array([10**17], pa.timestamp("us", tz="UTC")), "5138-11-16T09:46:40+00:00"),
    (pa.array([10**18], pa.timestamp("us")), None),  # a year that Python does not know: any text
    (pa.array([datetime.timedelta(seconds=90)]), "0:01:30"),
    (pa.array([float("nan")]), "nan"),
    (pa.array([[1.5, float("-inf"), None]]), [1.5, "-inf", None]),
    (pa.array([{"a": 1, "b": None}]), {"a": 1, "b": None}),
    (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), [["k", 1]]),
    (pa.array([b"a\xff"], pa.binary()).view(pa.string()), "a\\xff"),
    (pa.array(["view"], pa.string_view()), "view"),
    (pa.array([b"\x01"], pa.binary_view()), "01"),
    (pa.array(["word"]).dictionary_encode(), "word"),
    (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16))), "00000000-0000-0000-0000-000000000000"),
    (pa.array([[b"a\xff"]], pa.list_(pa.field("element", pa.binary()))), ["61ff"]),
    (pa.nulls(1), None),
]


@pytest.mark.parametrize(("values", "raw"), ODD_VALUES, ids=lambda v: str(v.type) if isinstance(v, pa.Array) else "")
def test_every_kind_of_value_stands_in_the_raw_row(tmp_path: Path, values: pa.Array, raw: Any) -> None:
    dead = bury(tmp_path, pa.table({"v": values, "other": [1]}), [0])
    row = json.loads(dead["raw_row"][0].as_py())
    assert row["other"] == 1
    assert row["v"] == raw or (raw is None and isinstance(row["v"], str))


@pytest.mark.parametrize("values", [values for values, _ in ODD_VALUES], ids=lambda v: str(v.type))
def test_every_kind_of_key_is_carried(tmp_path: Path, values: pa.Array) -> None:
    dead = bury(tmp_path, pa.table({"k": values}), [0], key=("k",))
    assert str(dead["k"].chunk(0)) == str(values if not pa.types.is_dictionary(values.type) else dead["k"].chunk(0))
