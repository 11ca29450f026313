"""`run --split`: stable and canary share a run's rows as they share callers, and each row stands there once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch import job
from batch.actor import PartScorer
from batch.attempts import Attempt, OneProcess
from tests.batch.workbench import Cli, Workbench, options, read_rows
from tests.canaries import USERS, Released, answers, build, records
from tests.triform.test_independence import hungry
from triform import testing
from triform.errors import ConfigurationError, InvalidInput, TriformError
from triform.packaging import package_model
from triform.releases import Canary
from triform.runs import commit
from triform.runtime import RuntimeOptions
from triform.splitting import KeyRule

SCORED: dict[str, Any] = {"model": "scored", "key": (), "keep": ("user",), "split": True}
LOOKUP: dict[str, Any] = {"model": "lookup", "key": ("id",), "keep": (), "split": True}


@pytest.fixture
def released(tmp_path: Path) -> Released:
    """Its own, which the test may change."""
    return build(tmp_path / "released")


@pytest.fixture
def bench(tmp_path: Path, released: Released) -> Workbench:
    return Workbench(tmp_path, released.root)


def write_users(bench: Workbench, users: Sequence[Any], kind: pa.DataType | None = None, name: str = "users.parquet") -> Path:
    table = pa.Table.from_pylist(records([*users]))
    if kind is not None:
        table = table.set_column(2, "user", table["user"].cast(kind))
    bench.input.mkdir(exist_ok=True)
    pq.write_table(table, bench.input / name, row_group_size=10)
    return bench.input / name


def versions(released: Released, users: Sequence[Any]) -> list[int]:
    """Whose they are; those without a key are stable's."""
    split = released.split()
    return [split.stable if user is None else split.choose(str(user).encode()) for user in users]


def share_lookup(released: Released) -> None:
    """Stable has 0..99, the canary 0..9; the key is the row's id."""
    released.log("lookup").set(stable=1, canary=Canary(2, 0.5, KeyRule(column="id")))


@pytest.mark.parametrize(
    ("users", "kind"),
    [
        (USERS, None),
        (USERS, pa.dictionary(pa.int32(), pa.string())),
        (USERS, pa.large_string()),
        (USERS, pa.string_view()),
        ([*range(7, 31)], pa.int64()),
        ([*range(7, 31)], pa.uint16()),
        ([None, "user-1", None, "user-1", *USERS], None),
        ([None] * 4, pa.string()),
        ([None] * 4, pa.null()),
        (["user-3"] * 4, None),
        ([], pa.string()),
    ],
)
def test_each_row_is_answered_by_the_version_of_its_key(
    bench: Workbench, released: Released, users: list[Any], kind: pa.DataType | None
) -> None:
    if users:
        write_users(bench, users, kind)
    else:
        schema = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("user", pa.string())])
        bench.input.mkdir()
        pq.write_table(schema.empty_table(), bench.input / "users.parquet")
    done = bench.score_and_run(**SCORED)
    rows, chosen = read_rows(done.data), versions(released, users)
    assert rows["user"].to_pylist() == users
    assert rows.select(["sum", "label"]).to_pylist() == answers(users, chosen)
    assert rows["_model_version"].to_pylist() == [f"scored/{version}" for version in chosen]
    assert (done.manifest.rows_out, done.manifest.rows_canary, done.manifest.instead) == (len(users), chosen.count(2), {})
    commit.verify(bench.begin(**SCORED)[0])


def test_what_the_canary_does_not_answer_stable_does(bench: Workbench, released: Released) -> None:
    """x = 10..99 make a run of the canary fail, 100 one of each; a null is refused by both."""
    share_lookup(released)
    x = [None if row % 20 == 3 else 100 if row % 20 == 7 else row % 20 for row in range(200)]
    bench.write("a.parquet", 0, 200, x=pa.array(x, pa.int64()))
    done = bench.score_and_run(**LOOKUP, max_dead_letters=0.5)
    rows, dead = read_rows(done.data), read_rows(f"{done.folder}/dead_letters")
    assert sorted(rows["id"].to_pylist() + dead["id"].to_pylist()) == list(range(200))
    assert rows["id"].to_pylist() == [row for row in range(200) if row % 20 not in (3, 7)]
    assert rows["y"].to_pylist() == [10.0 * x[row] for row in rows["id"].to_pylist()]  # type: ignore[operator]
    canarys = [released.split("lookup").choose(str(row).encode()) == 2 for row in range(200)]
    by_canary = {row for row in rows["id"].to_pylist() if canarys[row] and row % 20 < 10}
    told = dict(zip(rows["id"].to_pylist(), rows["_model_version"].to_pylist(), strict=True))
    assert {row for row, ref in told.items() if ref == "lookup/2"} == by_canary
    instead = sum(canarys[row] and row % 20 >= 10 for row in told)
    assert (done.manifest.rows_canary, done.manifest.instead) == (len(by_canary), {"run_failed": instead})
    assert instead > 0
    assert done.manifest.dead == {"missing_value": 10, "run_failed": 10}


