"""The function that scores objects as they arrive on S3: Parquet, CSV or JSON Lines, one object a run.

    event -> _objects.py -> object -> plan -> triform/scoring.py, part by part -> commit
                              CSV and JSON Lines: triform/runs/converted.py first
                              larger than TRIFORM_OBJECT_BYTES: the same run as a Ray job (_ray_jobs.py)
                              cannot be scored, ever: TRIFORM_UNDONE, with the reason

The run is the one that `python -m batch run` makes of that object: `<output>/<bucket>/<key>/run=<id>/...`, the same data, dead
letters, records and commit. Its id comes from the object and the package, so an event that is delivered twice, or at once, finds
the work done; one that was cut off goes on with the parts that are missing. An object that is replaced makes a new run, which
takes the old one's place. Needs pyarrow, so it is deployed as an image.

IAM: s3:GetObject and s3:ListBucket on the watched prefixes; s3:GetObject, ListBucket, PutObject, AbortMultipartUpload and
ListBucketMultipartUploads on the output, s3:DeleteObject on its `*/_tmp/*` and `*/_open/*`; sqs:SendMessage on TRIFORM_UNDONE;
sqs:ReceiveMessage, DeleteMessage and GetQueueAttributes on a queue of events; secretsmanager:GetSecretValue on
TRIFORM_RAY_TOKEN_SECRET.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from handlers._boot import LAYER, Booted, boot
from handlers._objects import Delivery, Notice, deliveries
from handlers._ray_jobs import FAILED, RayJobs, open_jobs
from handlers._results import Queue
from handlers._snapshots import register
from handlers._telemetry import Context
from triform.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InputChanged,
    InputUnreadable,
    InvalidRequest,
    JobError,
    NotFound,
    PayloadTooLarge,
    StoreError,
    TriformError,
)
from triform.models import Served
from triform.protocols.bodies import write_json
from triform.runs import inputs
from triform.runs.commit import RunManifest, allowed_dead, commit, utc_now
from triform.runs.converted import READERS, convert, ending
from triform.runs.folder import RunFolder
from triform.runs.plan import Pinned, Plan, make_plan
from triform.scoring import Layout, score_part
from triform.service import Exchange
from triform.sources import Sources
from triform.stores.files import open_files
from triform.stores.s3 import Found
from triform.stores.s3_file import S3File

log = logging.getLogger("triform.handlers")


class Function:
    """One environment's function."""

    def __init__(self, booted: Booted, undone: Queue | None, jobs: RayJobs | None) -> None:
        settings = booted.settings
        if settings.output is None:
            raise ConfigurationError("TRIFORM_OUTPUT is not set: where do the runs go?")
        if not settings.watched or not all(prefix.startswith("s3://") for prefix in settings.watched):
            raise ConfigurationError("TRIFORM_WATCHED: expected the prefixes whose events come here, as s3://bucket/prefix")
        self.output = open_files(settings.output).location
        check_apart(self.output, settings.watched)
        self.booted = booted
        self.undone = undone
        self.jobs = jobs
        self.sources = Sources()

    def __call__(self, event: Any, context: Context) -> dict[str, list[dict[str, str]]]:
        """The messages that are to come again. Raises the first error of an event that came directly, so that it comes again."""
        with self.booted.telemetry.invocation(context):
            left = context.get_remaining_time_in_millis() / 1000 - self.booted.settings.deadline_margin
            deadline = time.monotonic() + left
            failed = []
            for delivery in deliveries(event):
                if (error := self._take(delivery, deadline)) is None:
                    continue
                if delivery.message is None:
                    raise error
                failed.append(delivery.message)
            return {"batchItemFailures": [{"itemIdentifier": message} for message in failed]}

    def _take(self, delivery: Delivery, deadline: float) -> TriformError | None:
        """Scores what was delivered; the error, if it is to come again."""
        if delivery.notices is None:
            return self._cannot(f"message {delivery.message}", InvalidRequest("the message is no event of S3"))
        failed: TriformError | None = None
        for notice in delivery.notices:
            try:
                self._score(notice, deadline)
            except TriformError as error:
                again = error if error.retryable else self._cannot(notice.location, error)
                failed = failed or again
            except Exception as error:
                log.exception("%s is not scored", notice.location, exc_info=error)
                failed = failed or self._cannot(notice.location, TriformError("the function failed; its log knows why"))
        return failed

    def _cannot(self, what: str, error: TriformError) -> TriformError | None:
        """Tells of what will never be scored. None: it was acknowledged; else the error, for the platform's own dead letters."""
        log.warning("%s is not scored: %s", what, error.code)  # what it says of the rows is for the dead letters
        if self.undone is None:
            return None if type(error) is NotFound else error  # an object that was deleted is nobody's loss
        body = write_json({"source": what, "code": error.code, "reason": str(error)[:2000]})
        try:
            self.undone.put(hashlib.sha256(body).hexdigest(), body)
        except TriformError as trouble:
            return trouble
        return None

    def _score(self, notice: Notice, deadline: float) -> None:
        """One object. Raises what it cannot be scored for."""
        settings = self.booted.settings
        self._check_watched(notice)
        models = self.booted.service.models
        with self.booted.service.exchange(notice.location) as exchange:
            bucket, key = self.sources.bucket(notice.location)
            found = bucket.find(key)
            if found is None:
                raise NotFound(f"{notice.location} is not there any more")
            served = exchange.choose(models.the_default())
            if found.size > settings.object_bytes:
                self._hand_over(notice, found, served)
                return
            try:
                done = self._run(notice, served, deadline)
            except OSError as error:
                raise StoreError(f"the output failed: {error}") from error
            _count(exchange, done)

    def _check_watched(self, notice: Notice) -> None:
        location = notice.location
        if not any(location.startswith(prefix) for prefix in self.booted.settings.watched):
            raise InvalidRequest(f"{location} is below no prefix of TRIFORM_WATCHED")
        if location.startswith(f"{self.output}/"):
            raise InvalidRequest(f"{location} lies in the output")
        if any(part in ("", ".", "..") for part in notice.key.split("/")) or "\0" in notice.key:
            raise InvalidRequest(f"{location}: a key with empty parts, '.' or '..' cannot name an output")
        if ending(notice.key) not in (".parquet", *READERS):
            raise InputUnreadable(f"{location}: unknown kind of file; it must end in .parquet, {', '.join(READERS)}")

    def _target(self, notice: Notice) -> str:
        return f"{self.output}/{notice.bucket}/{notice.key}"

    def _run(self, notice: Notice, served: Served, deadline: float) -> RunManifest:
        """The object's run, committed: done now, or found done."""
        with tempfile.TemporaryDirectory(prefix="triform-object-") as scratch:
            sources, file, schema = self._input(notice, served, Path(scratch))
            settings, manifest = self.booted.settings, served.manifest
            layout = Layout(key=settings.key, keep=settings.keep, scored_at=utc_now())
            inputs.check_columns([(file, schema)], served.features, layout)
            pinned = Pinned(manifest.ref, manifest.digest)
            repository = settings.repository or LAYER
            plan = make_plan([file], layout, model=manifest.ref, pinned=pinned, repository=repository)
            folder = RunFolder(self._target(notice), plan.run)
            try:
                if not folder.committed():
                    plan = folder.begin(plan)
                    self._score_missing(folder, plan, served, sources, deadline)
                done = commit(folder, plan, max_dead_letters=settings.max_dead_letters, if_exists="replace")
            except (TriformError, OSError):
                if not folder.committed():  # else another environment was quicker, and has tidied up
                    raise
                done = commit(folder, plan, max_dead_letters=settings.max_dead_letters, if_exists="replace")
            if self._was_replaced(notice, file):  # then the run of what is there now may stand behind ours
                raise InputChanged(f"{notice.location} was replaced while it was scored: the event comes again for what is there")
            return done

    def _was_replaced(self, notice: Notice, file: inputs.InputFile) -> bool:
        try:
            return self.sources.identify(notice.location) != file.identity
        except InputUnreadable:  # deleted since: its run stands
            return False

    def _input(self, notice: Notice, served: Served, scratch: Path) -> tuple[Sources, inputs.InputFile, Any]:
        location = notice.location
        if ending(location) == ".parquet":
            return self.sources, *inputs.read_file(location, self.sources)
        identity = self.sources.identify(location)
        with S3File(*self.sources.bucket(location), etag=identity.fingerprint) as file:
            content = file.read()
        converted = convert(content, location, identity, served.features, scratch / "rows.parquet")
        return converted, *converted.file()

    def _score_missing(self, folder: RunFolder, plan: Plan, served: Served, sources: Sources, deadline: float) -> None:
        if folder.swapped():
            return
        done = folder.recorded()
        most = allowed_dead(plan.rows, self.booted.settings.max_dead_letters)

        def on_rows(rows: int) -> None:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{plan.parts[0].path}: no time was left after {rows} rows; finished parts are kept")

        for part in plan.parts:
            if part.number in done or folder.adopt(part.number) is not None:
                continue
            on_rows(0)
            attempt, data, letters = folder.attempt_files(part.number)
            try:
                scored = score_part(
                    part,
                    served.predictor,
                    plan.layout,
                    data=data,
                    dead_letters=letters,
                    footer={"run": plan.run, "attempt": attempt},
                    sources=sources,
                    max_dead=most,
                    on_rows=on_rows,
                )
                folder.place(attempt, scored)
            finally:
                data.unlink(missing_ok=True)
                letters.unlink(missing_ok=True)

    def _hand_over(self, notice: Notice, found: Found, served: Served) -> None:
        """Lets a Ray job make the run, begun once for this object and package. Raises `PayloadTooLarge`, `JobError`."""
        settings, ref = self.booted.settings, served.manifest.ref
        large = f"{notice.location} has {found.size} bytes, {settings.object_bytes} are scored here"
        local = settings.repository if (settings.repository or "").startswith("s3://") else None
        repository = settings.batch_repository or local
        if self.jobs is None or repository is None:
            raise PayloadTooLarge(
                f"{large}: for larger ones set TRIFORM_RAY_ADDRESS, and TRIFORM_BATCH_REPOSITORY to models on S3"
            )
        if ending(notice.key) != ".parquet":
            raise PayloadTooLarge(f"{large}, and a batch run reads Parquet only")
        options = {
            "repository": repository,
            "model": ref,
            "input": notice.location,
            "output": self._target(notice),
            "max-dead-letters": repr(settings.max_dead_letters),
            "if-exists": "replace",
        }
        chosen = [*options.items(), *(("key", name) for name in settings.key), *(("keep", name) for name in settings.keep)]
        command = f"{settings.batch_command} {shlex.join(f'--{name}={value}' for name, value in chosen)}"
        identity = "\0".join((command, found.etag, served.manifest.digest))
        job = self.jobs.begin(f"triform-object-{hashlib.sha256(identity.encode()).hexdigest()[:24]}", command)
        if job.status in FAILED:
            raise JobError(f"{large}, and the Ray job {job.submission_id} failed")
        log.info("%s is scored by the Ray job %s", notice.location, job.submission_id)


