"""Small jobs on real files: a `Workbench` writes inputs, scores parts in this process, and says where each row went."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from batch import compare, job
from batch.actor import Outcome, PartScorer
from batch.attempts import Registry
from batch.comparer import PartComparer
from batch.spec import JobSpec
from triform.runs.folder import RunFolder
from triform.runs.plan import Plan
from triform.runtime import RuntimeOptions
from triform.stores.files import open_files


def x_of(row: int) -> int | None:
    """What the model is asked: 10 rows of 100 are null, 4 make its run fail, the others are answered with ten times it."""
    return None if row % 10 == 3 else 99 if row % 25 == 7 else row % 10


DEAD_OF_100 = {"missing_value": 10, "run_failed": 4}


class Workbench:
    """One job in a folder of its own. `said` is what it printed."""

    def __init__(self, root: Path, repository: Path, output: str = "output") -> None:
        self.root = root
        self.repository = repository
        self.input = root / "input"
        self.output = root / output
        self._said = io.StringIO()
        self.console = Console(file=self._said, width=200)

    @property
    def said(self) -> str:
        return self._said.getvalue()

    def write(self, name: str, start: int, rows: int = 100, *, group: int = 40, **more: Sequence[Any]) -> Path:
        """A file of rows `start`... with the columns id, x, note, and those in `more`."""
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = range(start, start + rows)
        columns = {"id": pa.array(ids, pa.int64()), "x": pa.array(map(x_of, ids), pa.int64()), "note": [f"n{i}" for i in ids]}
        pq.write_table(pa.table(columns | more), path, row_group_size=group)
        return path

    def write_some(self, files: int = 3) -> Workbench:
        for i in range(files):
            self.write(f"{i}.parquet", 100 * i)
        return self

    def spec(self, **changes: Any) -> JobSpec:
        spec = JobSpec(
            repository=str(self.repository),
            model="lookup@stable",
            input=(str(self.input),),
            output=str(self.output),
            key=("id",),
            keep=("note",),
            max_dead_letters=0.5,
        )
        return msgspec.structs.replace(spec, **changes)

    def begin(self, **changes: Any) -> tuple[RunFolder, Plan]:
        spec = self.spec(**changes)
        output = open_files(spec.output)
        plan = job.prepare(spec, self.console, output)
        folder = RunFolder(output, plan.run)
        return folder, folder.begin(plan)

    def score(self, *parts: int, max_dead: int = 1000, options: RuntimeOptions | None = None, **changes: Any) -> list[Outcome]:
        """Does in this process what the actors do; all parts where none are named."""
        folder, plan = self.begin(**changes)
        scorer = PartScorer(folder.files.location, folder.run, options or RuntimeOptions(), max_dead)
        return [scorer.score(number) for number in parts or range(len(plan.parts))]

    def compare(self, *parts: int, registry: Registry | None = None, **changes: Any) -> list[Outcome]:
        """Does in this process what the actors of `--compare` do, on a committed run; all parts where none are named."""
        spec = self.spec(**changes)
        output = open_files(spec.output)
        plan = job.prepare(spec, self.console, output)
        found = compare.prepare(spec, plan, RunFolder(output, plan.run))
        found.begin()
        comparer = PartComparer(output.location, plan.run, spec.runtime(), found.candidate, found.policy, registry)
        return [comparer.score(number) for number in parts or range(len(plan.parts))]

    def run(self, **changes: Any) -> job.Summary:
        """The whole job. It starts Ray only for the parts that `score` has not done."""
        return job.run(self.spec(**changes), self.console)

    def score_and_run(self, **changes: Any) -> job.Summary:
        assert all(outcome.scored for outcome in self.score(**changes))
        return self.run(**changes)


class RemoteWorkbench(Workbench):
    """The same on S3: what it writes goes to `<bucket>/in`, and its job reads that and writes to `<bucket>/out`."""

    def __init__(self, root: Path, repository: Path, bucket: str, endpoint: str | None = None) -> None:
        super().__init__(root, repository)
        self.bucket = bucket
        self.client = boto3.client("s3", endpoint_url=endpoint)  # past any proxy that the job itself goes through

    def write(self, name: str, start: int, rows: int = 100, *, group: int = 40, **more: Sequence[Any]) -> Path:
        path = super().write(name, start, rows, group=group, **more)
        self.client.upload_file(str(path), self.bucket, f"in/{name}")
        return path

    def spec(self, **changes: Any) -> JobSpec:
        there = {"input": (f"s3://{self.bucket}/in",), "output": f"s3://{self.bucket}/out"}
        return super().spec(**there | changes)

    def listed(self, prefix: str = "out/") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def fetch(self, folder: str) -> Path:
        """A copy of a run's folder on the local disk."""
        key = folder.removeprefix(f"s3://{self.bucket}/")
        here = self.root / "fetched"
        for name in self.listed(f"{key}/"):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, name, str(here / name))
        return here / key


def read_rows(folder: Path | str) -> pa.Table:
    """All rows of a folder of Parquet files."""
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in sorted(Path(folder).glob("*.parquet"))])


def assert_each_row_once(run: Path | str, rows: int) -> None:
    """Rows 0.. stand in a committed run's data or its dead letters, each where it belongs, with the right answer and reason."""
    data, dead = read_rows(f"{run}/data"), read_rows(f"{run}/dead_letters")
    counts = Counter(data["id"].to_pylist()) + Counter(dead["id"].to_pylist())
    assert counts == Counter(range(rows))
    assert data["y"].to_pylist() == [10.0 * x_of(row) for row in data["id"].to_pylist()]  # type: ignore[operator]
    reasons = {None: "missing_value", 99: "run_failed"}
    assert dead["code"].to_pylist() == [reasons[x_of(row)] for row in dead["id"].to_pylist()]


def visible(output: Path) -> list[Path]:
    """What a reader may look at: everything but names that begin with "_" or "."."""
    found = (path.relative_to(output) for path in output.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(("_", ".")) for part in path.parts)]


Cli = Callable[..., tuple[int, str, str]]  # of the fixture `call`


def options(bench: Workbench) -> list[str]:
    """Of the command, for a run of this bench."""
    given = {"repository": bench.repository, "model": "lookup@stable", "input": bench.input, "output": bench.output, "key": "id"}
    return [f"--{name}={value}" for name, value in given.items()] + ["--keep=note", "--max-dead-letters=0.5"]