def test_a_run_keeps_the_split_that_it_began_with(bench: Workbench, released: Released) -> None:
    for i in range(3):
        write_users(bench, USERS, name=f"{i}.parquet")
    bench.score(1, **SCORED)
    chosen = versions(released, USERS)
    released.log("scored").rollback()
    bench.score(0, 2, **SCORED)
    done = bench.run(**SCORED)
    assert "going on with run" in bench.said
    assert [*map(int, read_rows(done.data)["label"].to_pylist())] == chosen * 3
    assert done.manifest.split is not None
    assert done.manifest.split.revision == 1
    later = bench.score_and_run(**SCORED, if_exists="replace")
    assert "model scored/1, alone: its release has no canary with a share of the keys" in bench.said
    assert set(read_rows(later.data)["_model_version"].to_pylist()) == {"scored/1"}
    assert later.manifest.split is None
    assert later.manifest.run != done.manifest.run


def test_a_greater_share_is_another_run_in_which_no_row_goes_back(bench: Workbench, released: Released) -> None:
    write_users(bench, [f"user-{i}" for i in range(500)])
    before = bench.score_and_run(**SCORED)
    released.log().set(stable=1, canary=Canary(2, 0.8))
    after = bench.score_and_run(**SCORED, if_exists="replace")
    assert before.manifest.run != after.manifest.run
    labels = [read_rows(run.data)["label"].to_pylist() for run in (before, after)]
    assert all(then <= now for then, now in zip(*labels, strict=True))
    assert sum(labels[0]) < sum(labels[1])


def test_a_job_with_and_one_without_do_not_take_each_others_unfinished_run(bench: Workbench) -> None:
    write_users(bench, USERS)
    shared, alone = bench.begin(**SCORED), bench.begin(**SCORED | {"split": False})
    assert shared[0].run != alone[0].run
    assert (alone[1].split, shared[1].job == alone[1].job) == (None, False)


def test_who_has_taken_a_bad_canary_off_goes_on_without_it(bench: Workbench, released: Released, call: Cli) -> None:
    """As docs/batch.md advises, of a job file that says `split = true`."""
    share_lookup(released)
    bench.write("a.parquet", 0)
    file = bench.root / "job.toml"
    file.write_text("split = true\n")
    bench.begin(**LOOKUP | {"model": "lookup@stable", "keep": ("note",)})
    canary = released.root / "lookup/2/model.onnx"
    canary.chmod(0o644)
    canary.write_bytes(canary.read_bytes()[:-1])
    told = bench.score(**LOOKUP | {"model": "lookup@stable", "keep": ("note",)})[0]
    assert (told.scored, "lookup/2" in told.error) == (None, True)
    released.log("lookup").rollback()
    told = bench.score(**LOOKUP | {"model": "lookup@stable", "keep": ("note",)})[0]
    assert told.scored is None, "it has pinned the canary"
    bench.score(model="lookup@stable")
    code, out, err = call("run", file, *options(bench), "--no-split")
    assert (code, err) == (0, "")
    assert "lookup/1" in out


def test_a_part_in_many_batches_adds_up(bench: Workbench, released: Released) -> None:
    """As one does that memory did not suffice for."""
    write_users(bench, USERS * 5)
    folder, _ = bench.begin(**SCORED)
    outcome = PartScorer(str(bench.output), folder.run, RuntimeOptions(), 0, most_rows=7).score(0)
    assert outcome.scored is not None, outcome
    assert outcome.scored.rows_canary == 5 * versions(released, USERS).count(2)
    rows = read_rows(bench.run(**SCORED).data)
    assert rows["label"].to_pylist() == versions(released, USERS * 5)


