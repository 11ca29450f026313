"""CSV and JSON Lines as Parquet: each row gets what it would get alone, or is a dead letter."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triform import testing
from triform.errors import InputUnreadable, InvalidInput
from triform.predictor import Predictor
from triform.runs.converted import convert
from triform.scoring import Layout, Part, score_part
from triform.sources import Identity

HERE = Identity(1, "etag")
KINDS = {"FP32": ("N",), "FP64": ("N", 1), "INT64": ("N",), "INT8": ("N", 2), "UINT64": ("N",), "BOOL": ("N",), "BYTES": ("N",)}


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    """y = x, by datatype."""
    root = tmp_path_factory.mktemp("identities")
    made = {kind.lower(): testing.identity(root / f"{kind}.onnx", kind, shape=shape) for kind, shape in KINDS.items()}
    repository = testing.repository(root / "models", made)
    return {kind: Predictor.load(repository.package(kind.lower(), 1), verification="sealed") for kind in KINDS}


class Scored:
    """What came of a file's rows, by row number: the answers, and the codes and raw rows of the dead."""

    def __init__(self, content: bytes, name: str, predictor: Predictor, folder: Path) -> None:
        from triform.features import Features

        location = f"s3://bucket/{name}"
        features = Features(predictor.signature, predictor.manifest.config)
        sources = convert(content, location, HERE, features, folder / "rows.parquet")
        file, _ = sources.file()
        part = Part(0, location, HERE.size, HERE.fingerprint, tuple(range(len(file.row_groups))), 0, file.rows)
        data, dead = folder / "data.parquet", folder / "dead.parquet"
        score_part(part, predictor, Layout(), data=data, dead_letters=dead, sources=sources)
        self.rows = file.rows
        letters = pq.read_table(dead).to_pylist() if dead.exists() else []
        self.dead = {letter["row_number"]: letter["code"] for letter in letters}
        self.reasons = {letter["row_number"]: letter["reason"] for letter in letters}
        self.raw = {letter["row_number"]: json.loads(letter["raw_row"]) for letter in letters}
        alive = [row for row in range(file.rows) if row not in self.dead]
        self.answers = dict(zip(alive, pq.read_table(data)["y"].to_pylist(), strict=True))


def alone(record: dict[str, Any], predictor: Predictor) -> Any:
    """The answer to one record by itself; the error's code where there is none."""
    from triform.features import Features

    features = Features(predictor.signature, predictor.manifest.config)
    try:
        answer = predictor.predict(features.from_records([record]))
    except InvalidInput as error:
        return error.code
    return features.to_columns(answer)["y"][0]


numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-300, 300),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([2**24 + 1, 2**53 + 1, 2**63, -(2**63), 1.0, 1e300, 3e38, 0.1]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
values = st.one_of(numbers, st.sampled_from(["a", "", "1", "ü\0"]), st.lists(numbers, max_size=3), st.just({}), st.just([[1]]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_line_gets_what_its_record_gets_alone(
    kind: str, data: st.DataObject, predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    column = data.draw(st.lists(st.one_of(numbers, values), min_size=1, max_size=8))
    content = b"\n".join(orjson.dumps({"x": value}) for value in column)
    scored = Scored(content, "a.jsonl", predictors[kind], tmp_path_factory.mktemp("scored"))
    assert scored.rows == len(column)
    for row, value in enumerate(column):
        want = alone({"x": value}, predictors[kind])
        if isinstance(want, str) and want in ("invalid_input", "missing_value") and row in scored.dead:
            assert scored.raw[row] == {"x": value}
            continue
        assert row in scored.answers, (value, want, scored.dead[row])
        have = scored.answers[row]
        assert np.array_equal(np.asarray(have), np.asarray(want), equal_nan=kind.startswith("FP")), (value, want, have)


cells = st.one_of(
    st.just(""),
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(str),
    st.sampled_from(["two", "1e400", "0x1", " 7 ", "true", "NA", "1_000", "-", "+5", "5.", ".5"]),
)


notes = st.sampled_from(["a", 'q"uote', "new\nline", "com,ma", "ü"])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(cells, st.sampled_from(["a", 'q"uote', "new\nline", "com,ma", "ü"]), st.booleans()), min_size=1, max_size=8
    )
)
def test_a_line_of_csv_is_a_row_or_a_dead_letter(
    predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str, bool]]
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "note"])
    for cell, note, whole in lines:
        writer.writerow([cell, note] if whole else [cell, note, "too many"])
    scored = Scored(text.getvalue().encode(), "a.csv", predictors["FP64"], tmp_path_factory.mktemp("scored"))
    assert scored.rows == len(lines)
    for row, (cell, note, whole) in enumerate(lines):
        if row in scored.answers:
            assert whole
            assert scored.answers[row] == float({"true": "1"}.get(cell.strip(), cell))
        elif not whole:
            assert isinstance(scored.raw[row], str)
        else:
            assert scored.raw[row]["note"] == note
            number = cell.strip() not in ("two", "0x1", "true", "NA", "-", "1_000", "")
            assert not number or math.isinf(float(cell)) or abs(float(cell)) > 2**53, cell


