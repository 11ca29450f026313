"""What a Ray actor does: loads the pinned model once, then scores parts and places them. Answers are data, errors too.

part -> attempts.begin -> 0 or 1 deaths: score_part here        2 or more: alone.py, a child process
                                     -> files in _tmp -> RunFolder.place, beside the next part -> Outcome
"""

from __future__ import annotations

import os
import platform
import threading
import time
from typing import Any, NamedTuple

import msgspec

from batch.alone import Work, score_alone
from batch.attempts import IN_ACTOR, IN_ALL, LOADING, OneProcess, Registry
from triform.answering import Side
from triform.batch_rows import BATCH_ROWS
from triform.disagreement import ComparedPart
from triform.errors import (
    DigestMismatch,
    JobError,
    ModelCrashed,
    NotFound,
    PartCrashed,
    ResourceExhausted,
    StoreError,
    TriformError,
    by_code,
)
from triform.predictor import Predictor
from triform.repository import Ref
from triform.row_split import RowSplit
from triform.runs.folder import RunFolder
from triform.runs.plan import Pinned, Plan
from triform.runtime import RuntimeOptions
from triform.scoring import ScoredPart, score_part
from triform.settings import Settings
from triform.sources import Sources
from triform.splitting import TrafficSplit
from triform.telemetry import LoadRecord


class Outcome(msgspec.Struct, frozen=True):
    """Of one part: what was scored or compared, or the error's code and message. `attempts` counts the processes that died over
    it too; `loads` are there once for each time that an actor has loaded its models."""

    part: int
    scored: ScoredPart | None = None
    code: str = ""
    error: str = ""
    attempts: int = 1
    loads: tuple[LoadRecord, ...] = ()
    compared: ComparedPart | None = None


def pinned_predictor(location: str, pinned: Pinned, options: RuntimeOptions) -> Predictor:
    """The model, loaded and verified; raises `DigestMismatch` if the repository now holds another under its name.

    Packages of a remote repository are kept where this node's TRIFORM_CACHE says.
    """
    ref = Ref.parse(pinned.ref)
    repository = Settings.from_env(os.environ, repository=location).open_repository()
    started = time.perf_counter()
    try:
        package = repository.package(ref.model, ref.version or 0)
    except NotFound as error:  # the driver has found it
        raise type(error)(f"{error} in {location} as this node ({platform.node()}) sees it") from error
    if package.manifest.digest != pinned.digest:
        raise DigestMismatch(f"{pinned.ref} is not the package this run began with (digest {pinned.digest[:12]})")
    fetched = time.perf_counter() - started
    predictor = Predictor.load(package, options)
    predictor.load_seconds = {"fetch": fetched, **predictor.load_seconds}
    return predictor


def _plan_of(folder: RunFolder) -> Plan:
    """The run's plan. The driver has written it, so where it is missing this node does not see the driver's output."""
    try:
        return folder.plan()
    except JobError as error:
        raise JobError(
            f"the output is not on this node ({platform.node()}): {error}. Every node needs the output, the input and the model "
            "repository: use a file system that they share, or s3://"
        ) from error


def told(error: Exception) -> tuple[str, str]:
    """Code and message; an `OSError` means that the output's disk is full, gone or not ours to write."""
    if isinstance(error, TriformError):
        return error.code, str(error)
    if isinstance(error, MemoryError):
        return ResourceExhausted.code, f"memory ran out: {error}"
    if isinstance(error, OSError):
        return StoreError.code, f"the output failed: {error}"
    return TriformError.code, f"a fault of Triform's, please report it: {type(error).__name__}: {error}"


class Attempted(NamedTuple):
    """A part that was scored by this attempt, its files not yet placed."""

    attempt: str
    scored: ScoredPart


