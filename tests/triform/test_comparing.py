"""A part's rows find their answers of the run again, whatever was refused between them and however windows and batches fall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper

from triform import comparing, testing
from triform.comparing import compare_part, score_column, shared_columns
from triform.disagreement import ComparedPart
from triform.features import Features
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.repository import ModelRepository, open_repository
from triform.rollout.windows import merge
from triform.scoring import Layout, Part, score_part
from triform.sources import fingerprint
from triform.tally import Tally

EDGES = (25.0, 65.0)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., ComparedPart]:
    """`compare(models, columns)`: scores a file with the first of two models, and compares it with the second. A model is an ONNX
    file and a model.toml's text."""

    def package(repository: ModelRepository, version: int, model: Path, config: str) -> Predictor:
        toml = tmp_path / f"{version}.toml"
        toml.write_text(config)
        package_model(model, name="m", repository=repository, version=version, config=toml)
        return Predictor.load(repository.package("m", version))

    def run(models: list[tuple[Path, str]], columns: dict[str, Any], first_row: int = 0) -> ComparedPart:
        repository = open_repository(tmp_path / "models")
        stable, candidate = (package(repository, i + 1, *model) for i, model in enumerate(models))
        file, data, letters = tmp_path / "in.parquet", tmp_path / "data.parquet", tmp_path / "letters.parquet"
        pq.write_table(table := pa.table(columns), file)
        part = Part(3, str(file), file.stat().st_size, fingerprint(file), (0,), first_row, table.num_rows)
        scored = score_part(part, stable, Layout(), data=data, dead_letters=letters)
        dead = pq.read_table(letters).to_pylist() if scored.dead else []
        refused = {row["row_number"]: row["code"] for row in dead}
        with pq.ParquetFile(data) as answers:
            return compare_part(part, stable, candidate, answers=answers, refused=refused, edges=EDGES)

    return run


