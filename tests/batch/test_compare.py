"""`run --compare`: what another version would have answered, counted once; the run is as without, whatever that version does."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx.helper
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch import compare, job
from batch.attempts import Attempt, Attempts
from batch.comparer import PartComparer
from batch.page import text
from tests.batch.poison import write_poison, x86
from tests.batch.test_kill import driver
from tests.batch.test_report import Page, assert_stands_alone
from tests.batch.workbench import Cli, RemoteWorkbench, Workbench, assert_each_row_once, options, read_rows, visible
from triform import comparing, testing
from triform.disagreement import ComparedPart
from triform.errors import ConfigurationError, InvalidRequest, TriformError
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog
from triform.repository import open_repository
from triform.rollout.evidence import Evidence, decode, replay
from triform.rollout.policy import Disagreement, Guards, Policy, Shadow
from triform.rollout_log import RolloutLog
from triform.runs.folder import RunFolder
from triform.runtime import RuntimeOptions

NAN, PLUS_ONE = 5, 6  # the x for which the versions of `versions` answer otherwise


def table_model(path: Path, table: np.ndarray[Any, Any], *, output: str = "y", extra: bool = False) -> Path:
    """`testing.lookup` with another table, another output's name, or one output more."""
    nodes = [onnx.helper.make_node("Gather", ["table", "x"], [output], axis=0)]
    outputs = [testing.value(output, "FP32", ["N"])]
    if extra:
        nodes.append(onnx.helper.make_node("Identity", ["x"], ["same"]))
        outputs.append(testing.value("same", "INT64", ["N"]))
    return testing.save(path, nodes, [testing.value("x", "INT64", ["N"])], outputs, {"table": table.astype(np.float32)})


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, lookup_repository: Path) -> Path:
    """`lookup`: 1 stable, 2 the same; 3 differs in x = 6 by one and is NaN in x = 5; 4 fails from 8 on; 5 answers z; 6 answers
    one column more; 7 wants a column that there is not."""
    root = tmp_path_factory.mktemp("versions")
    shutil.copytree(lookup_repository, root / "models")
    repository = open_repository(root / "models")
    table = 10.0 * np.arange(10)
    odd = table.copy()
    odd[[NAN, PLUS_ONE]] = np.nan, 61.0
    wide = 10.0 * np.arange(30)
    for version, model, config in (
        (3, table_model(root / "3.onnx", odd), ""),
        (4, table_model(root / "4.onnx", table[:8]), ""),
        (5, table_model(root / "5.onnx", table, output="z"), ""),
        (6, table_model(root / "6.onnx", wide, extra=True), ""),
        (7, table_model(root / "7.onnx", wide[:25]), '[inputs.x]\ncolumns = ["absent"]\n'),
    ):
        toml = root / f"{version}.toml"
        toml.write_text(config)
        package_model(model, name="lookup", repository=repository, version=version, config=toml)
    return root / "models"


@pytest.fixture
def bench(tmp_path: Path, versions: Path) -> Workbench:
    return Workbench(tmp_path, versions)


def committed(bench: Workbench, files: int = 2, **changes: Any) -> job.Summary:
    return bench.write_some(files).score_and_run(**changes)


def compared(bench: Workbench, version: int | str, **changes: Any) -> compare.Compared:
    """What a run comes to whose parts are compared in this process."""
    assert all(outcome.compared for outcome in bench.compare(compare=version, **changes))
    done = bench.run(compare=version, **changes).compared
    assert done is not None
    return done


def evidence_of(done: compare.Compared) -> Evidence:
    return decode(Path(done.evidence).read_bytes())


def report_of(done: compare.Compared) -> Page:
    page = Page(Path(done.report).read_bytes())
    assert_stands_alone(page)
    return page


def in_both(rows: int, *answers: int) -> int:
    """How many of the rows 0.. have one of these x; see `x_of`."""
    return sum(row % 10 in answers and row % 25 != 7 for row in range(rows))


