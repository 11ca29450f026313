"""`Predict` in somebody's own pipeline: the rows stay as they are, the answers are the batch job's, nothing is dropped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from batch.stage import Predict
from tests.batch.workbench import Workbench, read_rows, x_of
from triform import testing
from triform.errors import AliasNotFound, DigestMismatch, InvalidInput
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.scoring import BATCH_ROWS

ADDED = ["y", "_model_version", "_error", "_reason"]


@pytest.fixture
def predict(lookup_repository: Path) -> Predict:
    return Predict(*Predict.pinned(str(lookup_repository), "lookup@stable"))


def table_of(rows: int) -> pa.Table:
    return pa.table({"id": range(rows), "x": pa.array([x_of(i) for i in range(rows)], pa.int64()), "note": ["n"] * rows})


def test_answers_stand_beside_the_rows_and_refused_ones_say_why(predict: Predict) -> None:
    table = table_of(100)
    answered = predict(table)
    assert answered.column_names == ["id", "x", "note", *ADDED]
    assert answered.select(table.column_names) == table
    codes = {None: "missing_value", 99: "run_failed"}
    for row in answered.to_pylist():
        dead = codes.get(row["x"])
        assert (row["_error"], row["_model_version"]) == (dead, "lookup/1")
        assert row["y"] == (None if dead else 10.0 * row["x"])
        assert (row["_reason"] is None) == (dead is None)
    assert "column 'x' is null" in answered["_reason"].to_pylist()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_schema_does_not_depend_on_the_rows(predict: Predict, rows: int) -> None:
    """Whether none is there, all are refused or all answered: Ray Data joins such blocks."""
    kinds = [str(kind) for kind in predict(table_of(100)).schema.types]
    for x in [[None] * rows, [99] * rows, [1] * rows]:
        table = pa.table(
            {"id": pa.array(range(rows), pa.int64()), "x": pa.array(x, pa.int64()), "note": pa.array(["n"] * rows, pa.string())}
        )
        answered = predict(table)
        assert [str(kind) for kind in answered.schema.types] == kinds
        assert answered.num_rows == rows


def test_a_large_table_in_odd_chunks_keeps_its_order(predict: Predict) -> None:
    rows = 3 * BATCH_ROWS + 17
    table = pa.concat_tables([table_of(rows).slice(start, 7001) for start in range(0, rows, 7001)])
    answered = predict(table)
    assert answered["id"].to_pylist() == list(range(rows))
    good = answered.filter(pc.is_null(answered["_error"]))
    assert good["y"].to_pylist() == [10.0 * x_of(i) for i in good["id"].to_pylist()]  # type: ignore[operator]
    assert good.num_rows == sum(x_of(i) not in (None, 99) for i in range(rows))


def test_the_answers_are_those_of_the_batch_job(workbench: Workbench, predict: Predict) -> None:
    summary = workbench.write_some(2).score_and_run()
    job = read_rows(summary.data).sort_by("id")
    stage = predict(read_rows(workbench.input)).sort_by("id")
    good = stage.filter(pc.is_null(stage["_error"]))
    assert good.select(["id", "note", "y", "_model_version"]) == job.select(["id", "note", "y", "_model_version"])
    letters = read_rows(f"{summary.folder}/dead_letters").sort_by("id")
    bad = stage.filter(pc.is_valid(stage["_error"]))
    assert bad.select(["id", "_error", "_reason"]).rename_columns(["id", "code", "reason"]) == letters.select(
        ["id", "code", "reason"]
    )


def test_vectors_are_answered_with_lists(repository: Callable[..., ModelRepository], tmp_path: Path) -> None:
    """A list a row, null where a row was refused."""
    made = repository(linear=testing.linear(tmp_path / "linear.onnx", features=2, outputs=2))
    table = pa.table({"x": pa.array([[1.0, 1.0], None, [1.0, 0.0]], pa.list_(pa.float32()))})
    answered = Predict(*Predict.pinned(made.location, "linear"))(table)
    assert answered["y"].to_pylist() == [[4.0, 6.0], None, [1.0, 2.0]]
    assert answered["_error"].to_pylist() == [None, "missing_value", None]


def test_faults_of_the_schema_are_errors(predict: Predict) -> None:
    with pytest.raises(InvalidInput, match="column 'x' is missing"):
        predict(table_of(3).drop_columns("x"))
    with pytest.raises(InvalidInput, match="column 'x' is string"):
        predict(table_of(3).set_column(1, "x", pa.array(["a", "b", "c"])))
    with pytest.raises(InvalidInput, match="'y' is one that the model adds"):
        predict(table_of(3).append_column("y", pa.array([1, 2, 3])))


def test_a_pinned_stage_keeps_its_version_when_the_alias_moves(lookup_repository: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(lookup_repository, models)
    pinned = Predict.pinned(str(models), "lookup@stable")
    ReleaseLog(open_repository(models), "lookup").set(stable=2)
    assert set(Predict(*pinned)(table_of(3))["_model_version"].to_pylist()) == {"lookup/1"}
    assert Predict.pinned(str(models), "lookup@stable")[1] == "lookup/2"
    with pytest.raises(AliasNotFound):
        Predict.pinned(str(models), "lookup@canary")


def test_a_model_that_was_exchanged_is_refused(lookup_repository: Path) -> None:
    location, ref, digest = Predict.pinned(str(lookup_repository), "lookup@stable")
    with pytest.raises(DigestMismatch, match="lookup/1 is not the package"):
        Predict(location, ref, digest[::-1])


def test_a_pipeline_of_ray_data(lookup_repository: Path, workbench: Workbench, ray_cluster: Any) -> None:
    import ray.data
    from ray.data.expressions import col

    workbench.write_some(4)
    answered = (
        ray.data.read_parquet(str(workbench.input), concurrency=1)
        .filter(expr=col("id") >= 100)  # empties a block
        .map_batches(
            Predict,
            fn_constructor_args=Predict.pinned(str(lookup_repository), "lookup@stable"),
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
    )
    answered.write_parquet(str(workbench.root / "mine"), concurrency=1)
    table = read_rows(workbench.root / "mine").sort_by("id")
    assert table.column_names[-4:] == ADDED
    assert table["id"].to_pylist() == list(range(100, 400))
    assert table["y"].to_pylist() == [None if x_of(i) in (None, 99) else 10.0 * x_of(i) for i in range(100, 400)]  # type: ignore[operator]


def test_a_pipeline_whose_model_does_not_load_fails_and_says_why(lookup_repository: Path, ray_cluster: Any) -> None:
    import ray.data

    location, ref, digest = Predict.pinned(str(lookup_repository), "lookup@stable")
    stage = ray.data.range(10).map_batches(
        Predict,
        fn_constructor_args=(location, ref, digest[::-1]),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    with pytest.raises(Exception, match="lookup/1 is not the package"):
        stage.take_all()
