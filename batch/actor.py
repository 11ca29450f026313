"""What a Ray actor does: loads the pinned model once, then scores parts and places them. Answers are data, errors too."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import msgspec

from batch.folder import RunFolder
from batch.plan import Pinned, Plan
from triform.errors import DigestMismatch, JobError, NotFound, StoreError, TriformError
from triform.predictor import Predictor
from triform.repository import Ref
from triform.runtime import RuntimeOptions
from triform.scoring import ScoredPart, score_part
from triform.settings import Settings


class Outcome(msgspec.Struct, frozen=True):
    """Of one part: what was scored, or the error's code and message."""

    part: int
    scored: ScoredPart | None = None
    code: str = ""
    error: str = ""


def pinned_predictor(location: str, pinned: Pinned, options: RuntimeOptions) -> Predictor:
    """The model, loaded and verified; raises `DigestMismatch` if the repository now holds another under its name.

    Packages of a remote repository are kept where this node's TRIFORM_CACHE says.
    """
    ref = Ref.parse(pinned.ref)
    repository = Settings.from_env(os.environ, repository=location).open_repository()
    try:
        package = repository.package(ref.model, ref.version or 0)
    except NotFound as error:  # the driver has found it
        raise type(error)(f"{error} in {location} as this node ({platform.node()}) sees it") from error
    if package.manifest.digest != pinned.digest:
        raise DigestMismatch(f"{pinned.ref} is not the package this run began with (digest {pinned.digest[:12]})")
    return Predictor.load(package, options)


def _plan_of(folder: RunFolder) -> Plan:
    """The run's plan. The driver has written it, so where it is missing this node does not see the driver's output."""
    try:
        return folder.plan()
    except JobError as error:
        raise JobError(
            f"the output is not on this node ({platform.node()}): {error}. Every node needs the output, the input and the model "
            "repository: use a file system that they share, or s3://"
        ) from error


def _told(error: Exception) -> tuple[str, str]:
    """Code and message; an `OSError` means that the output's disk is full, gone or not ours to write."""
    if isinstance(error, TriformError):
        return error.code, str(error)
    if isinstance(error, OSError):
        return StoreError.code, f"the output failed: {error}"
    return TriformError.code, f"a fault of Triform's, please report it: {type(error).__name__}: {error}"


class PartScorer:
    """The callable class of `map_batches`: a batch has the part numbers in "part", its answer the outcomes in "outcome"."""

    def __init__(self, output: str, run: str, options: RuntimeOptions, max_dead: int) -> None:
        import pyarrow as pa

        pa.set_cpu_count(1)  # the CPU this actor asked for
        self.folder = RunFolder(Path(output), run)
        self.max_dead = max_dead
        self.error: TriformError | None = None
        try:
            self.plan = _plan_of(self.folder)
            self.predictor = pinned_predictor(self.plan.repository, self.plan.pinned, options)
        except TriformError as error:  # an actor that fails to start would be started again, for ever
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": [msgspec.json.encode(self.score(int(number))) for number in batch["part"]]}

    def score(self, number: int) -> Outcome:
        try:
            if self.error is not None:
                raise self.error
            placed = self.folder.adopt(number) or self._attempt(number)
        except Exception as error:  # noqa: BLE001 - told as data: raised here, Ray would take it for a dead worker and try again
            if (quicker := self._of_another(number)) is None:
                return Outcome(number, None, *_told(error))
            placed = quicker
        return Outcome(number, placed)

    def _of_another(self, number: int) -> ScoredPart | None:
        """The part as another driver has done it meanwhile; it may have committed the run and tidied up since."""
        try:
            return self.folder.record(number)
        except (TriformError, OSError):
            return None

    def _attempt(self, number: int) -> ScoredPart:
        attempt, data, dead = self.folder.attempt_files(number)
        try:
            scored = score_part(
                self.plan.parts[number],
                self.predictor,
                self.plan.layout,
                data=data,
                dead_letters=dead,
                footer={"run": self.plan.run, "attempt": attempt},
                max_dead=self.max_dead,
                on_rows=lambda rows: self.folder.note_rows(attempt, rows),
            )
        except BaseException:
            data.unlink(missing_ok=True)
            dead.unlink(missing_ok=True)
            raise
        finally:
            self.folder.forget_rows(attempt)
        return self.folder.place(attempt, scored)