def test_a_version_that_agrees_and_the_run_as_without(bench: Workbench, new_workbench: Callable[[str], Workbench]) -> None:
    plain = committed(new_workbench("plain"))
    before = committed(bench)
    seen = visible(bench.output)
    done = compared(bench, 2)
    assert (done.candidate.ref, done.parts, done.parts_compared) == ("lookup/2", 2, 2)
    assert (done.rows, done.disagreed, done.faults) == (172, 0, {})
    assert visible(bench.output) == seen
    assert_each_row_once(before.folder, 200)
    columns = ["id", "note", "y", "_model_version"]
    assert read_rows(before.data).select(columns).equals(read_rows(plain.data).select(columns))
    after = bench.run(compare=2)
    assert after.manifest == before.manifest
    assert after.compared == done


def test_what_differs_is_counted_by_row_and_column(bench: Workbench) -> None:
    """NaN on one side is a disagreement, and so is one where the other is a number."""
    committed(bench)
    done = compared(bench, 3)
    odd = in_both(200, NAN, PLUS_ONE)
    assert (done.rows, done.disagreed) == (172, odd)
    page = report_of(done)
    (y,) = page.tables["By output column; a row disagrees if any of its columns does"][1:]
    assert (y[0], y[1], y[3]) == ("y", str(odd), "1")
    assert float(y[4]) == pytest.approx(1 / 60, rel=1e-3)
    (example,) = page.tables["The row that differs most, of each column; rows count from 0"][1:]
    assert example == ["y", str(bench.input / "0.parquet"), "6", "60.0", "61.0"]
    assert f"{odd:,} of them" in page.text
    assert f"NaN: 0 and {in_both(200, NAN)} rows" in page.text
    assert len(page.pictures) == 2


def test_the_evidence_replays_and_is_the_gates_own(bench: Workbench) -> None:
    """Two nights' worth of rows in which one in five is otherwise: no shadow goes on from there."""
    bench.write("0.parquet", 0, 4000, group=200)
    bench.score_and_run()
    done = compared(bench, 3)
    found = evidence_of(done)
    assert (found.model, found.stable, found.canary, found.verdict.step) == ("lookup", 1, 3, -1)
    assert replay(found).differences == ()
    shadowed = [w.shadowed for w in found.windows]
    assert (sum(s.rows for s in shadowed), sum(s.disagreed for s in shadowed)) == (done.rows, done.disagreed)
    said = {finding.guard: finding for finding in found.verdict.findings}
    assert said["disagreement"].says == "beyond"
    assert done.decision == found.verdict.decision == "ROLLBACK"
    changed = msgspec.structs.replace(found, windows=found.windows[:0])
    assert replay(changed).differences != ()


@pytest.mark.parametrize(("rows", "decision", "windows"), [(2000, "CONTINUE", 1), (24_000, "PROMOTE", 10)])
def test_a_version_that_agrees_may_go_on_from_the_shadow(bench: Workbench, rows: int, decision: str, windows: int) -> None:
    """Latency is judged by the windows before: a single one is no data, and no data never promotes."""
    bench.write("0.parquet", 0, rows, x=[row % 10 for row in range(rows)])
    bench.score_and_run()
    done = compared(bench, 2)
    assert (done.decision, done.rows, done.disagreed) == (decision, rows, 0)
    runs = [sum(sketch.total for sketch in w.canary.execute.values()) for w in evidence_of(done).windows]
    assert runs == [8] * windows


def test_a_rollout_begins_with_last_nights_run(bench: Workbench, tmp_path: Path) -> None:
    """By its own policy: version 3 differs in a tenth of the rows, and is not let past the shadow step."""
    bench.write("0.parquet", 0, 24_000, x=[row % 10 for row in range(24_000)])
    bench.score_and_run()
    shutil.copytree(bench.repository, tmp_path / "models")
    log = RolloutLog(open_repository(tmp_path / "models"), "lookup")
    disagreement = Disagreement(limit=0.05)
    policy = Policy(shadow=Shadow(min_requests=10_000, min_seconds=3600.0), guards=Guards(disagreement=disagreement))
    with pytest.raises(InvalidRequest, match="step: disagreement: beyond its limit"):
        log.start(policy, 3, shadowed=evidence_of(compared(bench, 3)))
    rollout = log.start(policy, 2, shadowed=evidence_of(compared(bench, 2)))
    assert (rollout.state.step, rollout.state.reason[:37]) == (0, "shadowed by a batch run: 24,000 rows,")
    assert log.releases.in_force().canary is not None


