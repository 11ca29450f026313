"""What a function tells of itself: JSON logs and metrics in EMF through Powertools, in the vocabulary of triform/telemetry.py.

    boot   -> LoadRecord                                        kept until the first invocation
    invocation(context): InferenceRecord, RunRecord ... -> at its end: EMF lines, one log line a record, one write

An environment is frozen between invocations, so nothing is carried over: each ends with what it has counted written out. Whether
an invocation is a cold start is decided when it enters: provisioned environments have been waited for, and an invocation that
raises still was the first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import msgspec
import orjson

from triform.errors import ConfigurationError, TriformError, by_code
from triform.telemetry import (
    COLD_STARTS,
    FAULTS,
    UNKNOWN,
    InferenceRecord,
    LoadRecord,
    Metric,
    Observation,
    RunRecord,
    SplitRecord,
    observations,
    of_load,
    of_run,
    of_split,
)

log = logging.getLogger("triform.handlers")
NAMESPACE: Final = "Triform"
ON_DEMAND: Final = "on-demand"
MOST_VALUES: Final = 100  # of one metric in one EMF object
Dimensions = tuple[tuple[str, str], ...]


class Context(Protocol):
    """What is used of Lambda's context."""

    aws_request_id: str

    def get_remaining_time_in_millis(self) -> int: ...


class LambdaTelemetry:
    """Implements `Telemetry` for one environment. Without a `backend` nothing is written."""

    def __init__(
        self,
        *,
        initialization: str = ON_DEMAND,
        function: tuple[str, str] = (UNKNOWN, UNKNOWN),
        backend: Powertools | None = None,
    ) -> None:
        self.initialization = initialization
        self.function = function  # its name and version
        self.cold_start = False  # of the invocation under way
        self.invocations = 0
        self._backend = backend
        self._loads: list[LoadRecord] = []
        self._records: list[InferenceRecord] = []
        self._runs: list[RunRecord] = []
        self._splits: list[SplitRecord] = []

    def record(self, inference: InferenceRecord) -> None:
        self._records.append(inference)

    def loaded(self, load: LoadRecord) -> None:
        self._loads.append(load)

    def ran(self, run: RunRecord) -> None:
        self._runs.append(run)

    def shared(self, split: SplitRecord) -> None:
        self._splits.append(split)

    @property
    def recorded(self) -> bool:
        """Whether the invocation under way has a record already."""
        return bool(self._records)

    def amend(self, code: str) -> None:
        """What the caller got in the end is this error: an answer that was made, by one version or two, could not be given."""
        self._records = [msgspec.structs.replace(record, code=code, rows=0, batch_rows=0) for record in self._records[-1:]]

    def restored(self) -> None:
        """The environment is a copy of a snapshot: its first invocation is still to come."""
        self.invocations = 0

    @contextmanager
    def invocation(self, context: Context | None) -> Iterator[None]:
        """One invocation of the function; whatever it counted is written when the block is left.

        An error that is raised inside goes on, to the platform; the log names it.
        """
        self.cold_start = self.invocations == 0 and self.initialization == ON_DEMAND
        first = self.invocations == 0
        self.invocations += 1
        if self._backend is not None:
            self._backend.enter(context, cold_start=self.cold_start)
        try:
            yield
        except TriformError as error:
            log.warning("the invocation failed: %s", error.code)
            raise
        finally:
            self._flush(first=first)

    def _flush(self, *, first: bool) -> None:
        records, loads, runs, splits = self._records, self._loads, self._runs, self._splits
        self._records, self._loads, self._runs, self._splits = [], [], [], []
        if self._backend is None:
            return
        seen: list[Observation] = [o for record in records for o in observations(record)]
        seen += [o for load in loads for o in of_load(load)]
        seen += [o for run in runs for o in of_run(run)]
        seen += [o for split in splits for o in of_split(split)]
        if faults := sum(_is_fault(record.code) for record in records):
            name, version = self.function
            seen.append((FAULTS, {"form": "lambda", "function": name, "function_version": version}, float(faults)))
        if first:
            seen.append((COLD_STARTS, {"form": "lambda", "initialization": self.initialization}, 1.0))
        for load in loads:
            self._backend.log_load(load)
        self._backend.write(records, seen)


def _is_fault(code: str) -> bool:
    """Whether a record's code is an error of ours that no second try helps: what a new version must not bring."""
    error = by_code(code)
    return error.code == code and error.http_status >= 500 and not error.retryable


def open_telemetry(kind: str, environ: Mapping[str, str]) -> LambdaTelemetry:
    """The environment's telemetry; `kind` is "emf" or "none". Raises `ConfigurationError` where Powertools is not there."""
    initialization = environ.get("AWS_LAMBDA_INITIALIZATION_TYPE", ON_DEMAND)
    if kind == "none":
        return LambdaTelemetry(initialization=initialization)
    try:
        backend = Powertools()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"telemetry: emf needs {error.name}: add the powertools layer (triform[lambda]), or set TRIFORM_TELEMETRY=none"
        ) from error
    function = environ.get("AWS_LAMBDA_FUNCTION_NAME", UNKNOWN), environ.get("AWS_LAMBDA_FUNCTION_VERSION", UNKNOWN)
    return LambdaTelemetry(initialization=initialization, function=function, backend=backend)