@pytest.mark.parametrize("size", [7, 1000])
def test_each_row_meets_its_own_answer(
    compare: Callable[..., ComparedPart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Versions of ten and eight entries; nulls, which both refuse, and entries that one or none of them has."""
    monkeypatch.setattr(comparing, "TIMED_ROWS", size)
    monkeypatch.setattr(comparing, "WINDOWS", 1000)
    asked = np.random.default_rng(size).integers(0, 11, 100)
    null = np.random.default_rng(1).random(100) < 0.2
    values = [None if gone else int(x) for x, gone in zip(asked, null, strict=True)]
    models = [(testing.lookup(tmp_path / f"{n}.onnx", entries=n), "") for n in (10, 8)]
    found = compare(models, {"x": pa.array(values, pa.int64())}, first_row=1000)
    there = asked[~null]
    assert len(found.windows) == -(-100 // size)
    window = merge(found.windows)
    assert (found.code, window.shadowed.disagreed, window.shadowed.rows) == ("", 0, int((there < 8).sum()))
    assert (window.stable.requests, window.stable.errors, window.canary.errors) == (
        len(there), int((there == 10).sum()), int((there >= 8).sum()),
    )  # fmt: skip
    assert found.stable_refused["missing_value"] == found.candidate_refused["missing_value"] == int(null.sum())
    tens = 10 * there
    bins = [int((tens < 25).sum()), int(((tens >= 25) & (tens < 65)).sum())]
    assert window.stable.scores == (*bins, int(((tens >= 65) & (tens < 100)).sum()), 0)
    assert window.canary.scores == (*bins, int(((tens >= 65) & (tens < 80)).sum()), 0)


def test_labels_are_compared_as_the_output_has_them(compare: Callable[..., ComparedPart], tmp_path: Path) -> None:
    """The same class by another name is another answer."""
    model = testing.identity(tmp_path / "m.onnx", "INT64", shape=("N", 1))
    configs = ['[outputs.y]\nlabels = ["no", "yes"]\n', '[outputs.y]\nlabels = ["no", "maybe"]\n']
    found = compare([(model, config) for config in configs], {"x": [0, 1, 1, 0]})
    (column,) = found.columns
    assert (column.rows, found.disagreed, column.stable) == (2, 2, ())
    assert column.example is not None
    assert (column.example.row, column.example.stable, column.example.candidate) == (1, "yes", "maybe")


def test_another_datatype_is_compared_within_the_coarser_tolerance(compare: Callable[..., ComparedPart], tmp_path: Path) -> None:
    models = [(testing.identity(tmp_path / f"{kind}.onnx", kind, shape=("N", 1)), "") for kind in ("FP64", "FP32")]
    found = compare(models, {"x": pa.array([0.1, 1e6 + 0.03125, 30.0], pa.float32())})
    assert found.disagreed == 0
    assert found.columns[0].tolerance.rtol == pytest.approx(1e-5)


def test_lists(compare: Callable[..., ComparedPart], tmp_path: Path) -> None:
    models = [
        (testing.identity(tmp_path / "a.onnx", "FP32", shape=("N", 2)), ""),
        (testing.slow(tmp_path / "b.onnx", layers=1, width=2), ""),
    ]
    found = compare(models, {"x": [[1.0, 30.0], [70.0, 2.0]]})
    assert found.disagreed == 0
    assert found.windows[0].stable.scores == (1, 1, 0, 0)  # 30 and 2
    assert found.columns[0].stable == (1, 1, 0, 0)


def test_what_the_candidate_raises_is_its_fault(compare: Callable[..., ComparedPart], tmp_path: Path) -> None:
    """Its labels name fewer classes than it answers, which nobody notices before: the batch's rows are its errors."""
    model = testing.identity(tmp_path / "m.onnx", "INT64", shape=("N", 1))
    configs = ['[outputs.y]\nlabels = ["no", "yes"]\n', '[outputs.y]\nlabels = ["no"]\n']
    found = compare([(model, config) for config in configs], {"x": pa.array([0, None, 1], pa.int64())})
    assert (found.code, found.windows[0].complete) == ("configuration", False)
    assert "names 1 classes; the model answered 1" in found.error
    assert (found.windows[0].canary.requests, found.windows[0].canary.errors, found.windows[0].stable.errors) == (2, 2, 0)
    assert found.stable_refused == {"missing_value": 1}


def test_what_is_shared_and_what_the_gate_looks_at(tmp_path: Path) -> None:
    made = testing.repository(tmp_path / "models", {
        "text": testing.text_and_number(tmp_path / "t.onnx"), "linear": testing.linear(tmp_path / "l.onnx"),
    })  # fmt: skip
    text, linear = (Features((m := made.package(name, 1).manifest).signature, m.config) for name in ("text", "linear"))
    assert [a.name for a, _ in shared_columns(text, text)] == ["is_a", "twice"]
    assert score_column(text, text) == "twice"
    assert shared_columns(text, linear) == []
    assert score_column(text, linear) is None


OUTPUTS: list[tuple[int, str, tuple[int, ...]]] = [
    (2, "", (0, 2, 0, 0)),
    (2, '[outputs.y]\ncolumns = ["no", "yes"]', (0, 2, 0, 0)),
    (1, "", (1, 0, 1, 0)),
]


@pytest.mark.parametrize(("width", "config", "scores"), OUTPUTS, ids=["a list", "columns by name", "one value"])
def test_the_gate_sees_the_same_scores_here_and_online(
    compare: Callable[..., ComparedPart], tmp_path: Path, width: int, config: str, scores: tuple[int, ...]
) -> None:
    """However the columns of an output are named."""
    rows = np.array([[1.0, 30.0], [70.0, 40.0]], np.float32)[:, :width]
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    x, *made = (testing.value(name, "FP32", ["N", width]) for name in "xyz")
    model = testing.save(tmp_path / "m.onnx", nodes, [x], made)
    (window,) = compare([(model, config)] * 2, {"x": rows.tolist() if width > 1 else rows[:, 0]}).windows
    tally = Tally(EDGES, canary=2)
    tally.scored("canary", {"label": np.array([1, 0]), "y": rows, "z": -rows})
    assert window.canary.scores == window.stable.scores == tally.take().canary.scores == scores