def check_apart(output: str, watched: tuple[str, ...]) -> None:
    """Raises `ConfigurationError` if what the function writes would call it again."""
    for prefix in watched:
        if f"{output}/".startswith(prefix):
            raise ConfigurationError(
                f"TRIFORM_OUTPUT: {output} lies in the watched prefix {prefix}: each run would call for another"
            )
        if prefix.startswith(f"{output}/"):
            raise ConfigurationError(f"TRIFORM_WATCHED: {prefix} lies in the output {output}: keep them apart")


def _count(exchange: Exchange, done: RunManifest) -> None:
    exchange.rows, exchange.dead_letters = done.rows_out, done.dead
    exchange.stages = {"decode": done.seconds.get("decode", 0.0), "execute": done.seconds.get("predict", 0.0)}


def start(environ: Mapping[str, str]) -> Function:
    """The function of an environment. Raises what `boot` raises."""
    booted = boot(environ)
    settings = booted.settings
    jobs = open_jobs(settings) if settings.ray_address is not None else None
    return Function(booted, Queue(settings.undone) if settings.undone is not None else None, jobs)


function: Final = start(os.environ)
register(function.booted, lambda: None)


def handler(event: Any, context: Context) -> dict[str, list[dict[str, str]]]:
    """Lambda's entry point: `handlers.s3.handler`."""
    return function(event, context)