def test_scores_and_times_are_there_for_the_gate(bench: Workbench, tmp_path: Path) -> None:
    bench.write("0.parquet", 0, 1000, group=1000, x=pa.array([i % 10 for i in range(1000)], pa.int64()))
    bench.score_and_run()
    policy = tmp_path / "rollout.toml"
    policy.write_text(
        "[shadow]\nmin_seconds = 0\n[guards.disagreement]\n[guards.score_shift]\nedges = [25.0, 55.0]\nmin_rows = 1000\n"
    )
    done = compared(bench, 3, policy=str(policy))
    (window,) = evidence_of(done).windows
    assert window.stable.scores == (300, 300, 400, 0)
    assert window.canary.scores == (300, 200, 400, 100)
    assert {bucket: sketch.total for bucket, sketch in window.stable.execute.items()} == {8: 4}
    assert window.canary.execute.keys() == window.stable.execute.keys()
    page = report_of(done)
    assert page.tables["By rows of a run"][1][1] == "4"
    assert "This is the column that the gate looks at." in page.text
    policy.write_text(policy.read_text().replace("[25.0, 55.0]", "[1000.0]"))
    blind = compared(bench, 2, policy=str(policy))
    told = "set guards.score_shift.edges"
    assert [any(told in reason for reason in one.reasons) for one in (done, blind)] == [False, True]
    assert [told in report_of(one).text.partition("Disagreement")[0] for one in (done, blind)] == [False, True]


def test_rows_that_only_one_version_answers_are_its_rivals_errors(bench: Workbench) -> None:
    committed(bench)
    done = compared(bench, 4)
    arms = [(w.stable.errors, w.canary.errors, w.stable.requests) for w in evidence_of(done).windows]
    failing, both_fail = in_both(100, 8, 9), 4
    assert arms == [(both_fail, both_fail + failing, 90)] * 2  # the 10 nulls of 100 are the data's fault
    assert done.rows == 172 - 2 * failing
    assert done.disagreed == 0
    codes = {row[0]: row[1:] for row in report_of(done).tables["By reason"][1:]}
    assert codes == {"missing_value": ["20", "20"], "run_failed": ["8", str(8 + 2 * failing)]}


def test_an_output_of_one_version_only_is_told(bench: Workbench) -> None:
    committed(bench)
    done = compared(bench, 6)
    assert (done.rows, done.disagreed) == (172, 0)
    assert "Only lookup/6 answers: same. Not compared." in report_of(done).text


def test_a_part_is_counted_once_however_often_it_is_compared(bench: Workbench) -> None:
    """A driver was killed after one part; another one and a zombie compare that part, too."""
    committed(bench)
    first = bench.compare(1, compare=3)[0].compared
    again = bench.compare(1, compare=3)[0].compared
    assert again == first  # its times included: the first record counts
    (records,) = Path(bench.output).glob("run=*/_compare/*")
    assert [path.name for path in records.iterdir()] == ["00001.json"]
    done = compared(bench, 3)
    assert (done.parts, done.rows, done.disagreed) == (2, 172, in_both(200, NAN, PLUS_ONE))
    assert msgspec.json.decode((records / "00001.json").read_bytes(), type=ComparedPart) == first


