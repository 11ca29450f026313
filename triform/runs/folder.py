"""A run's folder, on a local disk or on S3: every step of it whole, durable, and made by exactly one of many writers.

    <output>/run=<id>/_run.json             the frozen plan
                     /_tmp/                 attempts' files; nobody reads them
                     /_data/, _dead_letters/    on a disk: finished files of parts, until the commit renames the folders
                     /_parts/00007.json     a part's commit record
                     /data/, dead_letters/  what readers read
                     /_manifest/000001.json the commit
                     /data/_SUCCESS         after it, for readers who know no manifest
    <output>/_open/<job>.json               the unfinished run of a job

A part: its dead letters are durable in _tmp before its data file gets its final name, exclusively (a link, or `If-None-Match`).
That name decides which attempt counts; whoever comes later (the attempt itself, a resume, a zombie) completes the winner's work
and never adds their own.
"""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import orjson
import pyarrow.parquet as pq

from triform.dead_letters import FOOTER_KEY
from triform.errors import InputChanged, JobError, NotReconciled, StoreError, TriformError
from triform.runs.plan import Plan
from triform.scoring import ScoredPart
from triform.stores.files import FileStore, open_files

T = TypeVar("T")
_RECORD: Final = re.compile(r"(\d{5,})\.json")
_PART: Final = re.compile(r"part-(\d{5,})\.parquet")
ABANDONED_SECONDS: Final = 24 * 3600.0  # an upload that old has lost its process


class Footer(msgspec.Struct, frozen=True):
    """What a part's files say about themselves."""

    run: str
    attempt: str
    part: int
    rows_in: int
    rows_out: int
    dead: dict[str, int]
    rows_canary: int = 0
    instead: dict[str, int] = {}


class PartFile(msgspec.Struct, frozen=True):
    """A part's file as it stands in the store."""

    footer: Footer
    rows: int
    size: int


class OpenRun(msgspec.Struct, frozen=True):
    run: str


