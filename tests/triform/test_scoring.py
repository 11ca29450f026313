"""Parts are scored from file to file, without Ray: right answers, right dead letters, right row numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triform import scoring, testing
from triform.errors import InputChanged, InputUnreadable, InvalidInput, JobError, TooManyDeadLetters
from triform.predictor import Predictor
from triform.scoring import BATCH_ROWS, Layout, Part, ScoredPart, score_part
from triform.sources import fingerprint

LINEAR = '[inputs.x]\ncolumns = ["a", { name = "b", null = "nan" }, { name = "c", null = 7 }]\n'
Scored = tuple[ScoredPart, pa.Table, pa.Table | None]


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Predictor]:
    root = tmp_path_factory.mktemp("models")
    models = {
        "linear": testing.linear(root / "linear.onnx"),
        "lookup": testing.lookup(root / "lookup.onnx"),
        "centred": testing.centred(root / "centred.onnx"),
        "vectors": testing.identity(root / "vectors.onnx", "FP32", shape=("N", 3)),
        "words": testing.identity(root / "words.onnx", "BYTES"),
        "bytes": testing.identity(root / "bytes.onnx", "UINT8"),
    }
    config = {"linear": LINEAR, "centred": '[inputs.x]\ncolumns = ["a", "b"]\n'}
    repository = testing.repository(root / "models", models, config=config)
    return lambda name: Predictor.load(repository.package(name, 1))


def part_of(path: Path, *groups: int) -> Part:
    """The row groups of a file as a part; all of them where none are named."""
    metadata = pq.read_metadata(path)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    chosen = groups or tuple(range(len(rows)))
    first = sum(rows[: chosen[0]]) if chosen else 0
    return Part(3, str(path), path.stat().st_size, fingerprint(path), chosen, first, sum(rows[i] for i in chosen))


def score(part: Part, predictor: Predictor, layout: Layout | None = None, **options: Any) -> Scored:
    folder = Path(part.path).parent
    data, dead = folder / "data.parquet", folder / "dead.parquet"
    scored = score_part(part, predictor, layout or Layout(), data=data, dead_letters=dead, **options)
    assert scored.rows_in == part.rows == scored.rows_out + scored.rows_dead
    assert dead.exists() == bool(scored.rows_dead)
    return scored, pq.read_table(data), pq.read_table(dead) if dead.exists() else None


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_answers_are_the_predictors_for_the_whole_file(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH_ROWS + 5000, 3), dtype=np.float32)
    file = write(
        tmp_path / "in.parquet",
        {"id": np.arange(len(x)), "a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "kept": [str(i) for i in range(len(x))]},
        row_group_size=6000,
    )
    predictor = predictors("linear")
    layout = Layout(key=("id",), keep=("kept", "id"), scored_at="2026-01-02T03:04:05+00:00")
    scored, data, dead = score(part_of(file), predictor, layout)
    assert dead is None
    assert scored.dead_letters is None
    assert data.column_names == ["id", "kept", "y", "_model_version", "_scored_at"]
    assert data["id"].to_pylist() == list(range(len(x)))
    assert data["kept"].to_pylist() == [str(i) for i in range(len(x))]
    tolerance = predictor.manifest.row_independence.tolerance
    np.testing.assert_allclose(
        data["y"].to_numpy(),
        predictor.predict({"x": x})["y"][:, 0],
        rtol=max(tolerance.rtol, 1e-6),
        atol=max(tolerance.atol, 1e-6),
    )
    assert set(data["_model_version"].to_pylist()) == {"linear/1"}
    assert {stamp.isoformat() for stamp in data["_scored_at"].unique().to_pylist()} == {layout.scored_at}


@pytest.mark.parametrize("groups", [(), (0,), (1, 2), (3,)], ids=str)
def test_null_rows_are_dead_letters_with_their_place_in_the_file(
    tmp_path: Path, predictors: Callable[[str], Predictor], groups: tuple[int, ...]
) -> None:
    a = [None if i % 10 == 4 else float(i) for i in range(95)]
    b = [None if i % 3 == 0 else 1.0 for i in range(95)]
    file = write(tmp_path / "in.parquet", {"a": a, "b": b, "c": pa.nulls(95, pa.float64()), "more": range(95)}, row_group_size=30)
    part = part_of(file, *groups)
    scored, data, dead = score(part, predictors("linear"), Layout(key=("more",)))
    rows = range(part.first_row, part.first_row + part.rows)
    lost = [i for i in rows if a[i] is None]
    assert scored.dead == {"missing_value": len(lost)}
    assert dead is not None
    assert dead["row_number"].to_pylist() == dead["more"].to_pylist() == lost
    assert set(dead["source_file"].to_pylist()) == {str(file)}
    assert set(dead["reason"].to_pylist()) == {"column 'a' is null"}
    assert [json.loads(row) for row in dead["raw_row"].to_pylist()] == [
        {"a": None, "b": b[i], "c": None, "more": i} for i in lost
    ]
    assert data["more"].to_pylist() == [i for i in rows if a[i] is not None]
    expected = [float(np.float32(i + (np.nan if b[i] is None else 2.0) + 21.0)) for i in rows if a[i] is not None]
    np.testing.assert_allclose(data["y"].to_numpy(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_make_the_run_fail_are_found_and_the_others_scored(
    tmp_path: Path, predictors: Callable[[str], Predictor], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 10, BATCH_ROWS + 777)
    bad = rng.choice(len(x), size=[1, 2, 40, 300][seed], replace=False)
    x[bad] = rng.choice([10, 11, 2**40, -11], len(bad))
    file = write(tmp_path / "in.parquet", {"x": x}, row_group_size=5000)
    scored, data, dead = score(part_of(file), predictors("lookup"))
    assert dead is not None
    assert dead["row_number"].to_pylist() == sorted(bad.tolist())
    assert scored.dead == {"run_failed": len(bad)}
    assert [json.loads(row)["x"] for row in dead["raw_row"].to_pylist()] == x[np.sort(bad)].tolist()
    assert data["y"].to_pylist() == (10.0 * np.delete(x, bad)).tolist()
    assert all(reason.startswith("the model raised: ") and str(tmp_path) not in reason for reason in dead["reason"].to_pylist())


def test_both_kinds_of_dead_letters_keep_their_rows_apart(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    x = [None if i % 7 == 0 else 99 if i % 5 == 0 else i % 10 for i in range(100)]
    _, data, dead = score(
        part_of(write(tmp_path / "in.parquet", {"i": range(100), "x": x})), predictors("lookup"), Layout(keep=("i",))
    )
    assert dead is not None
    kinds = dict(zip(dead["row_number"].to_pylist(), dead["code"].to_pylist(), strict=True))
    assert kinds == {i: "missing_value" if v is None else "run_failed" for i, v in enumerate(x) if v in (None, 99)}
    assert dead["row_number"].to_pylist() == sorted(kinds)
    assert data["i"].to_pylist() == [i for i, v in enumerate(x) if v not in (None, 99)]


def test_a_file_without_one_good_row_has_an_empty_answer(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    scored, data, _ = score(part_of(write(tmp_path / "in.parquet", {"x": [99] * 10})), predictors("lookup"))
    assert (scored.rows_out, data.num_rows) == (0, 0)
    assert data.schema.field("y").type == pa.float32()


def test_rows_of_a_dependent_model_are_scored_one_by_one(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    x = np.random.default_rng(3).standard_normal((300, 2), dtype=np.float32)
    predictor = predictors("centred")
    assert predictor.independence == "dependent"
    _, data, _ = score(part_of(write(tmp_path / "in.parquet", {"a": x[:, 0], "b": x[:, 1]})), predictor)
    alone = [predictor.predict({"x": row[None]})["y"][0].tolist() for row in x]
    assert data["y"].to_pylist() == alone
    assert alone != predictor.run_graph({"x": x})["y"].tolist()  # what the bare graph would have said


def test_lists_that_do_not_fit_are_dead_letters(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    x = [[1, 2, 3], [1, 2], None, [4, 5, 6], [], [1, None, 3], [1, 2, 3, 4], [7, 8, 9]]
    file = write(tmp_path / "in.parquet", {"x": pa.array(x, pa.list_(pa.float32()))})
    scored, data, dead = score(part_of(file), predictors("vectors"))
    assert data["y"].to_pylist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert dead is not None
    assert dead["row_number"].to_pylist() == [1, 2, 4, 5, 6]
    assert scored.dead == {"invalid_input": 3, "missing_value": 2}


def test_values_that_the_cast_would_change_are_dead_letters(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    file = write(tmp_path / "in.parquet", {"x": [1.0, 2.5, 255.0, 256.0, -1.0, float("nan"), 0.0]})
    scored, data, dead = score(part_of(file), predictors("bytes"))
    assert data["y"].to_pylist() == [1, 255, 0]
    assert dead is not None
    assert dead["row_number"].to_pylist() == [1, 3, 4, 5]
    assert scored.dead == {"invalid_input": 4}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_text_is_scored_and_carried(
    tmp_path: Path, predictors: Callable[[str], Predictor], kind: pa.DataType
) -> None:
    words = pa.array(["a", "", None, "ü" * 100, "a\0"], pa.string()).cast(kind)
    file = write(tmp_path / "in.parquet", {"x": words, "kept": words})
    _, data, dead = score(part_of(file), predictors("words"), Layout(key=("kept",)))
    assert data["y"].to_pylist() == data["kept"].to_pylist() == ["a", "", "ü" * 100, "a\0"]
    assert dead is not None
    assert dead["row_number"].to_pylist() == [2]


@pytest.mark.parametrize(
    ("columns", "names"),
    [({"a": [1.0], "b": [1.0]}, "'c' is missing"), ({"a": ["1"], "b": [1.0], "c": [1.0]}, "'a' is string")],
)
def test_a_drifted_schema_is_refused(
    tmp_path: Path, predictors: Callable[[str], Predictor], columns: dict[str, Any], names: str
) -> None:
    with pytest.raises(InvalidInput, match=names):
        score(part_of(write(tmp_path / "in.parquet", columns)), predictors("linear"))


@pytest.mark.parametrize("group", [None, 10])
def test_no_rows_give_an_empty_file_of_the_right_schema(
    tmp_path: Path, predictors: Callable[[str], Predictor], group: int | None
) -> None:
    file = write(tmp_path / "in.parquet", {"x": pa.array([], pa.int64())}, row_group_size=group)
    scored, data, dead = score(part_of(file), predictors("lookup"))
    assert (scored.rows_in, data.num_rows, dead) == (0, 0, None)
    assert data.column_names == ["y", "_model_version", "_scored_at"]


def test_too_many_dead_letters_end_the_work_early(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    rows = 4 * BATCH_ROWS
    file = write(tmp_path / "in.parquet", {"x": [None if i % 2 else 1 for i in range(rows)]})
    with pytest.raises(TooManyDeadLetters, match=f"{BATCH_ROWS // 2} dead letters in its first {BATCH_ROWS} rows.*missing_value"):
        score(part_of(file), predictors("lookup"), max_dead=100)
    assert score(part_of(file), predictors("lookup"), max_dead=rows // 2)[0].rows_dead == rows // 2


def test_a_file_that_was_replaced_or_removed_is_named(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    file = write(tmp_path / "in.parquet", {"x": [1, 2, 3]})
    part = part_of(file)
    write(file, {"x": [1, 2, 4]})
    with pytest.raises(InputChanged, match=r"in\.parquet"):
        score(part, predictors("lookup"))
    file.unlink()
    with pytest.raises(InputUnreadable, match=r"in\.parquet"):
        score(part, predictors("lookup"))


def test_a_value_that_moves_no_statistic_still_makes_another_file(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    file = write(tmp_path / "in.parquet", {"x": [0, 5, 6, 9]})
    part = part_of(file)
    write(file, {"x": [0, 6, 5, 9]})
    assert file.stat().st_size == part.size
    with pytest.raises(InputChanged, match=r"in\.parquet"):
        score(part, predictors("lookup"))


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 100, b"PAR1" + b"x" * 100 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_file_is_unreadable(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "in.parquet"
    file.write_bytes(damage)
    with pytest.raises(InputUnreadable, match=r"in\.parquet"):
        fingerprint(file)


def test_a_cut_file_is_unreadable(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", {"x": range(1000)})
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputUnreadable, match="cut off"):
        fingerprint(file)


@pytest.mark.parametrize("column", ["x", "other"])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_corrupt_page_is_unreadable(
    tmp_path: Path, predictors: Callable[[str], Predictor], compression: str, column: str
) -> None:
    """Also in a column that only the dead letters read. Uncompressed pages show it by their checksums."""
    rng = np.random.default_rng(5)
    columns = {"x": [99, *[1] * 1999], "other": rng.standard_normal(2000)}
    file = write(tmp_path / "in.parquet", columns, compression=compression, use_dictionary=False, write_page_checksum=True)
    chunk = next(c for c in map(pq.read_metadata(file).row_group(0).column, range(2)) if c.path_in_schema == column)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content = bytearray(file.read_bytes())
    content[middle : middle + 8] = b"\xa5" * 8
    file.write_bytes(content)
    with pytest.raises(InputUnreadable, match=r"in\.parquet"):
        score(part_of(file), predictors("lookup"))


def test_every_refusal_of_a_part_is_an_error_of_ours(tmp_path: Path, predictors: Callable[[str], Predictor]) -> None:
    """Text that is not UTF-8 is one bad row or one bad part, never an exception that a worker does not know."""
    words = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary()).view(pa.string())
    try:
        _, data, dead = score(part_of(write(tmp_path / "in.parquet", {"x": words})), predictors("words"))
    except (InvalidInput, JobError):
        return
    assert dead is not None
    assert (data["y"].to_pylist(), dead["row_number"].to_pylist()) == (["a", "b"], [1])


@pytest.mark.parametrize("kept", [0, scoring.KEPT_BYTES])
@pytest.mark.parametrize("others", [{}, {"note": 2, "at": 1}])
def test_a_dead_letter_has_its_whole_row_whether_it_was_kept_or_is_read_again(
    tmp_path: Path, predictors: Callable[[str], Predictor], monkeypatch: pytest.MonkeyPatch, kept: int, others: dict[str, int]
) -> None:
    """Over several batches and row groups, with the columns that the model reads, those it does not, and the key."""
    monkeypatch.setattr(scoring, "KEPT_BYTES", kept)
    rows = BATCH_ROWS + 1000
    columns = {name: [f"{name}-{i % 7**power}" for i in range(rows)] for name, power in others.items()}
    texts = [None if i % 1000 == 3 else f"word {i % 10}" for i in range(rows)]
    table = columns | {"x": texts, "id": list(range(rows))}
    file = write(tmp_path / "in.parquet", table, row_group_size=20_000)
    _, data, dead = score(part_of(file), predictors("words"), Layout(key=("id",)))
    expected = [i for i in range(rows) if texts[i] is None]
    assert dead is not None
    assert dead["id"].to_pylist() == dead["row_number"].to_pylist() == expected
    assert [json.loads(row) for row in dead["raw_row"].to_pylist()] == [{n: v[i] for n, v in table.items()} for i in expected]
    assert data["y"].to_pylist() == [text for text in texts if text is not None]


@pytest.mark.parametrize("words", [3, 40_000])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_is_the_same_however_the_file_holds_it(
    tmp_path: Path, predictors: Callable[[str], Predictor], words: int, kind: pa.DataType
) -> None:
    """Few words and more than a batch has rows; as input only, and carried into the output too."""
    texts = [f"word {i % words}" for i in range(2 * 40_000)]
    column = pa.array(texts)
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    file = write(tmp_path / "in.parquet", {"x": column}, dictionary_pagesize_limit=1 << 24)
    for layout in Layout(), Layout(keep=("x",)):
        _, data, _ = score(part_of(file), predictors("words"), layout)
        assert data["y"].to_pylist() == texts
        assert data.column_names[:-3] == list(layout.keep)
        assert not layout.keep or (data["x"].to_pylist() == texts and data.schema.field("x").type == kind)