def test_rows_of_many_groups_keep_their_numbers(
    predictors: dict[str, Predictor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triform.runs.converted.ROW_GROUP", 7)
    bad = {3, 20, 21, 49}
    content = b"".join(b'{"x": nonsense}\n' if row in bad else b'{"x": %d}\n' % row for row in range(50))
    scored = Scored(content, "a.ndjson", predictors["INT64"], tmp_path)
    assert set(scored.dead) == bad
    assert scored.answers == {row: row for row in range(50) if row not in bad}
    assert scored.raw[20] == '{"x": nonsense}'


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"1"), ("a.csv", b""), ("a", b"x\n1\n"), ("a.csv", b"x\n\xff\n")])
def test_a_file_that_is_none_of_these_is_named(
    name: str, content: bytes, predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    with pytest.raises(InputUnreadable, match=f"s3://bucket/{name}"):
        Scored(content, name, predictors["FP32"], tmp_path)


def test_extra_columns_of_no_common_type_are_kept_as_json(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    content = b'{"x": 1, "more": {"a": 1}}\n{"x": "bad", "more": 7}\n{"x": null, "more": "t"}\n'
    scored = Scored(content, "a.jsonl", predictors["INT64"], tmp_path)
    assert scored.dead == {1: "invalid_input", 2: "missing_value"}
    assert scored.raw[1] == {"x": "bad", "more": 7}


def test_objects_in_extra_columns_stay_json(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    """As a struct they would have a child for each key that there ever was."""
    values = [{}, {"a": 1}, {"b": [{"c": None}]}, [[1]], None]
    content = b"".join(orjson.dumps({"x": 1, "more": value}) + b"\n" for value in values)
    table = pq.read_table(converted(content, "a.jsonl", predictors["INT64"], tmp_path))
    assert [text and orjson.loads(text) for text in table["more"].to_pylist()] == values


def converted(content: bytes, name: str, predictor: Predictor, folder: Path) -> Path:
    from triform.features import Features

    parquet = folder / "rows.parquet"
    convert(content, f"s3://bucket/{name}", HERE, Features(predictor.signature, predictor.manifest.config), parquet)
    return parquet


def test_a_key_twice_is_a_dead_letter(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    """As the online protocols have it: of two values every parser keeps another one."""
    content = b'{"x": 1}\n{"x": 2, "x": 3}\n{"x": 4, "more": {"a": 1, "\\u0061": 2}}\n{"x": 5}\n'
    scored = Scored(content, "a.jsonl", predictors["INT64"], tmp_path)
    assert scored.answers == {0: 1, 3: 5}
    assert scored.dead == {1: "invalid_input", 2: "invalid_input"}
    assert "the key 'x' stands twice in one object" in scored.reasons[1]
    assert "the key 'a' stands twice in one object" in scored.reasons[2]


def test_an_empty_line_of_csv_is_a_row_of_empty_cells(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    scored = Scored(b"x\n1\n\n3\n", "a.csv", predictors["FP64"], tmp_path)
    assert (scored.rows, scored.answers, scored.dead) == (3, {0: 1.0, 2: 3.0}, {1: "missing_value"})
    scored = Scored(b"x,note\r\n\r\n1,a\r\n", "a.csv", predictors["FP64"], tmp_path)
    assert (scored.rows, scored.answers, scored.dead) == (2, {1: 1.0}, {0: "missing_value"})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"".join(b'{"k%d": 1}\n' % i for i in range(3000)), r"columns by .* rows or more in .* bytes"),
        ("a.jsonl", b"".join(b'{"k%d": 1}\n' % i for i in range(1000)) + b"{}\n" * 100_000, "columns by"),
        ("a.jsonl", orjson.dumps({f"k{i}": 1 for i in range(5000)}), "more than 4,096 columns"),
        ("a.csv", b",".join(b"c%d" % i for i in range(5000)) + b"\n" + b"," * 4999, "more than 4,096 columns"),
        ("a.jsonl", b"{\n" * 100_001, "more than 100,000 rows cannot be read; row 0: the line is not JSON"),
        ("a.csv", b"x,y\n" + b"1\n" * 100_001, "more than 100,000 rows cannot be read; row 0: the line has 1 cells"),
        ("a.csv", b"x\n1\n" + b"z\n" * 100_001, "more than 100,000 rows cannot be read; row 1: column 'x': 'z' does not fit"),
    ],
)
def test_a_file_out_of_proportion_is_refused(
    name: str, content: bytes, told: str, predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    """Its table would be many times its size."""
    with pytest.raises(InputUnreadable, match=told):
        converted(content, name, predictors["FP32"], tmp_path)


@pytest.mark.parametrize("depth", [150, 250, 900, 5000])
@pytest.mark.parametrize("column", ["x", "more"])
def test_a_line_that_is_nested_deeply(column: str, depth: int, predictors: dict[str, Predictor], tmp_path: Path) -> None:
    line = b'{"x": 1, "%s": %s}' % (column.encode(), b"[" * depth + b"]" * depth)
    line = line.replace(b'"x": 1, "x"', b'"x"')
    scored = Scored(b'{"x": 1}\n' + line, "a.jsonl", predictors["INT64"], tmp_path)
    assert scored.answers == ({0: 1, 1: 1} if column == "more" and depth == 150 else {0: 1})


lines = st.one_of(
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
    st.builds(
        lambda value, doubled: b'{"x":%s,"y":1%s}' % (orjson.dumps(value), b',"y":2' if doubled else b""),
        st.recursive(numbers | st.text(max_size=3), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=1), v)),
        st.booleans(),
    ),
)


any_lines = st.lists(lines, max_size=6).map(b"\n".join) | st.binary(max_size=60)
any_cells = st.binary(max_size=40) | st.text('x,"\n\r1 .é-', max_size=40).map(str.encode)
FEW = settings(max_examples=100, deadline=None, database=None)
MANY = settings(FEW, max_examples=5000)


def check_lines(content: bytes, predictor: Predictor, folder: Path) -> None:
    """A row for each line that is not blank, answered or dead."""
    scored = Scored(content, "a.jsonl", predictor, folder)
    rows = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert scored.rows == len(rows) == len(scored.answers) + len(scored.dead)
    assert set(scored.dead.values()) <= {"invalid_input", "missing_value"}


def check_cells(content: bytes, predictor: Predictor, folder: Path) -> None:
    """A row for each line after the header, answered or dead; or the file is refused."""
    try:
        scored = Scored(b"x\n" + content, "a.csv", predictor, folder)
    except InputUnreadable:
        return
    assert scored.rows == len(scored.answers) + len(scored.dead)
    assert set(scored.dead.values()) <= {"invalid_input", "missing_value"}
    if b'"' not in content:
        ended = content if content.endswith((b"\n", b"\r")) or not content else content + b"\n"
        assert scored.rows == len(re.findall(rb"\r\n|\r|\n", ended))


@FEW
@given(kind=st.sampled_from([*KINDS]), content=any_lines)
@example(kind="FP64", content=b'{"\xff": 1}')
@example(kind="INT8", content=b'{"": 1, "x": [1, 2]}\n{"": {"": 2}}')
def test_any_bytes_as_json_lines(
    kind: str, content: bytes, predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_lines(content, predictors[kind], tmp_path_factory.mktemp("scored"))


@pytest.mark.slow
@MANY
@given(kind=st.sampled_from([*KINDS]), content=any_lines)
def test_any_bytes_as_json_lines_at_length(
    kind: str, content: bytes, predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_lines(content, predictors[kind], tmp_path_factory.mktemp("scored"))


@FEW
@given(kind=st.sampled_from(["FP64", "UINT64", "BOOL", "BYTES"]), content=any_cells)
def test_any_bytes_as_csv(
    kind: str, content: bytes, predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_cells(content, predictors[kind], tmp_path_factory.mktemp("scored"))


@pytest.mark.slow
@MANY
@given(kind=st.sampled_from(["FP64", "UINT64", "BOOL", "BYTES"]), content=any_cells)
def test_any_bytes_as_csv_at_length(
    kind: str, content: bytes, predictors: dict[str, Predictor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_cells(content, predictors[kind], tmp_path_factory.mktemp("scored"))
