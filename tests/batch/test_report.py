"""The report of a run: what it says equals what the run did, whatever the run was, and the page stands alone."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch import excerpts, job, plots, report
from batch.cli import run_folder
from batch.timeline import timeline
from tests.batch.workbench import Cli, Workbench, options, visible
from triform import testing
from triform.errors import ConfigurationError, JobError, NotReconciled
from triform.package import FileEntry
from triform.runs.commit import RunManifest, manifest
from triform.runs.folder import RunFolder
from triform.scoring import ScoredPart

FETCHES = {"src", "href", "action", "data", "srcset", "poster", "background", "formaction", "xlink:href"}
HOSTILE = "<script>alert('1')</script>$x^2$\u202e"


class Page(HTMLParser):
    """A page's text, its tables by caption, what it would fetch, and its pictures as (alternative text, SVG)."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.within = ""
        self.links: list[str] = []
        self.styled: list[str] = []
        self.policy = ""
        self.pictures: list[tuple[str, bytes]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.within = tag
        self.links += [value for name, value in given.items() if name in FETCHES]
        self.styled += [name for name in given if name == "style" or name.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "img":
            self.pictures.append((given["alt"], base64.b64decode(given["src"].removeprefix("data:image/svg+xml;base64,"))))
        if tag == "caption":
            self.rows: list[list[str]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, _: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.within == "caption":
            self.tables[data] = self.rows
        elif self.within in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.tables["The run"]}

    def numbers(self) -> dict[str, str]:
        """Of the first output column of quantities."""
        headers, values = next(rows for caption, rows in self.tables.items() if caption.startswith("Values ("))
        return dict(zip(headers, values, strict=True))

    def picture(self, begins: str) -> bytes:
        (svg,) = [svg for says, svg in self.pictures if says.startswith(begins)]
        return svg


def page_of(run: str) -> Page:
    content = report.render(run_folder(run))
    page = Page(content)
    assert_stands_alone(page)
    return page


def assert_stands_alone(page: Page) -> None:
    assert "script" not in page.tags
    assert page.styled == []
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    for says, svg in page.pictures:
        assert len(says) > 20
        for element in ElementTree.fromstring(svg).iter():  # noqa: S314 - what matplotlib has just written
            assert "script" not in element.tag
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def change_manifest(at: str, change: Callable[[ScoredPart], ScoredPart]) -> RunManifest:
    """Rewrites the parts of a committed run's manifest, as another history would have left them."""
    run = Path(at)
    done = manifest(run_folder(at))
    assert done is not None
    done = msgspec.structs.replace(done, parts=tuple(map(change, done.parts)))
    (run / "_manifest/000001.json").write_bytes(msgspec.json.encode(done))
    return done


def forgotten(part: ScoredPart, **times: Any) -> ScoredPart:
    return msgspec.structs.replace(part, **({"seconds": {}, "elapsed": 0.0, "began": 0.0, "worker": ""} | times))


def test_it_says_what_the_manifest_says(workbench: Workbench) -> None:
    summary = workbench.write_some(2).score_and_run()
    done = summary.manifest
    page = page_of(summary.folder)
    facts = page.facts()
    assert (facts["run"], facts["digest"], facts["committed"]) == (done.run, done.pinned.digest, done.committed_at)
    assert (facts["rows in"], facts["rows answered"], facts["dead letters"]) == ("200", "172", "28")
    assert facts["model"] == "lookup/1 (asked for as lookup@stable)"
    assert "200 rows in = 172 answered + 28 dead letters (14.00%)" in page.text
    stages = {row[0]: float(row[2]) for row in page.tables["Seconds, summed over the parts"][1:-1]}
    assert stages == pytest.approx(done.seconds, abs=0.002)
    parts = page.tables["Rows in, answered and refused"][1:]
    assert sorted((row[0], row[2], row[3], row[4]) for row in parts) == [("0", "100", "86", "14"), ("1", "100", "86", "14")]
    assert [row[:2] for row in page.tables["Dead letters by reason"][1:]] == [["missing_value", "20"], ["run_failed", "8"]]
    letters = next(rows for caption, rows in page.tables.items() if "examples" in caption)[1:]
    assert [row[1:3] for row in letters] == [[str(r), "missing_value"] for r in (3, 13, 23)] + [
        [str(r), "run_failed"] for r in (7, 32, 57)
    ]
    assert letters[0] == [str(workbench.input / "0.parquet"), "3", "missing_value", "column 'x' is null"]
    y = page.numbers()
    answers = pq.read_table(summary.data, columns=["y"])["y"].to_numpy()
    assert (y["rows"], float(y["median"]), float(y["greatest"])) == ("172", float(np.median(answers)), 90.0)
    assert float(y["mean"]) == pytest.approx(answers.mean(), rel=1e-5)
    workers = page.tables["Workers"]
    assert len(workers) == 2  # both parts were scored in this process
    assert workers[1][1] == "2"
    assert len(page.pictures) == 5


def test_records_tell_who_scored_them_and_when(workbench: Workbench) -> None:
    summary = workbench.write_some(2).score_and_run()
    first, second = summary.manifest.parts
    assert first.worker == second.worker
    assert re.fullmatch(r"[^/\s]{1,64}:\d+", first.worker)
    assert first.began + first.elapsed <= second.began + 0.001
    assert msgspec.json.decode(b'{"part":0,"rows_in":1,"rows_out":1,"dead":{},"data":{"size":1,"sha256":"a"},"dead_letters":null,'
                               b'"seconds":{},"elapsed":1.0}', type=ScoredPart).began == 0.0  # fmt: skip


def test_parts_without_times_are_told_and_the_others_drawn(workbench: Workbench) -> None:
    """An orphan that was adopted, and a record of an older version."""
    run = workbench.write_some(3).score_and_run().folder
    change_manifest(run, lambda p: forgotten(p) if p.part == 1 else forgotten(p, elapsed=2.0) if p.part == 2 else p)
    page = page_of(run)
    assert "1 part(s) were adopted from an earlier attempt: no times." in page.text
    assert "1 part(s) do not say when they were scored" in page.text
    assert [row[0] for row in page.tables["Rows in, answered and refused"][1:]] == ["2", "0"]
    change_manifest(run, forgotten)
    page = page_of(run)
    assert "3 part(s) were adopted" in page.text
    assert [says for says, _ in page.pictures if "part" in says] == []
    assert page.facts()["rows in"] == "300"


def test_an_orphan_is_adopted_without_times(workbench: Workbench) -> None:
    workbench.write_some(1).score()
    folder, _ = workbench.begin()
    (Path(folder.location) / "_parts/00000.json").unlink()
    page = page_of(workbench.run().folder)
    assert "1 part(s) were adopted from an earlier attempt: no times." in page.text


def test_no_rows_at_all(workbench: Workbench) -> None:
    workbench.write("empty.parquet", 0, rows=0)
    page = page_of(workbench.score_and_run().folder)
    assert page.facts()["rows in"] == "0"
    assert "No row was answered." in page.text
    assert "None: every row was answered." in page.text


def test_only_dead_letters(workbench: Workbench) -> None:
    workbench.write("dead.parquet", 0, rows=5, x=pa.array([None] * 5, pa.int64()))
    page = page_of(workbench.score_and_run(max_dead_letters=1.0).folder)
    assert "0 answered + 5 dead letters (100.00%)" in page.text
    assert "No row was answered." in page.text
    assert b"missing_value" in page.picture("Dead letters by reason")


def test_no_dead_letters(workbench: Workbench) -> None:
    workbench.write("fine.parquet", 0, rows=1, x=[4])
    page = page_of(workbench.score_and_run().folder)
    assert "None: every row was answered." in page.text
    assert page.numbers()["median"] == "40"


def scored(root: Path, model: Path, columns: dict[str, Any], config: str, **changes: Any) -> job.Summary:
    """A committed run of another model than the workbench's, over one file."""
    repository = testing.repository(root / "models", {"m": model}, config={"m": config})
    bench = Workbench(root, Path(repository.location))
    bench.input.mkdir()
    pq.write_table(pa.table(columns), bench.input / f"{HOSTILE.replace('/', '')}.parquet")
    return bench.score_and_run(**({"model": "m/1", "key": (), "keep": ()} | changes))


def identity(root: Path, datatype: str, values: Any, name: str = "y") -> Page:
    config = f'[inputs.x]\ncolumns = ["x"]\n[outputs.y]\ncolumns = [{json.dumps(name)}]\n'
    return page_of(scored(root, testing.identity(root / "m.onnx", datatype, shape=("N", 1)), {"x": values}, config).folder)


def test_nan_and_infinity_are_counted_and_not_drawn(tmp_path: Path) -> None:
    values = np.array([0.0, 1.0, 2.0, np.nan, np.nan, np.inf, -np.inf, -np.inf, -np.inf], np.float32)
    y = (page := identity(tmp_path, "FP32", values)).numbers()
    assert (y["NaN"], y["+infinity"], y["-infinity"], y["least"], y["greatest"]) == ("2", "1", "3", "0", "2")
    assert "2 NaN, 1 +infinity, 3 -infinity" in page.text


@pytest.mark.parametrize("values", [[np.nan], [1e300] * 3, [-1.7e308, 1.7e308], [1.0, np.nextafter(1.0, 2.0)], [5e-324, 0.0]])
def test_numbers_that_cannot_be_drawn_are_told(tmp_path: Path, values: list[float]) -> None:
    y = identity(tmp_path, "FP64", np.array(values)).numbers()
    assert y["rows"] == str(len(values))


def test_classes_are_counted_and_hostile_names_are_text(tmp_path: Path) -> None:
    words = [HOSTILE, HOSTILE, "漢字", "$\\nope{$", "", "x" * 500]
    page = identity(tmp_path, "BYTES", words, name=HOSTILE)
    shown = HOSTILE.replace("\u202e", "\\u202e")
    counts = {row[0]: row[1] for row in page.tables["Rows by value (string)"][1:]}
    assert counts == {shown: "2", "漢字": "1", "$\\nope{$": "1", "(empty)": "1", "x" * excerpts.MAX_WORD: "1"}
    assert shown in page.words  # the heading, whole: as text
    assert page.tags.count("h3") == 1


def test_hostile_reasons_and_files_are_text(tmp_path: Path) -> None:
    config = f"[inputs.x]\ncolumns = [{json.dumps(HOSTILE)}]\n"
    model = testing.identity(tmp_path / "m.onnx", "FP32", shape=("N", 1))
    page = page_of(scored(tmp_path, model, {HOSTILE: [1.0, None]}, config, max_dead_letters=1.0).folder)
    (letter,) = next(rows for caption, rows in page.tables.items() if "examples" in caption)[1:]
    assert "<script>" in letter[0]
    assert letter[3] == f"column '{HOSTILE}' is null".replace("\u202e", "\\u202e")


def test_integers_are_classes_if_few_and_quantities_if_many(tmp_path: Path) -> None:
    page = identity(tmp_path / "few", "INT64", [2**53 + 1, 7, 7])
    assert page.tables["Rows by value (int64)"][1:] == [["7", "2"], [str(2**53 + 1), "1"]]
    assert identity(tmp_path / "many", "INT64", list(range(100))).numbers()["greatest"] == "99"


def test_lists_are_left_out_and_told(tmp_path: Path) -> None:
    model = testing.identity(tmp_path / "m.onnx", "FP32", shape=("N", 3))
    page = page_of(scored(tmp_path, model, {"x": [[1.0, 2.0, 3.0]]}, "").folder)
    assert "Left out: y (list<" in page.text
    assert "sample of" not in page.text


def test_a_sample_is_bounded_even_and_told(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten parts of 100 rows, some of each."""
    summary = workbench.write_some(10).score_and_run()
    monkeypatch.setattr(excerpts, "SAMPLE_ROWS", 50)
    folder = RunFolder(workbench.output, summary.manifest.run)
    taken = excerpts.sample(folder, folder.plan(), summary.manifest)
    assert (taken.rows, taken.of, taken.parts, taken.answers[0].rows) == (50, 860, 10, 50)
    assert "A sample of 50 of 860 answered rows, evenly from 10 of 10 part(s)" in page_of(summary.folder).text
    monkeypatch.setattr(excerpts, "SAMPLE_PARTS", 4)
    assert "evenly from 4 of 10 part(s)" in page_of(summary.folder).text


def parts_of(count: int, workers: int, pause: float = 0.0) -> list[ScoredPart]:
    file = FileEntry(size=1, sha256="0")
    seconds = dict.fromkeys(report.STAGES, 0.2)
    began = [1e9 + i // workers + (pause if i >= count / 2 else 0) for i in range(count)]
    return [ScoredPart(i, 100, 100, {}, file, None, seconds, 1.0, began[i], f"h:{i % workers}") for i in range(count)]


def test_a_timeline_counts_who_works_and_leaves_long_pauses_out() -> None:
    time = timeline(parts_of(8, 2))
    assert {worker: len(spans) for worker, spans in time.lanes.items()} == {"h:0": 4, "h:1": 4}
    assert (time.seconds, time.most_active, time.pauses) == (4.0, 2, [])
    assert (time.active[0], time.active[-1]) == ((0.0, 2), (4.0, 0))
    later = timeline(parts_of(8, 2, pause=86_400.0))
    assert (later.seconds, later.most_active) == (4.0, 2)
    assert later.pauses == [(2.0, 86_400.0)]
    assert timeline([]).lanes == {}


@pytest.mark.parametrize("count", [1, 60, 61, 2000])
def test_pictures_stay_small_with_many_parts(count: int) -> None:
    parts = parts_of(count, 100)
    numbers, speeds = [p.part for p in parts], [float(i + 1) for i in range(count)]
    drawn = [
        plots.throughput(numbers, speeds, 1.0),
        plots.stages(numbers, {stage: [0.2] * count for stage in report.STAGES}),
        plots.actors(timeline(parts)),
    ]
    assert all(svg.startswith(b"<?xml") for svg in drawn)
    assert sum(map(len, drawn)) < 400_000
    assert drawn[0] == plots.throughput(numbers, speeds, 1.0)


def test_the_command_writes_the_file_anew_and_readers_ignore_it(workbench: Workbench, call: Cli) -> None:
    workbench.write_some(1).score()
    code, out, _ = call("run", *options(workbench))
    (run,) = workbench.output.glob("run=*")
    assert f"python -m batch report {run}" in out
    before = visible(workbench.output)
    for _ in range(2):
        assert call("report", run) == (0, f"{run / '_report.html'}\n", "")
    assert Page((run / "_report.html").read_bytes()).facts()["rows in"] == "100"
    assert visible(workbench.output) == before
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert call("verify", run)[0] == 0
    other = workbench.root / "report.html"
    code, out, _ = call("report", run, "--output", other, "--json")
    assert (code, json.loads(out)) == (0, {"run": str(run), "report": str(other)})
    assert other.read_bytes() == (run / "_report.html").read_bytes()


def test_run_writes_it_where_asked(workbench: Workbench, call: Cli) -> None:
    workbench.write_some(1).score()
    code, out, err = call("run", *options(workbench), "--report")
    (run,) = workbench.output.glob("run=*")
    assert (code, err) == (0, "")
    assert f"report: {run}/_report.html" in out
    assert (run / "_report.html").exists()
    code, out, err = call("run", *options(workbench), "--report", "--json")
    assert (code, json.loads(out)["manifest"]["rows_in"]) == (0, 100)
    assert "_report.html" in err


def test_a_report_that_fails_does_not_fail_the_run(workbench: Workbench, call: Cli) -> None:
    summary = workbench.write_some(1).score_and_run()
    (Path(summary.data) / "part-00000.parquet").write_bytes(b"damaged")
    code, out, err = call("run", *options(workbench), "--report")
    assert code == 0
    assert "100 in = 86 answered" in out
    assert "the run is committed, but its report failed" in err
    assert "part-00000.parquet cannot be read" in err
    code, _, err = call("report", summary.folder)
    assert (code, err.count("\n"), "not_reconciled" in err) == (1, 1, True)


def test_what_is_not_committed_has_no_report(workbench: Workbench, call: Cli) -> None:
    workbench.write_some(1).score()
    folder, _ = workbench.begin()
    with pytest.raises(JobError, match="is not committed: the command that started it finishes it"):
        report.render(folder)
    for run in folder.location, workbench.root / "absent":
        code, out, err = call("report", run)
        assert (code, out) == (1, "")
        assert "job_failed" in err
    assert not (Path(folder.location) / "_report.html").exists()


def test_without_matplotlib_it_is_told_before_anything_is_scored(
    workbench: Workbench, call: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.delitem(sys.modules, "batch.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"install triform\[report\]"):
        report.require_plots()
    workbench.write_some(1)
    code, _, err = call("run", *options(workbench), "--report")
    assert (code, "triform[report]" in err) == (2, True)
    assert not workbench.output.exists()


def test_damage_is_told_with_the_file(workbench: Workbench) -> None:
    summary = workbench.write_some(1).score_and_run()
    (Path(summary.folder) / "dead_letters/part-00000.parquet").unlink()
    with pytest.raises(NotReconciled, match=r"dead_letters/part-00000\.parquet cannot be read"):
        page_of(summary.folder)