def test_versions_may_read_other_columns_and_answer_in_another_order(
    bench: Workbench, released: Released, tmp_path: Path
) -> None:
    toml = tmp_path / "other.toml"
    toml.write_text('[inputs.x]\ncolumns = ["b", "c"]\n[outputs.y]\ncolumns = ["label", "sum"]\n')
    package_model(released.root / "scored/2/model.onnx", name="scored", repository=released.repository, config=toml)
    released.log().set(stable=1, canary=Canary(3, 0.5))
    table = pa.table({"a": range(24), "b": [1] * 24, "c": range(100, 124), "user": USERS})
    bench.input.mkdir()
    pq.write_table(table, bench.input / "a.parquet")
    split = released.split()
    for i, row in enumerate(read_rows(bench.score_and_run(**SCORED).data).to_pylist()):
        stable = split.choose(row["user"].encode()) == 1
        assert (row["sum"], row["label"]) == ((i + 1.0, 1.0) if stable else (2.0, 2.0 * (101 + i)))
    pq.write_table(table.drop(["c"]), bench.input / "a.parquet")
    with pytest.raises(InvalidInput, match=r"split: of the canary, scored/3: .*a\.parquet: .*'c'"):
        bench.begin(**SCORED)


def test_a_key_may_be_a_text_that_the_model_reads(bench: Workbench, released: Released, tmp_path: Path) -> None:
    toml = tmp_path / "text.toml"
    for version in "first", "second":
        toml.write_text(f'description = "{version}"\n[key]\ncolumn = "word"\n')
        package_model(testing.text_and_number(tmp_path / "m.onnx"), name="text", repository=released.repository, config=toml)
    released.log("text").set(stable=1, canary=Canary(2, 0.5))
    words = [*"abcdefgh", None, *"aabb"] * 3
    bench.input.mkdir()
    pq.write_table(pa.table({"word": words, "x": [1.0] * len(words)}), bench.input / "a.parquet")
    done = bench.score_and_run(model="text", key=(), keep=(), split=True, max_dead_letters=0.5)
    split, known = released.split("text"), [word for word in words if word is not None]
    rows = read_rows(done.data)
    assert rows["is_a"].to_pylist() == [word == "a" for word in known]
    assert rows["_model_version"].to_pylist() == [f"text/{split.choose(word.encode())}" for word in known]
    assert done.manifest.dead == {"missing_value": 3}


def test_a_canary_for_which_memory_does_not_suffice_leaves_its_rows_to_stable(
    bench: Workbench, released: Released, tmp_path: Path
) -> None:
    """An x of 100 takes 2**46 bytes of it, alone too. Those that do not are the canary's."""
    toml = tmp_path / "x.toml"
    toml.write_text('[key]\ncolumn = "id"\n')
    for file in testing.identity(tmp_path / "1.onnx", "FP32", shape=("N", 1)), hungry(tmp_path / "2.onnx"):
        package_model(file, name="hungry", repository=released.repository, config=toml)
    released.log("hungry").set(stable=1, canary=Canary(2, 0.5))
    split = released.split("hungry")
    theirs = [row for row in range(100) if split.choose(str(row).encode()) == 2]
    x = np.ones(100, np.float32)
    x[theirs[::10]] = 100
    bench.write("a.parquet", 0, x=x)
    done = bench.score_and_run(model="hungry", keep=(), split=True)
    rows = read_rows(done.data)
    assert (done.manifest.rows_out, done.manifest.dead) == (100, {})
    by_canary = set(theirs) - set(theirs[::10])
    assert rows["y"].to_pylist() == [2.0 if row in by_canary else float(x[row]) for row in range(100)]
    assert done.manifest.instead == {"resource_exhausted": len(theirs[::10])}
    assert done.manifest.rows_canary == len(by_canary) > 0


def test_a_part_that_is_found_again_still_says_who_answered(bench: Workbench, released: Released) -> None:
    """Its process was killed between the file and the record."""
    write_users(bench, USERS)
    (outcome,) = bench.score(**SCORED)
    assert outcome.scored is not None
    folder, _ = bench.begin(**SCORED)
    (record,) = bench.output.glob("run=*/_parts/*.json")
    record.unlink()
    found = folder.adopt(0)
    assert found is not None
    assert found.rows_canary == outcome.scored.rows_canary == versions(released, USERS).count(2)