class Powertools:
    """Logger and EMF of Powertools. The loggers of `triform` write through it too, as JSON."""

    def __init__(self) -> None:
        from aws_lambda_powertools.logging import Logger
        from aws_lambda_powertools.metrics.functions import is_metrics_disabled
        from aws_lambda_powertools.metrics.provider.cloudwatch_emf.cloudwatch import AmazonCloudWatchEMFProvider

        self._logger = Logger(service="triform", json_serializer=_line)
        self._emf = AmazonCloudWatchEMFProvider
        self._made: dict[tuple[Dimensions, tuple[Metric, ...]], dict[str, Any]] = {}
        self._disabled = is_metrics_disabled
        self._keys: dict[str, Any] = {}

    def enter(self, context: Context | None, *, cold_start: bool) -> None:
        request_id = context.aws_request_id if context is not None else None
        self._keys = {"function_request_id": request_id, "cold_start": cold_start}
        self._logger.append_keys(**self._keys)

    def _told(self, record: InferenceRecord, now: float) -> dict[str, Any]:
        """The log record of a request, as the Logger would say it: it would take as long as all metrics together."""
        trace = os.environ.get("_X_AMZN_TRACE_ID", "")
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
        return {
            "level": "INFO",
            "message": "request",
            "timestamp": f"{at},{int(now * 1e3) % 1000:03d}+0000",
            "service": "triform",
            **self._keys,
            "request_id": record.request_id,
            "caller": record.caller,
            "model": record.model,
            "version": record.version,
            "variant": record.variant,
            "code": record.code,
            "rows": record.rows,
            "milliseconds": round(record.seconds * 1e3, 3),
            "stages": {stage: round(seconds * 1e3, 3) for stage, seconds in record.stages.items()},
            **({"xray_trace_id": trace.partition(";")[0].removeprefix("Root=")} if trace else {}),
        }

    def log_load(self, load: LoadRecord) -> None:
        ms = {stage: round(seconds * 1e3, 3) for stage, seconds in load.stages.items()}
        self._logger.info("model loaded", model=load.model, version=load.version, digest=load.digest, stages=ms)

    def write(self, records: list[InferenceRecord], seen: list[Observation]) -> None:
        """In one write: a log record for each request, and EMF objects, one a set of dimensions (more for many values)."""
        now = time.time()
        told = [self._told(record, now) for record in records] if self._logger.log_level <= logging.INFO else []
        blobs = [] if self._disabled() else list(self._blobs(seen, int(now * 1e3)))
        if told or blobs:
            sys.stdout.write("".join(f"{_line(line)}\n" for line in (*told, *blobs)))
            sys.stdout.flush()

    def _blobs(self, seen: list[Observation], now: int) -> Iterator[dict[str, Any]]:
        grouped: dict[Dimensions, dict[Metric, list[float]]] = {}
        for metric, labels, value in seen:
            if math.isfinite(value):
                grouped.setdefault(tuple(labels.items()), {}).setdefault(metric, []).append(value)
        for dimensions, values in grouped.items():
            most = max(map(len, values.values()))
            for start in range(0, most, MOST_VALUES):
                some = {metric: many for metric in values if (many := values[metric][start : start + MOST_VALUES])}
                empty = self._empty(dimensions, tuple(some))
                told = {metric.name: many for metric, many in some.items()}
                yield {**empty, "_aws": {**empty["_aws"], "Timestamp": now}, **told}

    def _empty(self, dimensions: Dimensions, metrics: tuple[Metric, ...]) -> dict[str, Any]:
        """The object without its values, as Powertools serializes it: asked once for each set, of which there are few."""
        made = self._made.get((dimensions, metrics))
        if made is None:
            provider = self._emf(namespace=os.environ.get("POWERTOOLS_METRICS_NAMESPACE", NAMESPACE))
            provider.service = ""  # would add a dimension that is none of the vocabulary's
            for name, value in dimensions:
                provider.add_dimension(name, value)
            for metric in metrics:
                provider.add_metric(metric.name, _unit(metric), 0.0)
            made = self._made[dimensions, metrics] = {**provider.serialize_metric_set()}
        return made


def _line(fields: dict[str, Any]) -> str:
    """A log record as JSON: NaN becomes null, what breaks lines is escaped."""
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # half a surrogate pair: it is escaped, too
        return json.dumps(fields, default=str)


def _unit(metric: Metric) -> str:
    return "Seconds" if "seconds" in metric.name and "timestamp" not in metric.name else "Count"