def test_an_alias_is_pinned_until_the_comparison_is_done(bench: Workbench, tmp_path: Path) -> None:
    shutil.copytree(bench.repository, tmp_path / "models")
    bench.repository = tmp_path / "models"
    log = ReleaseLog(open_repository(bench.repository), "lookup")
    log.set(stable=1, canary=Canary(version=3, weight=0.1))
    committed(bench)
    bench.compare(0, compare="canary")
    log.set(stable=1, canary=Canary(version=2, weight=0.1))
    bench.compare(1, compare="canary")
    done = bench.run(compare="canary").compared
    assert done is not None
    assert (done.candidate.ref, done.parts_compared) == ("lookup/3", 2)
    assert compared(bench, "canary").candidate.ref == "lookup/2"


def test_a_slow_candidate_is_stopped_and_counted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(bench)
    monkeypatch.setattr(comparing, "PATIENCE", 0.0)
    monkeypatch.setattr(comparing, "SLOWEST", 0.0)
    done = compared(bench, 2)
    assert (done.parts_compared, done.rows) == (0, 0)
    assert list(done.faults.values()) == [2]
    assert "deadline" in next(iter(done.faults))
    windows = evidence_of(done).windows
    assert [(w.reported, w.expected, w.stable.errors, w.canary.errors) for w in windows] == [(0, 1, 4, 90)] * 2
    assert done.decision != "PROMOTE"


def test_a_candidate_that_kills_its_process_is_given_up_and_counted(bench: Workbench) -> None:
    committed(bench)
    attempts = Deaths(2)
    (outcome,) = bench.compare(0, compare=2, registry=attempts)
    assert outcome.compared is not None
    assert outcome.compared.code == "part_crashed"
    assert "2 processes died while lookup/2 was asked" in outcome.compared.error
    (other,) = bench.compare(1, compare=2)
    assert other.compared
    assert other.compared.code == ""
    done = bench.run(compare=2).compared
    assert done is not None
    assert (done.parts, done.parts_compared, done.rows) == (2, 1, 86)
    assert [(w.canary.errors, w.stable.errors) for w in evidence_of(done).windows] == [(86, 0), (4, 4)]


class Deaths(Attempts):
    """A registry that tells of so many deaths over every part."""

    def __init__(self, deaths: int) -> None:
        super().__init__(alive=lambda: ("here",))
        self._deaths = deaths

    def introduce(self) -> tuple[str, Attempt]:
        return "here", Attempt("now", "here")

    def begin(self, part: int, attempt: Attempt) -> int:
        super().begin(part, attempt)
        return self._deaths


def test_a_candidate_that_no_longer_loads_leaves_the_run_as_it_is(bench: Workbench, tmp_path: Path) -> None:
    """It is damaged after the start: a part that cannot be compared has no record, so that it may be tried again."""
    shutil.copytree(bench.repository, tmp_path / "models")
    bench.repository = tmp_path / "models"
    summary = committed(bench)
    spec = bench.spec(compare=2)
    folder = RunFolder(bench.output, summary.manifest.run)
    found = compare.prepare(spec, folder.plan(), folder)
    found.begin()
    (tmp_path / "models/lookup/2/model.onnx").write_bytes(b"damaged")
    comparer = PartComparer(str(bench.output), folder.run, RuntimeOptions(), found.candidate, found.policy)
    outcome = comparer.score(0)
    assert (outcome.code, outcome.compared) == ("digest_mismatch", None)
    assert found.recorded() == set()
    assert_each_row_once(summary.folder, 200)


def test_an_empty_input(bench: Workbench) -> None:
    bench.write("empty.parquet", 0, rows=0)
    bench.score_and_run()
    done = compared(bench, 3)
    assert (done.rows, done.parts_compared, done.decision) == (0, 1, "CONTINUE")
    assert "No row was answered by both." in report_of(done).text