class RunFolder:
    """One run below an output. Safe to use by any number of processes at once. Names of files are relative to the output."""

    def __init__(self, output: str | Path | FileStore, run: str) -> None:
        self.files = open_files(output) if isinstance(output, str | Path) else output
        self.run = run
        self.name = f"run={run}"
        self.temporary = f"{self.name}/_tmp"

    @property
    def location(self) -> str:
        return self.where(self.name)

    def where(self, name: str) -> str:
        """The whole path of a file, for people and readers."""
        return f"{self.files.location}/{name}"

    def data(self, *, committed: bool) -> str:
        return self._shown("data", committed)

    def dead_letters(self, *, committed: bool) -> str:
        return self._shown("dead_letters", committed)

    def _shown(self, folder: str, committed: bool) -> str:
        return f"{self.name}/{folder if committed or not self.files.renames else f'_{folder}'}"

    def begin(self, plan: Plan) -> Plan:
        """Freezes the plan, or returns the one that another driver froze first; names it the job's open run."""
        for folder in (f"{self.name}/_parts", f"{self.name}/_manifest", self.temporary, "_open", "_current"):
            self.files.make_folder(folder)
        self.files.create(f"{self.name}/_run.json", msgspec.json.encode(plan))
        frozen = self.plan()
        if not self.swapped() and not self.committed():
            self.files.make_folder(self.data(committed=False))
            self.files.make_folder(self.dead_letters(committed=False))
            with suppress(StoreError):  # a role that may not list uploads; the commit tries again
                self.files.abort_uploads(self.name, older_than=ABANDONED_SECONDS)
        self._open(frozen.job)
        return frozen

    def _open(self, job: str) -> None:
        """Names this run the job's open one, in the place of one that is committed and could not be removed."""
        marker, content = open_name(job), msgspec.json.encode(OpenRun(self.run))
        if not self.files.create(marker, content):
            found = read_json(self.files, marker, OpenRun)
            if found is not None and found.run != self.run and RunFolder(self.files, found.run).committed():
                self.files.replace(marker, content)

    def plan(self) -> Plan:
        plan = read_json(self.files, f"{self.name}/_run.json", Plan)
        if plan is None:
            raise JobError(f"{self.location} holds no run: it has no _run.json")
        return plan

    def attempt_files(self, part: int) -> tuple[str, Path, Path]:
        """An attempt's id, and where on the local disk it writes data and dead letters."""
        attempt = uuid.uuid4().hex
        return attempt, self._local(part, attempt, "data"), self._local(part, attempt, "dead")

    def _local(self, part: int, attempt: str, what: str) -> Path:
        return self.files.scratch(self.temporary) / _attempt_name(part, attempt, what)

    def _staged_letters(self, part: int, attempt: str) -> str:
        return f"{self.temporary}/{_attempt_name(part, attempt, 'dead')}"

    def place(self, attempt: str, scored: ScoredPart) -> ScoredPart:
        """Makes an attempt's files the part's, unless another attempt was first; returns what counts."""
        data, letters = self._local(scored.part, attempt, "data"), self._local(scored.part, attempt, "dead")
        try:
            if scored.dead:
                self.files.stage(letters, self._staged_letters(scored.part, attempt))
            self.files.place(data, f"{self.data(committed=False)}/{part_name(scored.part)}")
        except FileNotFoundError as error:
            raise JobError(f"run {self.run} was finished by another driver meanwhile") from error
        placed = self.adopt(scored.part, attempt, scored)
        if placed is None:
            raise NotReconciled(f"part {scored.part} of {self.location} vanished while it was placed")
        data.unlink(missing_ok=True)
        letters.unlink(missing_ok=True)
        if scored.dead:
            self.files.remove(self._staged_letters(scored.part, attempt))
        return placed

    def adopt(self, part: int, attempt: str | None = None, scored: ScoredPart | None = None) -> ScoredPart | None:
        """Completes a part whose data file is in place, by whichever attempt: dead letters, then the record.

        None if there is no such file. `scored` is what `attempt` came to: it is taken where that attempt's file is there.
        """
        if (record := self.record(part)) is not None:
            return record
        name = f"{self.data(committed=False)}/{part_name(part)}"
        found = self.part_file(name)
        if found is None:
            return None
        footer = found.footer
        if (footer.run, footer.part) != (self.run, part):
            raise NotReconciled(f"{self.where(name)} belongs to part {footer.part} of run {footer.run}: move it away")
        letters = f"{self.dead_letters(committed=False)}/{part_name(part)}"
        if footer.dead:
            self._place_letters(footer, letters)
        if scored is None or footer.attempt != attempt:
            entry = self.files.entry(letters) if footer.dead else None
            scored = ScoredPart(
                part=part,
                rows_in=footer.rows_in,
                rows_out=footer.rows_out,
                dead=footer.dead,
                data=self.files.entry(name),
                dead_letters=entry,
                seconds={},
                elapsed=0.0,
                rows_canary=footer.rows_canary,
                instead=footer.instead,
            )
        self.files.create(self._record(part), msgspec.json.encode(scored))
        return self.record(part)

    def _place_letters(self, footer: Footer, target: str) -> None:
        source = self._staged_letters(footer.part, footer.attempt)
        try:
            self.files.copy(source, target)
        except (FileNotFoundError, InputChanged):  # it was removed before, or while it was copied
            if not self.files.exists(target):
                raise NotReconciled(
                    f"the dead letters of part {footer.part} are gone ({self.where(source)} was removed): "
                    f"move {self.location} away and run again"
                ) from None
        placed = self.part_file(target)
        if placed is None or placed.footer.attempt != footer.attempt:
            raise NotReconciled(f"{self.where(target)} belongs to another attempt than the part's data file: move both away")

    def part_file(self, name: str) -> PartFile | None:
        """A part's file; None if there is none. Raises `NotReconciled` for a file that is not ours."""
        try:
            with self.files.open(name) as file:
                metadata = pq.read_metadata(file)
                footer = msgspec.json.decode((metadata.metadata or {}).get(FOOTER_KEY) or b"", type=Footer)
                return PartFile(footer, metadata.num_rows, file.seek(0, 2))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise NotReconciled(f"{self.where(name)} was not written by this job: move it away ({error})") from error

    def record(self, part: int) -> ScoredPart | None:
        return read_json(self.files, self._record(part), ScoredPart)

    def recorded(self) -> set[int]:
        """The parts that are done."""
        return {int(m[1]) for m in map(_RECORD.fullmatch, self.files.names(f"{self.name}/_parts")) if m}

    def placed(self) -> set[int]:
        """The parts whose data file has its final name: done, or to be completed by `adopt`."""
        return {int(m[1]) for m in map(_PART.fullmatch, self.files.names(self.data(committed=False))) if m}

    def swapped(self) -> bool:
        """Whether the commit, all its checks passed, has begun to rename the folders."""
        shown = self.dead_letters(committed=True), self.data(committed=True)
        return self.files.renames and any(map(self.files.has_folder, shown))

    def swap(self) -> None:
        """Shows the finished files to readers: dead letters first, so that whoever sees data finds them."""
        if not self.files.renames:
            return
        for before, after in (
            (self.dead_letters(committed=False), self.dead_letters(committed=True)),
            (self.data(committed=False), self.data(committed=True)),
        ):
            try:
                if not self.files.has_folder(after):
                    self.files.rename_folder(before, after)
            except OSError:
                if not self.files.has_folder(after):  # else another driver was quicker
                    raise

    def write_manifest(self, content: Any) -> bool:
        """The commit; False if another driver made it first."""
        body = orjson.dumps(msgspec.to_builtins(content), option=orjson.OPT_INDENT_2)
        return self.files.create(self._manifest, body)

    def manifest(self, kind: type[T]) -> T | None:
        return read_json(self.files, self._manifest, kind)

    def committed(self) -> bool:
        return self.files.exists(self._manifest)

    @property
    def _manifest(self) -> str:
        return f"{self.name}/_manifest/000001.json"

    def mark_success(self) -> None:
        """The last thing that is written: with it the data is whole."""
        self.files.create(f"{self.data(committed=True)}/_SUCCESS", b"")

    def tidy(self, job: str) -> None:
        """After the commit: nobody needs the attempts' files, and the job has no open run. What may not be removed stays."""
        try:
            self.files.remove_folder(self.temporary)
            self.files.abort_uploads(self.name)
            if open_run(self.files, job) == self.run:
                self.files.remove(open_name(job))
        except TriformError:  # a role that may not delete
            return

    def _record(self, part: int) -> str:
        return f"{self.name}/_parts/{part:05d}.json"


def open_name(job: str) -> str:
    return f"_open/{job}.json"


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _attempt_name(part: int, attempt: str, what: str) -> str:
    return f"part-{part:05d}.{attempt}.{what}.parquet"


def read_json(files: FileStore, name: str, kind: type[T]) -> T | None:
    """The file's content, None if there is no such file. Raises `JobError` for one that is damaged."""
    content = files.read(name)
    try:
        return None if content is None else msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise JobError(f"{files.location}/{name} is damaged: {error}") from error


def open_run(files: FileStore, job: str) -> str | None:
    """The run that a job has begun, if nobody has moved it away."""
    found = read_json(files, open_name(job), OpenRun)
    if found is not None and not files.exists(f"run={found.run}/_run.json"):
        files.remove(open_name(job))
        return None
    return found.run if found else None