def test_the_third_attempt_in_a_child_splits_the_same_way(bench: Workbench, released: Released) -> None:
    write_users(bench, USERS)
    folder, _ = bench.begin(**SCORED)
    attempts = OneProcess()
    for i in range(2):
        attempts.begin(0, Attempt(f"died-{i}", "here"))
    outcome = PartScorer(str(bench.output), folder.run, RuntimeOptions(), 0, attempts).score(0)
    assert outcome.scored is not None, outcome
    assert outcome.attempts == 3
    rows = read_rows(bench.run(**SCORED).data)
    assert rows.select(["sum", "label"]).to_pylist() == answers(USERS, versions(released, USERS))


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_each_version_counts_its_rows_and_its_load(bench: Workbench, released: Released) -> None:
    for i in range(2):
        write_users(bench, USERS, name=f"{i}.parquet")
    recording = testing.RecordingTelemetry()
    done = job.run(bench.spec(**SCORED, actors=1), bench.console, recording)
    rows = {version: 2 * versions(released, USERS).count(version) for version in (1, 2)}
    counted = {version: sum(r.rows for r in recording.records if r.version == version) for version in (1, 2)}
    assert counted == rows
    assert {(r.version, r.variant) for r in recording.records} == {(1, "stable"), (2, "canary")}
    assert sorted((load.version, load.variant) for load in recording.loads) == [(1, "stable"), (2, "canary")]
    assert done.manifest.rows_canary == rows[2]


def test_the_command_and_its_report_say_who_answered(bench: Workbench, released: Released, call: Cli) -> None:
    share_lookup(released)
    bench.write("a.parquet", 0, x=[row % 20 for row in range(100)])
    bench.score(**LOOKUP | {"model": "lookup@stable", "keep": ("note",)})
    code, out, err = call("run", *options(bench), "--split", "--report")
    assert (code, err) == (0, "")
    (run,) = bench.output.glob("run=*")
    by = read_rows(run / "data")["_model_version"].to_pylist().count("lookup/2")
    instead = sum(released.split("lookup").choose(str(row).encode()) == 2 for row in range(100)) - by
    told = f"lookup/2 with 50% of the keys in 'id' (release 2): {by} of 100 rows"
    assert f"{told}; stable answered {instead} more of its keys, which it did not (run_failed {instead})" in out
    assert f"{by} of 100 rows" in (run / "_report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "scored/1"}, ConfigurationError, "name the model as scored, not as scored/1"),
        ({"model": "scored@canary"}, ConfigurationError, "not as scored@canary"),
        ({"model": "lookup", "keep": ()}, ConfigurationError, "has no column"),
    ],
)
def test_what_has_no_split_is_refused(bench: Workbench, changes: dict[str, Any], error: type[TriformError], said: str) -> None:
    write_users(bench, USERS)
    bench.write("users.parquet", 0) if changes["model"] == "lookup" else None
    with pytest.raises(error, match=said):
        bench.begin(**SCORED | changes)
    assert not bench.output.exists() or not list(bench.output.glob("run=*"))


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (None, "no column 'user'"),
        ("twice", "the column 'user', whose keys split the rows, is there twice"),
        (pa.array([1.5] * 3), "column 'user' is double; a key is text or a whole number"),
        (pa.array([True] * 3), "column 'user' is bool"),
        (pa.array([["a"]] * 3), "column 'user' is list"),
        (pa.array([b"0123456789abcdef"] * 3, pa.binary(16)), "column 'user' is fixed_size_binary"),
    ],
    ids=["none", "twice", "fractions", "booleans", "lists", "uuids"],
)
def test_a_column_without_keys_is_named(bench: Workbench, user: pa.Array | str | None, said: str) -> None:
    table = pa.table({"a": [1, 2, 3], "b": [1, 2, 3]})
    for column in () if user is None else [["x"] * 3] * 2 if isinstance(user, str) else [user]:
        table = table.append_column("user", column if isinstance(column, pa.Array) else pa.array(column))
    bench.input.mkdir()
    pq.write_table(table, bench.input / "a.parquet")
    with pytest.raises(InvalidInput, match=said) as raised:
        bench.begin(**SCORED | {"keep": ()})
    assert "a.parquet" in str(raised.value)


def test_versions_that_answer_different_columns_cannot_share_a_run(bench: Workbench, released: Released, tmp_path: Path) -> None:
    toml = tmp_path / "other.toml"
    toml.write_text('[inputs.x]\ncolumns = ["a", "b"]\n[outputs.y]\ncolumns = ["total", "label"]\n')
    file = released.root / "scored/1/model.onnx"
    package_model(file, name="scored", repository=released.repository, config=toml)
    released.log().set(stable=1, canary=Canary(3, 0.5))
    write_users(bench, USERS)
    with pytest.raises(ConfigurationError, match=r"scored/1 answers label float, sum float; scored/3 label float, total float"):
        bench.begin(**SCORED)


def test_a_run_is_split_or_compared(bench: Workbench) -> None:
    with pytest.raises(ConfigurationError, match="split: expected either it or compare"):
        bench.spec(**SCORED, compare=2)