def test_only_dead_letters_and_hostile_text(bench: Workbench) -> None:
    bench.write("<b>dead.parquet", 0, rows=5, x=pa.array([None] * 5, pa.int64()))
    bench.score_and_run(max_dead_letters=1.0)
    done = compared(bench, 3, max_dead_letters=1.0)
    assert done.rows == 0
    assert {row[0]: row[1:] for row in report_of(done).tables["By reason"][1:]} == {"missing_value": ["5", "5"]}
    assert text("<b>").encode() not in Path(done.report).read_bytes()  # no row to show, so no file is named


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--compare=1"], 2, "lookup/1 is the version that the run uses"),
        (["--compare=stable"], 2, "lookup/1 is the version that the run uses"),
        (["--compare=99"], 1, "version_not_found"),
        (["--compare=canary"], 1, "alias_not_found"),
        (["--compare=other/2"], 2, "expected a version of lookup"),
        (["--compare=v2"], 2, "expected a version of lookup"),
        (["--compare="], 2, "expected a version of lookup"),
        (["--compare=5"], 2, "no output in common: lookup/1 answers y; lookup/5 z"),
        (["--compare=7"], 2, "column 'absent' is missing"),
        (["--policy=rollout.toml"], 2, "policy: expected compare beside it"),
        (["--compare=2", "--policy=absent.toml"], 2, "absent.toml"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    bench: Workbench, call: Cli, args: list[str], code: int, says: str
) -> None:  # fmt: skip
    bench.write_some(1)
    got, _, err = call("run", *options(bench), *args)
    assert (got, says in err) == (code, True), err
    assert not list(bench.output.rglob("*.parquet"))
    assert not list(bench.output.rglob("_run.json"))


def test_a_broken_package_is_refused(bench: Workbench, tmp_path: Path) -> None:
    shutil.copytree(bench.repository, tmp_path / "models")
    bench.repository = tmp_path / "models"
    (tmp_path / "models/lookup/2/model.onnx").write_bytes(b"damaged")
    bench.write_some(1)
    with pytest.raises(TriformError, match=r"lookup/2: model\.onnx has 7 bytes"):
        bench.run(compare=2)
    assert not list(bench.output.rglob("*.parquet"))


def test_a_policy_without_a_shadow_is_refused(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "rollout.toml").write_text("[[steps]]\nweight = 0.1\n")
    bench.write_some(1)
    with pytest.raises(ConfigurationError, match=r"rollout\.toml: shadow: missing"):
        bench.run(compare=2, policy=str(tmp_path / "rollout.toml"))


def test_the_command_says_what_it_came_to(bench: Workbench, call: Cli) -> None:
    committed(bench)
    bench.compare(compare=3)
    odd = in_both(200, NAN, PLUS_ONE)
    code, out, _ = call("run", *options(bench), "--compare=3")
    assert code == 0
    assert f"{odd} of 172 rows disagree with lookup/3 ({odd / 172:.3%}); as a shadow: " in out
    (report,) = bench.output.glob("run=*/_compare/*/report.html")
    assert str(report) in out
    assert f"triform rollout replay {report.parent}/evidence.json" in out
    code, out, _ = call("run", *options(bench), "--compare=3", "--json")
    assert json.loads(out)["compared"]["disagreed"] == odd
    code, out, _ = call("run", *options(bench), "--json")
    assert json.loads(out)["compared"] is None


def test_a_comparison_that_fails_does_not_fail_the_run(bench: Workbench, call: Cli) -> None:
    summary = committed(bench)
    (Path(summary.data) / "part-00000.parquet").unlink()
    codes = [outcome.code for outcome in bench.compare(compare=2)]
    assert codes == ["not_reconciled", ""]
    (records,) = bench.output.glob("run=*/_compare/*")
    (records / "00000.json").write_bytes(b"no json")
    code, out, err = call("run", *options(bench), "--compare=2")
    assert (code, err) == (0, "")
    assert "the run is committed, but its comparison is not done: " in out
    assert "00000.json is damaged" in out


def test_changed_answers_are_not_taken_for_the_runs(bench: Workbench) -> None:
    """A data file that has fewer rows than its record."""
    summary = committed(bench)
    part = Path(summary.data) / "part-00000.parquet"
    table = pq.read_table(part)
    part.unlink()
    pq.write_table(table.slice(1), part)
    assert [outcome.code for outcome in bench.compare(0, compare=2)] == ["not_reconciled"]


