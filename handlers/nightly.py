"""The function that starts the night's batch run, and looks after it.

    {"time": ...} -> the day before -> partition -> RayJobs.begin (its submission id is the partition's) -> status
    {"poll": ...} -> status                                         failed, late or out of reach -> RunRecord -> alarm

The events of a schedule (EventBridge rules and EventBridge Scheduler) say when they were due, so one that is delivered twice or
tried again means the same night. Beginning a night that is begun only tells how it is: schedule the function every few minutes of
the night and it is started, begun again where it failed, and missed where it is late. `{"partition": "day=2026-11-20"}` names
another night, `{"poll": true}` and `{"poll": "<submission id>"}` only look.

IAM: secretsmanager:GetSecretValue on TRIFORM_RAY_TOKEN_SECRET, where it is set; else nothing but logs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from handlers._ray_jobs import ENDED, FAILED, Job, RayJobs, open_jobs
from handlers._telemetry import Context, LambdaTelemetry, open_telemetry
from triform.errors import ConfigurationError, DeadlineExceeded, InvalidRequest, JobError, TriformError
from triform.settings import Settings
from triform.telemetry import UNKNOWN, RunRecord

_PARTITION: Final = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.%+-]*=[A-Za-z0-9_.%+:-]+(?:/[A-Za-z0-9_][A-Za-z0-9_.%+-]*=[A-Za-z0-9_.%+:-]+)*"
)
_SUBMISSION: Final = re.compile(r"[A-Za-z0-9_.-]{1,120}")
LATE: Final = "LATE"
MISSING: Final = "MISSING"


class Function:
    """One environment's function."""

    def __init__(self, settings: Settings, telemetry: LambdaTelemetry, jobs: RayJobs) -> None:
        if settings.nightly_entrypoint.count("{partition}") != 1:
            raise ConfigurationError("TRIFORM_NIGHTLY_ENTRYPOINT: expected {partition} in it, once")
        self.settings = settings
        self.telemetry = telemetry
        self.jobs = jobs
        partition_of(settings.nightly_partition, datetime.now(UTC))

    def __call__(self, event: Any, context: Context) -> dict[str, Any]:
        """How the night is: partition, submission id and status, one of Ray's, LATE or MISSING.

        What cannot be told raises, so that the platform tries again.
        """
        with self.telemetry.invocation(context):
            try:
                return self._answer(event)
            except TriformError as error:
                self._record(error.code, 0.0)
                raise

    def _answer(self, event: Any) -> dict[str, Any]:
        if not isinstance(event, dict):
            raise InvalidRequest("expected an object with time, partition or poll, or nothing in it")
        due, poll = _due(event), event.get("poll")
        if isinstance(poll, str):
            return self._told(None, _submission(poll), self.jobs.find(poll), due)
        partition = event.get("partition")
        partition = partition_of(self.settings.nightly_partition, due) if partition is None else _checked(partition)
        name, attempts = self.submission(partition), self.settings.nightly_attempts
        if poll:
            return self._told(partition, name, self.jobs.latest(name, attempts=attempts), due)
        job = self.jobs.begin(name, self.entrypoint(partition), attempts=attempts)
        return self._told(partition, name, job, due)

    def entrypoint(self, partition: str) -> str:
        return self.settings.nightly_entrypoint.replace("{partition}", shlex.quote(partition))

    def submission(self, partition: str) -> str:
        """The same for the same partition and command, and nothing else."""
        digest = hashlib.sha256(self.entrypoint(partition).encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", partition)[:60]
        return f"triform-{readable}-{digest}"

    def _told(self, partition: str | None, name: str, job: Job | None, due: datetime) -> dict[str, Any]:
        status = job.status if job is not None else MISSING
        began = datetime.fromtimestamp(job.start_time / 1000, UTC) if job is not None and job.start_time else due
        late = (datetime.now(UTC) - min(due, began)).total_seconds() > self.settings.nightly_seconds
        if status == "SUCCEEDED" and job is not None:
            self._record("ok", job.seconds)
        elif status in FAILED and job is not None:
            self._record(JobError.code, job.seconds)
        elif late and status not in ENDED:
            status = LATE
            self._record(DeadlineExceeded.code, self.settings.nightly_seconds)
        told = {"partition": partition, "submission_id": job.submission_id if job else name, "status": status}
        return {key: value for key, value in told.items() if value is not None}

    def _record(self, code: str, seconds: float) -> None:
        """Rows are counted by the run itself."""
        model = self.settings.default_model or UNKNOWN
        self.telemetry.ran(RunRecord(form="lambda", model=model, code=code, seconds=seconds, rows_in=None, ended_at=time.time()))


def partition_of(pattern: str, due: datetime) -> str:
    """The partition of the day before, as `strftime` fills the pattern.

    Raises `ConfigurationError` for the pattern, `InvalidRequest` for a time before which there is no day.
    """
    try:
        partition = (due - timedelta(days=1)).strftime(pattern)
    except OverflowError:
        raise InvalidRequest(f"time: there is no day before {due.date()}") from None
    except ValueError:  # a directive that this platform does not have, half a surrogate pair
        partition = ""
    if not _PARTITION.fullmatch(partition):
        raise ConfigurationError(f"TRIFORM_NIGHTLY_PARTITION: {pattern[:80]!r} does not give name=value")
    return partition


def _checked(partition: object) -> str:
    if not isinstance(partition, str) or len(partition) > 500 or not _PARTITION.fullmatch(partition):
        raise InvalidRequest("partition: expected name=value, of letters, digits, _ . % + : and -")
    return partition


def _submission(name: str) -> str:
    if not _SUBMISSION.fullmatch(name):
        raise InvalidRequest("poll: expected true, or a submission id")
    return name


def _due(event: Mapping[str, Any]) -> datetime:
    """When the event was due, in UTC; now where it does not say."""
    text = event.get("time")
    if text is None:
        return datetime.now(UTC)
    try:
        due = datetime.fromisoformat(text)
        return (due if due.tzinfo else due.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):  # the last one: in UTC it lies outside the years 1 to 9999
        raise InvalidRequest("time: expected a date and time as in ISO 8601") from None


def start(environ: Mapping[str, str]) -> Function:
    """The function of an environment. Raises `ConfigurationError`."""
    settings = Settings.from_env(environ)
    return Function(settings, open_telemetry(settings.telemetry, environ), open_jobs(settings))


function: Final = start(os.environ)


def handler(event: Any, context: Context) -> dict[str, Any]:
    """Lambda's entry point: `handlers.nightly.handler`."""
    return function(event, context)
