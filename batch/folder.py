"""A run's folder on a local disk: every step of it whole, durable, and made by exactly one of many writers.

    <output>/run=<id>/_run.json             the frozen plan
                     /_tmp/                 attempts' files; nobody reads them
                     /_data/, _dead_letters/    finished files of parts, until the commit renames the folders
                     /_parts/00007.json     a part's commit record
                     /data/, dead_letters/  what readers read
                     /_manifest/000001.json the commit
    <output>/_open/<job>.json               the unfinished run of a job
    <output>/_current/000001.json           the runs that the output has stood for, the latest last

A part: its dead letters are durable in _tmp before its data file is linked to the final name. That link decides which attempt
counts; whoever comes later (the attempt itself, a resume, a zombie) completes the winner's work and never adds their own.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import orjson
import pyarrow.parquet as pq

from batch.plan import Plan
from triform.dead_letters import FOOTER_KEY
from triform.errors import JobError, NotReconciled, OutputExists
from triform.package import file_entry
from triform.scoring import ScoredPart
from triform.stores import durable

T = TypeVar("T")
_RECORD: Final = re.compile(r"(\d{5,})\.json")


class Current(msgspec.Struct, frozen=True):
    """An entry of `_current/`."""

    run: str
    previous: str | None
    committed_at: str


class Footer(msgspec.Struct, frozen=True):
    """What a part's files say about themselves."""

    run: str
    attempt: str
    part: int
    rows_in: int
    rows_out: int
    dead: dict[str, int]


class OpenRun(msgspec.Struct, frozen=True):
    run: str


def read_json(path: Path, kind: type[T]) -> T | None:
    """The file's content, None if there is no such file. Raises `JobError` for one that is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise JobError(f"{path} is damaged: {error}") from error


def read_footer(path: Path) -> Footer | None:
    """The footer's Triform entry; None if the file does not exist. Raises `NotReconciled` for a file that is not ours."""
    try:
        content = (pq.read_metadata(path).metadata or {}).get(FOOTER_KEY)
        return msgspec.json.decode(content or b"", type=Footer)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise NotReconciled(f"{path} was not written by this job: move it away ({error})") from error