def test_partitions_are_compared_one_by_one(bench: Workbench, call: Cli) -> None:
    for month in "01", "02":
        bench.write(f"month={month}/a.parquet", 0)
        where = {"input": (f"{bench.input}/month={month}",), "output": f"{bench.output}/month={month}"}
        bench.score(**where)
        bench.run(**where)
        bench.compare(compare=3, **where)
    code, out, _ = call("run", *options(bench), "--partition=month", "--from=01", "--to=02", "--compare=3", "--json")
    assert code == 0
    odd = in_both(100, NAN, PLUS_ONE)
    assert [one["summary"]["compared"]["disagreed"] for one in json.loads(out)] == [odd, odd]


def test_on_s3_it_is_the_same(tmp_path: Path, versions: Path, s3_bucket: str) -> None:
    bench = RemoteWorkbench(tmp_path, versions, s3_bucket)
    bench.write_some(2)
    bench.score_and_run()
    bench.compare(0, compare=3)
    assert any("/_open/" in name for name in bench.listed())
    done = compared(bench, 3)
    assert (done.parts_compared, done.rows, done.disagreed) == (2, 172, in_both(200, NAN, PLUS_ONE))
    assert done.report.startswith(f"s3://{s3_bucket}/out/run=")
    there = bench.fetch(done.evidence.partition("/_compare/")[0]) / "_compare" / done.evidence.partition("/_compare/")[2]
    assert replay(decode(there.read_bytes())).differences == ()
    assert not any("/_open/" in name for name in bench.listed())


@pytest.mark.slow
def test_a_run_from_the_start_on_ray(bench: Workbench, ray_cluster: Any) -> None:
    """Scored, committed, compared; and again, which does nothing."""
    bench.write_some(3)
    summary = bench.run(compare=3)
    assert summary.scored == 300
    assert_each_row_once(summary.folder, 300)
    done = summary.compared
    assert done is not None
    assert (done.parts_compared, done.rows, done.disagreed) == (3, 258, in_both(300, NAN, PLUS_ONE))
    assert replay(evidence_of(done)).differences == ()
    assert bench.run(compare=3).compared == done


@pytest.mark.slow
def test_a_killed_comparison_is_finished_by_the_same_command(bench: Workbench, ray_cluster: Any) -> None:
    files, rows = 20, 2000
    for i in range(files):
        bench.write(f"{i:02}.parquet", i * rows, rows)
    bench.score_and_run()
    there = "--address", ray_cluster.get_runtime_context().gcs_address, "--compare", "3"

    def recorded() -> int:
        return len(list(bench.output.glob("run=*/_compare/*/[0-9]*.json")))

    with driver(bench, *there) as process:
        while recorded() < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert 3 <= recorded() < files
    done = bench.run(compare=3).compared
    assert done is not None
    assert (done.parts_compared, done.disagreed) == (files, in_both(files * rows, NAN, PLUS_ONE))
    assert done.rows == 86 * files * rows // 100


@x86
@pytest.mark.slow
def test_a_candidate_that_kills_actors_harms_no_row(bench: Workbench, tmp_path: Path, ray_cluster: Any) -> None:
    shutil.copytree(bench.repository, tmp_path / "models")
    bench.repository = tmp_path / "models"
    fragile = testing.fragile(tmp_path / "fragile.onnx")
    package_model(fragile, name="lookup", repository=open_repository(bench.repository), version=8)
    bench.write_some(3)
    write_poison(bench, "2-poison.parquet", 500)
    summary = bench.run(compare=8, actors=2)
    assert summary.manifest.rows_in == 400
    done = summary.compared
    assert done is not None
    assert (done.parts, done.parts_compared, done.rows, done.disagreed) == (4, 3, 258, 0)
    (fault,) = done.faults
    assert "2-poison.parquet" in fault
    assert "2 processes died while lookup/8 was asked" in fault
    assert done.decision != "PROMOTE"
