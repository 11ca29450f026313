"""`triform package`, `inspect`, `verify` and `predict`, for people and for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from onnx import helper

from triform import testing
from triform.packaging import package_model
from triform.repository import open_repository
from triform.signature import DATATYPES
from triform.testing import save, value

Triform = Callable[..., Any]
ROWS = [{"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 0.0, "b": 0.5, "c": -1.0}]
TOML = """
description = "adds [up] what it is given"
[inputs.x]
columns = ["a", { name = "b", null = 0.5 }, "c"]
[outputs.y]
columns = ["total"]
"""


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A model with named columns in the working directory, and the command that packages it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIFORM_REPOSITORY", "models")
    testing.linear(Path("sums.onnx"))
    Path("sums.toml").write_text(TOML)
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Path("figures.json").write_text('{"auc": 0.875}')
    pq.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")
    pa.csv.write_csv(pa.Table.from_pylist(ROWS), "rows.csv")
    np.savez("rows.npz", x=np.array([[1, 2, 3], [0, 0.5, -1]], np.float32))
    return lambda *more: ["package", "sums.onnx", "--name", "sums", "--config", "sums.toml", "--samples", "rows.json", *more]


@pytest.fixture(scope="session")
def _packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 of sums, packaged once."""
    folder = tmp_path_factory.mktemp("sums")
    (folder / "sums.toml").write_text(TOML)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    package_model(
        testing.linear(folder / "sums.onnx"),
        name="sums",
        repository=open_repository(folder / "models"),
        config=folder / "sums.toml",
        samples=folder / "rows.json",
    )
    return folder / "models"


@pytest.fixture
def packaged(sums: Callable[..., list[str]], _packaged: Path) -> None:
    shutil.copytree(_packaged, "models")


def test_package_says_what_it_did(triform: Triform, sums: Callable[..., list[str]]) -> None:
    said = triform(*sums("--version", "4", "--evaluation", "figures.json"))
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("published sums/4 (digest ")
    assert said.out.endswith("rows exact\n")
    assert "auc 0.875" in triform("inspect", "sums").out
    said = triform(*sums("--json"))
    assert said.json.keys() == {"ref", "digest", "notes"}
    assert (said.json["ref"], len(said.json["digest"])) == ("sums/5", 64)
    testing.centred(Path("c.onnx"))
    said = triform("package", "c.onnx", "--name", "c")
    assert "note: rows depend on one another (ReduceMean 'm' runs over the batch axis)" in said.out


@pytest.mark.usefixtures("packaged")
def test_inspect_shows_what_a_package_holds_in_80_columns(triform: Triform) -> None:
    said = triform("inspect", "sums")
    assert (said.code, said.err) == (0, "")
    assert max(map(len, said.out.splitlines())) <= 80
    for piece in (
        *("sums/1", "adds [up] what it is given", "x FP32[rows, 3]", "a, b, c", "y FP32[rows, 1]", "total", "exact", "2 rows"),
        *("model.onnx", "golden.npz", "model.toml", "baseline.json", "fp32"),
    ):
        assert piece in said.out
    told = triform("inspect", "sums/1", "--json").json
    assert (told["columns"], told["output_columns"]) == (["a", "b", "c"], ["total"])
    unfolded = "".join(said.out.replace("│", "").split())
    assert told["manifest"]["digest"] in unfolded


@pytest.mark.usefixtures("packaged")
def test_a_packages_folder_does_as_well_as_a_reference(triform: Triform) -> None:
    assert triform("inspect", "models/sums/1", "--json").json == triform("inspect", "sums", "--json").json
    assert triform("verify", "models/sums/1").code == 0


@pytest.mark.usefixtures("packaged")
def test_verify_tells_a_sound_package_from_a_spoilt_one(triform: Triform) -> None:
    said = triform("verify", "sums", "--json")
    assert (said.code, said.json["ok"], said.json["ref"]) == (0, True, "sums/1")
    assert triform("verify", "sums").out.startswith(f"ok: sums/1, digest {said.json['digest']}")
    Path("models/sums/1/extra.bin").write_text("surprise")
    said = triform("verify", "sums", "--json")
    assert (said.code, said.json["code"]) == (1, "package_unsafe")


@pytest.mark.usefixtures("packaged")
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "npz"])
def test_rows_of_every_kind_are_answered_alike(triform: Triform, kind: str) -> None:
    said = triform("predict", "sums", f"rows.{kind}", "--json")
    assert (said.code, said.json, said.err) == (0, [{"total": 14.0}, {"total": -2.0}], "")


@pytest.mark.usefixtures("packaged")
def test_answers_go_to_every_kind_of_file(triform: Triform) -> None:
    for name in ("out.json", "out.csv", "out.parquet", "out[1][red].json"):
        said = triform("predict", "sums", "rows.csv", "--output", name)
        assert (said.code, said.out, said.err) == (0, "", f"2 rows to {name}\n")
    assert json.loads(Path("out.json").read_text()) == [{"total": 14.0}, {"total": -2.0}]
    assert Path("out.csv").read_text() == '"total"\n14\n-2\n'
    table = pq.read_table("out.parquet")
    assert table.to_pydict() == {"total": [14.0, -2.0]}
    assert table.schema.field("total").type == pa.float32()