class PartScorer:
    """The callable class of `map_batches`: a batch has the part numbers in "part", its answer the outcomes in "outcome".

    `attempts` is told of every part before it is begun, so that what kills this process is known by those who come after.
    """

    def __init__(
        self,
        output: str,
        run: str,
        options: RuntimeOptions,
        max_dead: int,
        attempts: Registry | None = None,
        most_rows: int = BATCH_ROWS,
    ) -> None:
        import pyarrow as pa

        pa.set_cpu_count(1)  # the CPU this actor asked for
        self.folder = RunFolder(output, run)
        self.sources = Sources()
        self.options = options
        self.max_dead = max_dead
        self.most_rows = most_rows
        self.attempts = attempts or OneProcess()
        self.actor, self.me = self.attempts.introduce()
        self._turn = threading.Lock()
        self.predictor: Predictor | None = None
        self.split: RowSplit | None = None
        self.loads: tuple[LoadRecord, ...] = ()
        self.error: Exception | None = None
        try:
            self.plan = _plan_of(self.folder)
            self.predictor = self._load()
        except OSError as error:
            self.error = StoreError(f"the model repository failed: {error}")
        except Exception as error:  # noqa: BLE001 - an actor that fails to start would be started again, for ever
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": [msgspec.json.encode(self.score(int(number))) for number in batch["part"]]}

    def score(self, number: int) -> Outcome:
        """Scores a part and places it. Called in two threads, one part is placed while the next is scored, never two scored."""
        deaths, loads = 0, tuple[LoadRecord, ...]()
        placed: ScoredPart | None = None
        try:
            with self._turn:
                deaths = self.attempts.begin(number, self.me)
                try:
                    self._check_ready()
                    scored = self.folder.adopt(number) or self._score(number, deaths)
                finally:
                    loads, self.loads = self.loads, ()
            placed = self._place(scored) if isinstance(scored, Attempted) else scored
        except Exception as error:  # noqa: BLE001 - told as data: raised here, Ray would take it for a dead worker and try again
            if (placed := self._of_another(number)) is None:
                return Outcome(number, None, *told(error), attempts=deaths + 1, loads=loads)
        finally:
            self.attempts.end(number, self.me, scored=placed is not None)
        return Outcome(number, placed, attempts=deaths + 1, loads=loads)

    def _place(self, done: Attempted) -> ScoredPart:
        return self.folder.place(done.attempt, done.scored)

    def _check_ready(self) -> None:
        """Raises what kept this actor from starting; what may pass (the store did not answer) is tried again."""
        if self.error is not None:
            if not getattr(self.error, "retryable", False):
                raise self.error
            self.plan = _plan_of(self.folder)
            self.predictor, self.error = self._load(), None

    def _load(self) -> Predictor:
        deaths = self.attempts.load(self.actor, self.me)
        if deaths >= LOADING:
            refs = " and ".join(pinned.ref for pinned in self.plan.versions)
            raise ModelCrashed(
                f"{refs}: {deaths} processes died one after another while they loaded the model: is there memory enough for it, "
                "in each actor? Ray's log says what ended them"
            )
        try:
            predictor = self._open()
        finally:
            self.attempts.loaded(self.actor, self.me)
        loaded = {"stable": predictor} | ({"canary": self.split.canary.predictor} if self.split else {})
        self.loads = tuple(
            LoadRecord.of(p.manifest, p.provider, p.load_seconds, form="batch", variant=variant) for variant, p in loaded.items()
        )
        return predictor

    def _open(self) -> Predictor:
        """The run's version; the canary that shares its rows beside it."""
        plan, split = self.plan, self.plan.split
        predictor = pinned_predictor(plan.repository, plan.pinned, self.options)
        if split is not None:
            canary = pinned_predictor(plan.repository, split.canary, self.options)
            versions = predictor.manifest.version, canary.manifest.version
            traffic = TrafficSplit(*versions, split.points, split.salt.encode())
            self.split = RowSplit(Side.of(canary), traffic, split.column)
        return predictor

    def _score(self, number: int, deaths: int) -> ScoredPart | Attempted:
        if deaths < IN_ACTOR:
            return self._attempt(number)
        if deaths < IN_ALL:
            return self._alone(number, deaths)
        raise PartCrashed(f"{self.plan.parts[number].label}: {deaths} processes died while they scored it")

    def _alone(self, number: int, deaths: int) -> ScoredPart:
        """In a child process. The model's memory is the child's meanwhile."""
        self.predictor = self.split = None
        output = self.folder.files.location
        work = Work(output=output, run=self.plan.run, part=number, options=self.options, max_dead=self.max_dead)
        try:
            outcome = msgspec.json.decode(score_alone(work), type=Outcome)
        except PartCrashed as crash:
            if (placed := self.folder.adopt(number)) is not None:
                return placed
            raise PartCrashed(
                f"{self.plan.parts[number].label}: {deaths} actors died while they scored it, and then a process of its own "
                f"({crash}); look for a row there that the model does not survive, or that does not fit in memory"
            ) from crash
        if outcome.scored is None:
            raise by_code(outcome.code)(outcome.error)
        return outcome.scored

    def _of_another(self, number: int) -> ScoredPart | None:
        """The part as another driver has done it meanwhile; it may have committed the run and tidied up since."""
        try:
            return self.folder.record(number)
        except (TriformError, OSError):
            return None

    def _attempt(self, number: int) -> Attempted:
        self.predictor = self.predictor or self._load()
        attempt, data, dead = self.folder.attempt_files(number)
        try:
            scored = score_part(
                self.plan.parts[number],
                self.predictor,
                self.plan.layout,
                data=data,
                dead_letters=dead,
                sources=self.sources,
                footer={"run": self.plan.run, "attempt": attempt},
                max_dead=self.max_dead,
                on_rows=lambda rows: self.attempts.rows(number, self.me, rows),
                most_rows=self.most_rows,
                split=self.split,
            )
        except BaseException:
            data.unlink(missing_ok=True)
            dead.unlink(missing_ok=True)
            raise
        return Attempted(attempt, scored)