class RunFolder:
    """One run below an output folder. Safe to use by any number of processes at once."""

    def __init__(self, output: Path, run: str) -> None:
        self.output = output
        self.run = run
        self.path = output / f"run={run}"
        self.parts = self.path / "_parts"
        self.manifests = self.path / "_manifest"
        self.temporary = self.path / "_tmp"

    def data(self, *, committed: bool) -> Path:
        return self.path / ("data" if committed else "_data")

    def dead_letters(self, *, committed: bool) -> Path:
        return self.path / ("dead_letters" if committed else "_dead_letters")

    def begin(self, plan: Plan) -> Plan:
        """Freezes the plan, or returns the one that another driver froze first; names it the job's open run."""
        for folder in (self.parts, self.manifests, self.temporary, self.output / "_open"):
            folder.mkdir(parents=True, exist_ok=True)
        durable.create_exclusively(self.path / "_run.json", msgspec.json.encode(plan))
        frozen = self.plan()
        if not self.swapped() and not self.committed():
            for folder in (self.data(committed=False), self.dead_letters(committed=False)):
                folder.mkdir(exist_ok=True)
        durable.create_exclusively(self._open(frozen.job), msgspec.json.encode(OpenRun(self.run)))
        return frozen

    def plan(self) -> Plan:
        plan = read_json(self.path / "_run.json", Plan)
        if plan is None:
            raise JobError(f"{self.path} holds no run: it has no _run.json")
        return plan

    def attempt_files(self, part: int) -> tuple[str, Path, Path]:
        """An attempt's id, and where it writes data and dead letters."""
        attempt = uuid.uuid4().hex
        return attempt, self._attempt(part, attempt, "data"), self._attempt(part, attempt, "dead")

    def _attempt(self, part: int, attempt: str, what: str) -> Path:
        return self.temporary / f"part-{part:05d}.{attempt}.{what}.parquet"

    def place(self, attempt: str, scored: ScoredPart) -> ScoredPart:
        """Makes an attempt's files the part's, unless another attempt was first; returns what counts."""
        durable.fsync_folder(self.temporary)
        source, target = self._attempt(scored.part, attempt, "data"), self._file(self.data(committed=False), scored.part)
        try:
            durable.link_exclusively(source, target)
        except FileNotFoundError as error:
            raise JobError(f"run {self.run} was finished by another driver meanwhile") from error
        placed = self.adopt(scored.part, scored)
        if placed is None:
            raise NotReconciled(f"{target} vanished while it was placed")
        source.unlink(missing_ok=True)
        self._attempt(scored.part, attempt, "dead").unlink(missing_ok=True)
        return placed

    def adopt(self, part: int, scored: ScoredPart | None = None) -> ScoredPart | None:
        """Completes a part whose data file is in place, by whichever attempt: dead letters, then the record.

        None if there is no such file. `scored` is used where it describes the very file that is there.
        """
        if (record := self.record(part)) is not None:
            return record
        path = self._file(self.data(committed=False), part)
        footer = read_footer(path)
        if footer is None:
            return None
        if (footer.run, footer.part) != (self.run, part):
            raise NotReconciled(f"{path} belongs to part {footer.part} of run {footer.run}: move it away")
        letters = self._file(self.dead_letters(committed=False), part)
        if footer.dead:
            self._place_letters(footer, letters)
        data = file_entry(path)
        if scored is None or scored.data != data:
            entry = file_entry(letters) if footer.dead else None
            scored = ScoredPart(part, footer.rows_in, footer.rows_out, footer.dead, data, entry, {}, 0.0)
        durable.create_exclusively(self._record(part), msgspec.json.encode(scored))
        return self.record(part)

    def _place_letters(self, footer: Footer, target: Path) -> None:
        source = self._attempt(footer.part, footer.attempt, "dead")
        try:
            durable.link_exclusively(source, target)
        except FileNotFoundError:
            if not target.exists():
                raise NotReconciled(
                    f"the dead letters of part {footer.part} are gone ({source} was removed): move {self.path} away and run again"
                ) from None
        placed = read_footer(target)
        if placed is None or placed.attempt != footer.attempt:
            raise NotReconciled(f"{target} belongs to another attempt than the part's data file: move both away")

    def record(self, part: int) -> ScoredPart | None:
        return read_json(self._record(part), ScoredPart)

    def recorded(self) -> set[int]:
        """The parts that are done."""
        return {int(m[1]) for m in map(_RECORD.fullmatch, (p.name for p in self.parts.iterdir())) if m}

    def swapped(self) -> bool:
        """Whether the commit, all its checks passed, has begun to rename the folders."""
        return self.dead_letters(committed=True).is_dir() or self.data(committed=True).is_dir()

    def swap(self) -> None:
        """Shows the finished files to readers: dead letters first, so that whoever sees data finds them."""
        for before, after in (
            (self.dead_letters(committed=False), self.dead_letters(committed=True)),
            (self.data(committed=False), self.data(committed=True)),
        ):
            try:
                if not after.is_dir():
                    before.rename(after)
            except OSError:
                if not after.is_dir():  # else another driver was quicker
                    raise
            durable.fsync_folder(self.path)

    def write_manifest(self, content: Any) -> bool:
        """The commit; False if another driver made it first."""
        body = orjson.dumps(msgspec.to_builtins(content), option=orjson.OPT_INDENT_2)
        return durable.create_exclusively(self.manifests / "000001.json", body)

    def committed(self) -> bool:
        return (self.manifests / "000001.json").exists()

    def tidy(self, job: str) -> None:
        """After the commit: nobody needs the attempts' files, and the job has no open run."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        if open_run(self.output, job) == self.run:
            self._open(job).unlink(missing_ok=True)

    def _open(self, job: str) -> Path:
        return self.output / "_open" / f"{job}.json"

    def _record(self, part: int) -> Path:
        return self.parts / f"{part:05d}.json"

    @staticmethod
    def _file(folder: Path, part: int) -> Path:
        return folder / part_name(part)


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def open_run(output: Path, job: str) -> str | None:
    """The unfinished run of a job, if there is one and nobody has moved it away."""
    marker = output / "_open" / f"{job}.json"
    found = read_json(marker, OpenRun)
    if found is not None and not RunFolder(output, found.run).path.is_dir():
        marker.unlink(missing_ok=True)
        return None
    return found.run if found else None


def current(output: Path) -> Current | None:
    """The run that the output stands for: the latest of the log `_current/`."""
    latest = _latest(output)
    return read_json(output / "_current" / f"{latest:06d}.json", Current) if latest else None


def _latest(output: Path) -> int:
    log = output / "_current"
    return max((int(m[1]) for m in map(_RECORD.fullmatch, os.listdir(log)) if m), default=0) if log.is_dir() else 0


def check_output(output: Path, run: str, if_exists: str) -> None:
    """Raises `OutputExists` if the output stands for another run and may not be replaced."""
    now = current(output)
    if now is not None and now.run != run and if_exists == "fail":
        raise OutputExists(
            f"{output} already stands for run {now.run}, committed {now.committed_at}, of other inputs or another model. "
            "Use --if-exists replace to let this run take its place (the old one stays readable), or another --output"
        )


def point_at(output: Path, run: str, committed_at: str, if_exists: str) -> None:
    """Lets the output stand for a committed run: the next entry of `_current/`, created exclusively, so that of two runs that
    come at once each knows of the other. Raises `OutputExists`."""
    (output / "_current").mkdir(exist_ok=True)
    while True:
        check_output(output, run, if_exists)
        latest, now = _latest(output), current(output)
        if now is not None and now.run == run:
            return
        content = Current(run, now.run if now else None, committed_at)
        if durable.create_exclusively(output / "_current" / f"{latest + 1:06d}.json", msgspec.json.encode(content)):
            return
