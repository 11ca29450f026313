"""Rows out of files: every format gives the same tensors, and a row that does not fit is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triform.config import Column, InputConfig, ModelConfig
from triform.errors import InvalidInput, MissingValue
from triform.features import Features
from triform.rows import read
from triform.signature import ROWS, Signature, TensorMetadata

TENSORS = (
    TensorMetadata("X", "FP32", (ROWS, 2)),
    TensorMetadata("n", "INT64", (ROWS,)),
    TensorMetadata("word", "BYTES", (ROWS, 1)),
)
CONFIG = ModelConfig(
    inputs={
        "X": InputConfig(columns=("a", Column("b", "nan"))),
        "word": InputConfig(null="?"),
        "n": InputConfig(columns=("count",)),
    }
)
FEATURES = Features(Signature(TENSORS, ()), CONFIG)
RECORDS: list[dict[str, Any]] = [
    {"a": 1.5, "b": None, "count": 3, "word": "007", "unused": 1},
    {"a": 2.0, "b": 4.5, "count": 2**53 + 1, "word": 'é, "quoted"', "unused": 2},
    {"a": -1.0, "b": 0.5, "count": -1, "word": None, "unused": 3},
]


def _csv(records: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else '"' + value.replace('"', '""') + '"' if isinstance(value, str) else str(value)

    return "\n".join([",".join(records[0]), *(",".join(map(cell, r.values())) for r in records)]) + "\n"


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "json": lambda p, r: p.write_text(json.dumps(r)),
    "instances.json": lambda p, r: p.write_text(json.dumps({"instances": r})),
    "jsonl": lambda p, r: p.write_text("\n\n".join(map(json.dumps, r))),
    "csv": lambda p, r: p.write_text(_csv(r)),
    "parquet": lambda p, r: pq.write_table(pa.Table.from_pylist(r), p, row_group_size=2),
}


def written(tmp_path: Path, kind: str, records: list[dict[str, Any]] = RECORDS) -> Path:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, records)
    return path


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_format_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    rows = read(written(tmp_path, kind), FEATURES)
    assert len(rows) == 3
    np.testing.assert_array_equal(rows.inputs["X"], np.array([[1.5, np.nan], [2, 4.5], [-1, 0.5]], np.float32))
    assert rows.inputs["n"].tolist() == [3, 2**53 + 1, -1]
    assert rows.inputs["word"].tolist() == [["007"], ['é, "quoted"'], ["?"]]
    assert list(rows.columns) == ["a", "b", "count", "word"]
    assert list(rows.columns["count"]) == [3, 2**53 + 1, -1]


def test_npz_holds_the_tensors_themselves(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", X=np.ones((2, 2)), n=[1, 2], word=[["a"], ["b"]])
    rows = read(tmp_path / "rows.npz", FEATURES)
    assert {n: a.dtype.kind for n, a in rows.inputs.items()} == {"X": "f", "n": "i", "word": "U"}
    assert (len(rows), rows.columns) == (2, {})


@pytest.mark.parametrize("kind", [k for k in WRITERS if k != "csv"])
def test_a_row_that_does_not_fit_is_named(kind: str, tmp_path: Path) -> None:
    spoilt = [*RECORDS[:2], RECORDS[2] | {"a": None}]
    with pytest.raises(MissingValue, match=r"rows\..*: row 2: column 'a' is (missing or )?null") as error:
        read(written(tmp_path, kind, spoilt), FEATURES)
    assert error.value.row == 2
    with pytest.raises(InvalidInput, match="row 1: column 'a': 1e\\+39 cannot be held as FP32"):
        read(written(tmp_path, kind, [RECORDS[0], RECORDS[1] | {"a": 1e39}]), FEATURES)


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_missing_column_is_named(kind: str, tmp_path: Path) -> None:
    without = [{k: v for k, v in r.items() if k != "count"} for r in RECORDS]
    with pytest.raises(InvalidInput, match="column 'count' is missing"):
        read(written(tmp_path, kind, without), FEATURES)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_nothing_but_nulls(kind: str, tmp_path: Path) -> None:
    rows = read(written(tmp_path, kind, [RECORDS[0] | {"word": None}]), FEATURES)
    assert np.isnan(rows.inputs["X"][0, 1])
    assert rows.inputs["word"].tolist() == [["?"]]


def test_digits_in_a_csv_are_text_where_the_model_takes_text(tmp_path: Path) -> None:
    rows = read(written(tmp_path, "csv", [r | {"word": f"00{i}"} for i, r in enumerate(RECORDS)]), FEATURES)
    assert rows.inputs["word"].tolist() == [["000"], ["001"], ["002"]]


@pytest.mark.parametrize("word", ["NA", "nan", "null", "N/A", "#N/A"])
def test_only_an_empty_cell_of_a_csv_is_null(tmp_path: Path, word: str) -> None:
    rows = read(written(tmp_path, "csv", [RECORDS[0] | {"word": word}, RECORDS[2]]), FEATURES)
    assert rows.inputs["word"].ravel().tolist() == [word, "?"]


def test_a_csv_keeps_the_digits_of_the_largest_integers(tmp_path: Path) -> None:
    features = Features(Signature((TensorMetadata("n", "UINT64", (ROWS,)),), ()), ModelConfig())
    rows = read(written(tmp_path, "csv", [{"n": 2**64 - 1}, {"n": 1}]), features)
    assert rows.inputs["n"].tolist() == [2**64 - 1, 1]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_no_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    schema = pa.schema({"a": pa.float32(), "b": pa.float32(), "count": pa.int64(), "word": pa.string()})
    if kind == "parquet":
        pq.write_table(schema.empty_table(), path)
    else:
        path.write_text({"json": "[]", "jsonl": "", "csv": "a,b,count,word\n"}[kind])
    rows = read(path, FEATURES)
    assert len(rows) == 0
    assert {n: (a.shape, a.dtype.kind) for n, a in rows.inputs.items() if n != "word"} == {"X": ((0, 2), "f"), "n": ((0,), "i")}


def _zip_cut(path: Path) -> None:
    np.savez_compressed(path, X=np.arange(10_000))
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\0" * 100 + content[200:])


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no such file": ("a.json", lambda _: None, "No such file"),
    "another ending": ("a.xlsx", lambda p: p.write_text(""), "must end in one of .json, .jsonl"),
    "cut JSON": ("a.json", lambda p: p.write_text('[{"a": 1'), "cannot be read"),
    "deep JSON": ("a.json", lambda p: p.write_text("[" * 250_000), "cannot be read"),
    "JSON NaN": ("a.json", lambda p: p.write_text('[{"a": NaN}]'), "cannot be read"),
    "an object": ("a.json", lambda p: p.write_text('{"a": [1]}'), "expected a list of objects"),
    "no objects": ("a.json", lambda p: p.write_text("[[1]]"), "row 0: expected an object of named columns, got list"),
    "a broken line": ("a.jsonl", lambda p: p.write_text('\n{"a": 1}\n{"a":\n'), "line 3: "),
    "empty CSV": ("a.csv", lambda p: p.write_text(""), "cannot be read"),
    "ragged CSV": ("a.csv", lambda p: p.write_text("a,b\n1,2\n3\n"), "cannot be read"),
    "text in CSV": ("a.csv", lambda p: p.write_text("a,b,count,word\n1,2,3,x\nlots,2,3,x\n"), "column 'a' is string"),
    "cut Parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1 and no more"), "cannot be read"),
    "pickled array": ("a.npz", lambda p: np.savez(p, X=np.array([{}], dtype=object)), "allow_pickle"),
    "pickle": ("a.npz", lambda p: p.write_bytes(pickle.dumps({})), "not a npz file"),
    "npy": ("a.npz", lambda p: p.write_bytes(b"\x93NUMPY"), "not a npz file"),
    "cut npz": ("a.npz", _zip_cut, "cannot be read"),
    "npz short of a tensor": ("a.npz", lambda p: np.savez(p, X=np.ones((1, 2))), "input 'n' is missing"),
    "npz of another shape": (
        "a.npz",
        lambda p: np.savez(p, X=np.ones((1, 3)), n=[1], word=[["a"]]),
        "input 'X': expected X FP32[rows, 2], got shape [1, 3]",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_file_that_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    name, write, told = BROKEN[case]
    write(tmp_path / name)
    with pytest.raises(InvalidInput) as error:
        read(tmp_path / name, FEATURES)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert told in str(error.value)