@pytest.mark.usefixtures("packaged")
def test_no_rows_give_no_answers(triform: Triform) -> None:
    Path("none.json").write_text("[]")
    Path("none.csv").write_text("a,b,c\n")
    for name in ("none.json", "none.csv"):
        assert triform("predict", "sums", name, "--json").json == []


@pytest.mark.usefixtures("packaged")
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[{"a": 1, "b": 2}]', "row 0: column 'c' is missing or null"),
        ('[{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": null}]', "row 1: column 'c' is missing or null"),
        ('[{"a": "x", "b": 2, "c": 3}]', "column 'a'"),
        ('[{"a": 1e999, "b": 2, "c": 3}]', "cannot be read"),
        ('["[/red]"]', "row 0: expected an object"),
        ("[" * 100_000, "cannot be read"),
        ("\ufeff[]", "cannot be read"),
        ('"x"', "expected a list of objects"),
    ],
)
def test_rows_that_do_not_fit_are_told_by_file_row_and_column(triform: Triform, content: str, complaint: str) -> None:
    Path("bad.json").write_text(content)
    said = triform("predict", "sums", "bad.json")
    assert said.code == 2
    assert said.err.startswith("error: bad.json: ")
    assert complaint in said.err


@pytest.mark.usefixtures("packaged")
def test_a_null_gets_what_its_column_declares(triform: Triform) -> None:
    Path("null.json").write_text('[{"a": 1, "b": null, "c": 1}]')
    assert triform("predict", "sums", "null.json").json == [{"total": 5.0}]


def publish(triform: Triform, model: Path, toml: str = "") -> None:
    Path("m.toml").write_text(toml)
    assert triform("package", model, "--name", "m", "--config", "m.toml").code == 0


def predict(triform: Triform, rows: Any, *more: str) -> Any:
    Path("r.json").write_text(json.dumps(rows))
    return triform("predict", "m", "r.json", *more)


@pytest.mark.usefixtures("sums")
def test_text_with_marks_in_it_is_shown_as_it_is(triform: Triform) -> None:
    toml = '[inputs.x]\ncolumns = ["[/x]"]\n[outputs.y]\ncolumns = ["[red]y"]'
    publish(triform, testing.identity(Path("t.onnx"), "BYTES"), toml)
    assert predict(triform, [{"[/x]": "[/bold] é"}]).json == [{"[red]y": "[/bold] é"}]
    said = triform("inspect", "m")
    assert "[/x]" in said.out
    assert "[red]y" in said.out


@pytest.mark.usefixtures("sums")
def test_classes_are_shown_by_their_labels(triform: Triform) -> None:
    publish(triform, testing.identity(Path("i.onnx"), "INT64"), '[outputs.y]\nlabels = ["on time", "late"]')
    assert predict(triform, [{"x": 1}, {"x": 0}]).json == [{"y": "late"}, {"y": "on time"}]
    assert predict(triform, [{"x": 1}], "-o", "out.csv").code == 0
    assert Path("out.csv").read_text() == '"y"\n"late"\n'
    said = predict(triform, [{"x": 7}])
    assert said.code == 2
    assert "names 2 classes; the model answered 7" in said.err


@pytest.mark.usefixtures("sums")
def test_what_a_format_cannot_say_is_refused_with_one_that_can(triform: Triform) -> None:
    log = [helper.make_node("Log", ["x"], ["y"])]
    publish(triform, save(Path("log.onnx"), log, [value("x", "FP32", ["N", 2])], [value("y", "FP32", ["N", 2])]))
    said = predict(triform, [{"x": [0, 1]}])
    assert said.code == 2
    assert "is infinite in some row" in said.err
    assert predict(triform, [{"x": [-1, 1]}]).json == [{"y": [None, 0.0]}]
    said = predict(triform, [{"x": [1, 1]}], "-o", "out.csv")
    assert said.code == 2
    assert "write .json or .parquet" in said.err
    assert predict(triform, [{"x": [0, 1]}], "-o", "out.parquet").code == 0
    assert pq.read_table("out.parquet").to_pydict() == {"y": [[-np.inf, 0.0]]}


@pytest.mark.usefixtures("sums")
def test_every_datatype_goes_to_every_kind_of_file(triform: Triform) -> None:
    kinds = [d.oip for d in DATATYPES if d.oip not in ("BYTES", "BOOL")]
    nodes = [helper.make_node("Identity", [kind], [f"y_{kind}"]) for kind in kinds]
    inputs, outputs = [[value(f"{prefix}{kind}", kind, ["N"]) for kind in kinds] for prefix in ("", "y_")]
    publish(triform, save(Path("i.onnx"), nodes, inputs, outputs))
    row, want = dict.fromkeys(kinds, 1), {f"y_{kind}": 1 for kind in kinds}
    assert predict(triform, [row], "--json").json == [want]
    for name in ("out.csv", "out.parquet"):
        assert predict(triform, [row], "-o", name).code == 0
    assert pq.read_table("out.parquet").to_pylist() == [want]
    assert Path("out.csv").read_text().splitlines()[1] == ",".join("1" * len(kinds))


@pytest.mark.usefixtures("sums")
def test_a_row_that_makes_the_model_fail_is_told(triform: Triform) -> None:
    publish(triform, testing.lookup(Path("l.onnx")))
    said = predict(triform, [{"x": 3}, {"x": 99}])
    assert said.code == 1
    assert "[run_failed]" in said.err
    assert "idx=99" in said.err
