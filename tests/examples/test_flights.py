"""The flights example on its real data: built, scored on Ray, and held against what happened."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from batch.cli import run_folder
from batch.job import Summary
from examples import demo
from examples.flights import build, evaluate, online
from examples.flights.data import read_partitions
from examples.flights.mapping import read_columns
from infra.local.gateway import local_gateway
from triform.errors import TriformError
from triform.predictor import Predictor
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.runs import commit

ROWS, DEAD = 336_776, 1_573


def read(folder: Path | str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in sorted(Path(folder).glob("*.parquet"))])


def test_the_input_is_every_flight_once(flights: Path) -> None:
    table = read_partitions(flights / "input")
    assert table.num_rows == ROWS == len(pc.unique(table["id"]))
    assert len(list((flights / "input").glob("month=2013-*/part-0.parquet"))) == 12


def test_both_versions_verify_in_full_and_the_first_is_stable(flights: Path) -> None:
    repository = open_repository(flights / "repository")
    for version in 1, 2:
        package = repository.package("flight-delay", version)
        package.verify("full")
        assert Predictor.load(package).independence in ("exact", "close")
        assert package.manifest.evaluation["auc"] > 0.65
    release = ReleaseLog(repository, "flight-delay").current()
    assert release is not None
    assert (release.stable, release.canary) == (1, None)


def test_every_flight_is_scored_or_a_dead_letter(flights: Path, scored: Summary) -> None:
    assert (scored.manifest.rows_in, scored.manifest.dead) == (ROWS, {"missing_value": DEAD})
    dead, data = read(f"{scored.folder}/dead_letters"), read(scored.data)
    assert Counter(data["id"].to_pylist()) + Counter(dead["id"].to_pylist()) == Counter(range(ROWS))
    given = read_partitions(flights / "input")
    incomplete = pc.or_(pc.is_null(given["temp"]), pc.is_null(given["visib"]))
    assert sorted(dead["id"].to_pylist()) == sorted(given.filter(incomplete)["id"].to_pylist())
    assert set(read_columns().required) >= {"temp", "visib"}
    commit.verify(run_folder(scored.folder))


def test_dead_letters_lead_back_to_their_rows(scored: Summary) -> None:
    dead = read(f"{scored.folder}/dead_letters").slice(0, 50).to_pylist()
    for letter in dead:
        row = pq.read_table(letter["source_file"], partitioning=None).slice(letter["row_number"], 1).to_pylist()[0]
        raw = json.loads(letter["raw_row"])
        assert row["id"] == letter["id"] == raw["id"]
        assert (raw["carrier"], raw["temp"]) == (row["carrier"], row["temp"])
        assert letter["reason"].startswith("column '")


def test_the_scored_output_is_as_good_as_the_manifest_says(flights: Path, scored: Summary) -> None:
    """October to December, which the model has not seen: the graph in the batch job gives what training measured."""
    package = open_repository(flights / "repository").package("flight-delay", 1)
    said, found = package.manifest.evaluation, evaluate.evaluate(Path(scored.data), flights / "input")
    assert found["rows"] == said["rows"]
    for figure in "auc", "brier", "log_loss":
        assert found[figure] == pytest.approx(said[figure], abs=1e-6)


def test_the_output_answers_a_query(scored: Summary) -> None:
    query = f"SELECT count(*), count(DISTINCT carrier), min(p_late) >= 0, max(p_late) <= 1 FROM '{scored.data}/*.parquet'"  # noqa: S608
    assert duckdb.sql(query).fetchall() == [(ROWS - DEAD, 16, True, True)]


def test_a_second_build_leaves_what_stands(flights: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in flights.rglob("*.onnx")}
    build.build(flights)
    assert before == {path: path.stat().st_mtime_ns for path in flights.rglob("*.onnx")}


@pytest.mark.slow
def test_the_same_data_gives_the_same_digests(flights: Path, tmp_path: Path) -> None:
    build.build(tmp_path / "again")

    def digests(root: Path) -> list[str]:
        repository = open_repository(root / "repository")
        return [repository.package("flight-delay", version).manifest.digest for version in (1, 2)]

    assert digests(tmp_path / "again") == digests(flights)


def test_the_local_lambda_answers_as_the_batch_does(flights: Path, scored: Summary) -> None:
    asked_for = online.choose(flights, Path(scored.data), flights=100)
    assert len(asked_for.records) == len(asked_for.batch) == 100
    with local_gateway(environ={"TRIFORM_REPOSITORY": str(flights / "repository")}, max_concurrency=1) as gateway:
        for ask in online.ask_json, online.ask_binary:
            asked = ask("Lambda", gateway.url.removeprefix("http://"), asked_for)
            assert asked.agrees(asked_for)
            assert (asked.millis > 0).all()


def test_the_demo_ends_with_an_error_where_the_forms_disagree(flights: Path, scored: Summary) -> None:
    asked_for = online.choose(flights, Path(scored.data), flights=4)
    bound, millis = asked_for.bound[2], np.array([9, 1, 2, 3])
    one_bit = online.Asked("Serve", "gRPC", np.nextafter(asked_for.batch, np.float32(2)), millis)
    assert (one_bit.agrees(asked_for), one_bit.equal(asked_for)) == (True, 0)
    far = online.Asked("Serve", "gRPC", asked_for.batch + np.float32([0, 0, 3 * bound, 0]), millis)
    assert far.equal(asked_for) == 3
    told = io.StringIO()
    with pytest.raises(TriformError, match=r"^Serve \(gRPC\) and batch disagree by "):
        demo.print_agreement(asked_for, [one_bit, far], Console(file=told, width=120))
    assert "3 of 4" in told.getvalue()


@pytest.mark.slow  # a Ray of its own, and all of the example
def test_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo", "--to", tmp_path / "flights"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^│ (\w+)\s+│ ([\w ]+?)\s+│ \d+ of 1000", done.stdout, re.MULTILINE)
    protocols = ["REST JSON", "REST binary"]
    assert rows == [("Lambda", p) for p in protocols] + [("Serve", p) for p in (*protocols, "gRPC")]
