"""docs/nightly.md is true: its commands parse, and its DuckDB query and Glue registration do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import boto3
import duckdb
import pytest
import typer.main

from batch import cli
from tests.batch.workbench import Workbench, x_of

GUIDE = (Path(__file__).parent.parent.parent / "docs/nightly.md").read_text()


def block(language: str, holding: str) -> str:
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL) if holding in text)
    return str(found)


def test_the_commands_are_what_the_command_line_takes() -> None:
    lines = [line for line in block("sh", "python -m batch").splitlines() if line]
    group: Any = typer.main.get_command(cli.app)
    for line in lines:
        _, _, module, command, *args = shlex.split(line, comments=True)
        assert module == "batch"
        group.commands[command].make_context(command, args)
    assert len(lines) == 4


def test_every_exit_code_is_in_the_table() -> None:
    table = re.findall(r"^\| (\d) \|", GUIDE, re.MULTILINE)
    assert list(map(int, table)) == [0, 1, 2, *cli.EXIT_CODES.values()]


def test_duckdb_reads_each_nights_current_run(tmp_path: Path, lookup_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, lookup_repository, output="scored")
    for day in 19, 20:
        bench.write(f"day=2026-11-{day}/a.parquet", 100 * day)
    days = {
        day: {"input": (str(bench.input / f"day=2026-11-{day}"),), "output": str(bench.output / f"day=2026-11-{day}")}
        for day in (19, 20)
    }
    for where in days.values():
        bench.score_and_run(**where)
    bench.write("day=2026-11-20/late.parquet", 5000, rows=50)  # late data: another run beside the first
    bench.score_and_run(**days[20], if_exists="replace")
    assert len(list((bench.output / "day=2026-11-20").glob("run=*"))) == 2

    monkeypatch.chdir(tmp_path)
    runs, count = block("sql", "SET VARIABLE").strip().rstrip(";").split(";")
    with duckdb.connect() as connection:
        connection.execute(runs)
        found = connection.execute(count).fetchall()

    def answered(rows: range) -> int:
        return sum(x_of(row) not in (None, 99) for row in rows)

    late = answered(range(2000, 2100)) + answered(range(5000, 5050))
    assert [(str(day), rows) for day, rows in found] == [("2026-11-19", answered(range(1900, 2000))), ("2026-11-20", late)]


@pytest.mark.usefixtures("s3_bucket")  # whose environment leads boto3 to moto
def test_glue_gets_a_partition_and_moves_it(tmp_path: Path) -> None:
    glue, database = boto3.client("glue"), tmp_path.name.replace("-", "_")
    storage = {"Columns": [{"Name": "id", "Type": "bigint"}], "Location": "s3://example-lake/scored/"}
    table = {"Name": "scored", "StorageDescriptor": storage, "PartitionKeys": [{"Name": "day", "Type": "string"}]}
    glue.create_database(DatabaseInput={"Name": database})
    glue.create_table(DatabaseName=database, TableInput=table)
    names: dict[str, Any] = {}
    exec(block("python", "def register"), names)  # noqa: S102 - our own page
    for run in "run=1", "run=1", "run=2":
        names["register"](database, "scored", "2026-11-20", f"s3://example-lake/scored/day=2026-11-20/{run}/data")
    (found,) = glue.get_partitions(DatabaseName=database, TableName="scored")["Partitions"]
    assert found["Values"] == ["2026-11-20"]
    assert found["StorageDescriptor"]["Location"] == "s3://example-lake/scored/day=2026-11-20/run=2/data/"
    assert found["StorageDescriptor"]["Columns"] == storage["Columns"]
