"""Inputs are found, and refused by name before anything is scored."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triform.errors import InputUnreadable, InvalidInput
from triform.features import Features
from triform.package import ModelPackage
from triform.runs import inputs
from triform.scoring import Layout
from triform.sources import Sources

ODD = [  # of folders
    "a b", "x=y", "month=a%2Fb", "x=..", "_x=1", "*", "[ab]", "ümläut",
    "'quote\"", "line\nbreak", "x=__HIVE_DEFAULT_PARTITION__", "x=",
]  # fmt: skip


def find(patterns: list[str]) -> list[Path]:
    return [Path(file) for file in inputs.find(patterns, Sources())]


def write(path: Path, table: pa.Table | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if table is not None else pa.table({"x": [1]}), path)
    return path


@pytest.mark.parametrize("name", ODD)
def test_folders_with_odd_names_are_searched(tmp_path: Path, name: str) -> None:
    """A file is named by itself, by its folder, or from above, whatever its name means to a glob."""
    file = write(tmp_path / name / "part=[1]*.parquet")
    decoy = write(tmp_path / "b" / "part=1.parquet")
    assert find([str(file)]) == find([str(tmp_path / name)]) == [file]
    assert find([str(tmp_path)]) == find([f"{tmp_path}/**/*.parquet"]) == sorted([file, decoy])
    assert find([str(tmp_path), str(file), str(decoy)]) == sorted([file, decoy])


def test_hidden_and_unfinished_files_are_no_data(tmp_path: Path) -> None:
    file = write(tmp_path / "_root" / "a.parquet")  # the underscore of what the user named does not count
    for name in "_SUCCESS.parquet", ".a.parquet", "_temporary/0/a.parquet", ".hidden/a.parquet":
        write(tmp_path / "_root" / name)
    (tmp_path / "_root" / "note.txt").write_text("not data")
    assert find([str(tmp_path / "_root")]) == [file]
    for pattern in "*.parquet", "**/*.parquet", "?.parquet":
        assert find([f"{tmp_path}/_root/{pattern}"]) == [file]


@pytest.mark.parametrize("pattern", ["absent.parquet", "absent/*.parquet", "empty", "?"])
def test_a_pattern_that_names_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    file = write(tmp_path / "a.parquet")
    with pytest.raises(InputUnreadable, match="nothing there"):
        find([str(file), f"{tmp_path}/{pattern}"])


def test_a_file_of_many_names_is_found_once(tmp_path: Path) -> None:
    file = write(tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "link.parquet").symlink_to(file)
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    names = ["in", "in/../in", "linked", "linked/a.parquet", "in/link.parquet", "*/a.parquet"]
    assert find([f"{tmp_path}/{name}" for name in names]) == [file]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "in" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert find(["in"]) == find(["in/a.parquet"]) == find(["in/*"]) == [file]


def test_all_unreadable_files_are_named_at_once(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet")
    content = good.read_bytes()
    damages = {
        "empty": b"",
        "magic": b"NOPE" + content[4:-4] + b"NOPE",
        "cut": content[:-9],
        "garbled": content[:-40] + b"\xff" * 32 + content[-8:],
    }
    for name, damage in damages.items():
        (tmp_path / f"{name}.parquet").write_bytes(damage)
    with pytest.raises(InputUnreadable, match="4 of 5 input file") as caught:
        inputs.read_files([str(file) for file in find([str(tmp_path)])], Sources())
    assert all(f"{name}.parquet" in str(caught.value) for name in damages)
    assert "good" not in str(caught.value)


def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    write(tmp_path / "a.parquet").rename(file)
    with pytest.raises(InputUnreadable, match="name"):
        find([str(tmp_path)])


def tagged(kind: pa.DataType, extension: str) -> pa.Field:
    return pa.field("item", kind, metadata={"ARROW:extension:name": extension, "ARROW:extension:metadata": ""})


UNSAFE = tagged(pa.binary(), "ray.data.arrow_pickled_object")


@pytest.mark.parametrize(
    "field",
    [
        UNSAFE,
        tagged(pa.binary(), "arrow.py_extension_type"),
        tagged(pa.binary(), "somebody.elses"),
        pa.field("item", pa.list_(UNSAFE)),
        pa.field("item", pa.large_list(pa.list_(UNSAFE))),
        pa.field("item", pa.list_(UNSAFE, 1)),
        pa.field("item", pa.struct([pa.field("a", pa.list_(UNSAFE))])),
        pa.field("item", pa.map_(pa.string(), UNSAFE)),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_ray", [False, True])
def test_types_that_may_run_code_are_refused_wherever_they_stand(tmp_path: Path, field: pa.Field, with_ray: bool) -> None:
    if with_ray:  # Ray Data registers its types with Arrow
        pytest.importorskip("ray.data")
    file = write(tmp_path / "a.parquet", pa.schema([pa.field("x", pa.int64()), field]).empty_table())
    with pytest.raises(InputUnreadable, match=r"a\.parquet: column '.*' has the extension type"):
        inputs.read_files([str(file)], Sources())


def test_plain_extension_types_are_read(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))
    file = write(tmp_path / "a.parquet", pa.table({"id": ids}))
    assert inputs.read_file(str(file), Sources())[0].rows == 1


def check(tmp_path: Path, repository: Path, *tables: pa.Table, keep: tuple[str, ...] = (), key: tuple[str, ...] = ()) -> None:
    manifest = ModelPackage.open(repository / "lookup" / "1").manifest
    paths = [str(write(tmp_path / f"{i}.parquet", table)) for i, table in enumerate(tables)]
    files = inputs.read_files(paths, Sources())
    inputs.check_columns(files, Features(manifest.signature, manifest.config), Layout(key, keep))


X = pa.array([1], pa.int64())


@pytest.mark.parametrize(
    ("tables", "names"),
    [
        ([pa.table({"a": X})], r"0\.parquet: column 'x' is missing"),
        ([pa.table({"x": X, "a": X}), pa.table({"x": ["1"], "a": X})], r"1\.parquet: column 'x' is string"),
        ([pa.table({"x": X, "a": X}), pa.table({"x": X})], r"1\.parquet: no column 'a'"),
        ([pa.table({"x": X, "a": X}), pa.table({"x": X, "a": ["1"]})], r"1\.parquet: column 'a' is string, in .*0\.parquet"),
        ([pa.Table.from_arrays([X, X, X], ["x", "a", "a"])], r"0\.parquet: no column 'a'|'a' is there twice"),
        ([pa.Table.from_arrays([X, X, X], ["x", "x", "a"])], r"0\.parquet: column 'x' is there twice"),
    ],
)
def test_files_that_drift_apart_are_named(tmp_path: Path, lookup_repository: Path, tables: list[pa.Table], names: str) -> None:
    with pytest.raises(InvalidInput, match=names):
        check(tmp_path, lookup_repository, *tables, keep=("a",))


def test_types_may_differ_where_the_model_does_not_mind(tmp_path: Path, lookup_repository: Path) -> None:
    other = pa.table({"x": X.cast(pa.int8()), "a": X, "b": X})
    check(tmp_path, lookup_repository, pa.table({"x": X, "a": X}), other, keep=("a",))


@pytest.mark.parametrize("name", ["y", "_model_version", "_scored_at"])
def test_a_kept_column_may_not_be_called_like_an_answer(tmp_path: Path, lookup_repository: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        check(tmp_path, lookup_repository, pa.table({"x": X, name: X}), keep=(name,))


@pytest.mark.parametrize("name", ["source_file", "row_number", "code", "reason", "raw_row"])
def test_a_key_may_not_be_called_like_a_column_of_the_dead_letters(tmp_path: Path, lookup_repository: Path, name: str) -> None:
    check(tmp_path, lookup_repository, pa.table({"x": X, name: X}), keep=(name,))
    with pytest.raises(InvalidInput, match=f"'{name}' cannot be a key"):
        check(tmp_path, lookup_repository, pa.table({"x": X, name: X}), key=(name,))
