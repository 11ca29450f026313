"""What Triform counts, declared once: the record, the hook, the vocabulary.

    a form does one request (or one batch part) -> one frozen InferenceRecord -> Telemetry.record -> a backend

Backends import their library inside their own factory: `prometheus(registry)` here; Ray's and CloudWatch's live with their
forms. Label values are bounded: a name that the repository does not know is counted as "unknown".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from triform.package import Manifest

Form = Literal["lambda", "serve", "batch"]
Kind = Literal["counter", "histogram", "gauge"]
UNKNOWN: Final = "unknown"
FREED: Final = "freed"  # the code of a model that is not loaded any more


class Metric(msgspec.Struct, frozen=True):
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


Observation = tuple[Metric, dict[str, str], float]
_MODEL: Final = ("model", "version", "variant", "form")
_SECONDS: Final = (
    0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005,
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384, 131072, 1048576)

REQUESTS: Final = Metric(
    "triform_requests_total", "counter", "Requests (in batch: parts) answered, by outcome", (*_MODEL, "code")
)
ROWS: Final = Metric("triform_rows_total", "counter", "Rows answered", _MODEL)
REQUEST_SECONDS: Final = Metric("triform_request_seconds", "histogram", "Time of a request", _MODEL, _SECONDS)
STAGE_SECONDS: Final = Metric(
    "triform_stage_seconds", "histogram", "Time of a stage: decode, queue, hop, execute, encode", (*_MODEL, "stage"), _SECONDS
)
BATCH_ROWS: Final = Metric("triform_batch_rows", "histogram", "Rows of one run of the model", _MODEL, _ROWS)
MODEL_LOAD_SECONDS: Final = Metric(
    "triform_model_load_seconds", "gauge", "Time the load took: fetch, verify, session, warmup", (*_MODEL, "stage")
)
MODEL_INFO: Final = Metric(
    "triform_model_info", "gauge", "1 for each loaded model, 0 once it was freed", (*_MODEL, "provider", "precision", "digest")
)
MODEL_LOAD_FAILURES: Final = Metric(
    "triform_model_load_failures_total", "counter", "Versions that were to be served and could not be", (*_MODEL, "code")
)
DEAD_LETTER_ROWS: Final = Metric("triform_dead_letter_rows_total", "counter", "Rows refused, by reason", (*_MODEL, "code"))
SPLIT_WEIGHT: Final = Metric("triform_split_weight", "gauge", "Share of the keys that a version answers", _MODEL)
CANARY_CUTS: Final = Metric("triform_canary_cuts_total", "counter", "Canaries that a process gives no more keys to", _MODEL)
CANARY_FAILURES: Final = Metric(
    "triform_canary_failures_total",
    "counter",
    "Requests (in batch: parts) that a canary failed, at least in part, and stable answered in its place",
    (*_MODEL, "code"),
)
FEATURE_DRIFT: Final = Metric("triform_feature_drift", "gauge", "Distance from the reference distribution", (*_MODEL, "feature"))
RUN_SECONDS: Final = Metric("triform_run_seconds", "gauge", "Time the latest batch run took", (*_MODEL, "code"))
RUN_ROWS: Final = Metric("triform_run_rows", "gauge", "Rows of the latest batch run: in, answered, dead", (*_MODEL, "outcome"))
RUN_SUCCESS: Final = Metric("triform_run_success", "gauge", "1 if the latest batch run was committed, 0 if it failed", _MODEL)
RUN_SUCCESS_TIME: Final = Metric(
    "triform_run_success_timestamp_seconds", "gauge", "When a batch run was last committed, in Unix time", _MODEL
)
COLD_STARTS: Final = Metric(
    "triform_cold_starts_total", "counter", "First invocations of a Lambda environment, by how it was started",
    ("form", "initialization"),
)  # fmt: skip
FAULTS: Final = Metric(
    "triform_faults_total", "counter", "Requests that ended in an error of ours, by the version of the Lambda function",
    ("form", "function", "function_version"),
)  # fmt: skip

VOCABULARY: Final = (
    REQUESTS, ROWS, REQUEST_SECONDS, STAGE_SECONDS, BATCH_ROWS, MODEL_LOAD_SECONDS, MODEL_INFO, MODEL_LOAD_FAILURES,
    DEAD_LETTER_ROWS, SPLIT_WEIGHT, CANARY_CUTS, CANARY_FAILURES, FEATURE_DRIFT, RUN_SECONDS, RUN_ROWS, RUN_SUCCESS,
    RUN_SUCCESS_TIME, COLD_STARTS, FAULTS,
)  # fmt: skip


class InferenceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request as it ended, well or not. Times in seconds; `stages` by the names in `STAGE_SECONDS`."""

    form: Form
    model: str = UNKNOWN
    version: int | None = None
    variant: str = "stable"
    code: str = "ok"  # or the error's code
    rows: int = 0
    batch_rows: int = 0
    seconds: float = 0.0
    stages: Mapping[str, float] = {}
    dead_letters: Mapping[str, int] = {}  # rows by error code
    instead_of: tuple[int, str] | None = None  # the canary that failed the request before, and the error's code
    request_id: str = ""  # for the log, never a label
    caller: str = ""  # the same

    def labels(self) -> dict[str, str]:
        return {"model": self.model, "version": str(self.version or UNKNOWN), "variant": self.variant, "form": self.form}


class LoadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was loaded, and how long each stage took; or that was let go again, or could not be loaded."""

    form: Form
    model: str
    version: int | None  # None: which one it was to be is not known
    provider: str = ""
    precision: str = ""
    digest: str = ""
    stages: Mapping[str, float] = {}
    variant: str = "stable"
    code: str = "ok"  # or FREED, or the error's code

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        provider: str,
        stages: Mapping[str, float],
        *,
        form: Form,
        variant: str = "stable",
        code: str = "ok",
    ) -> LoadRecord:
        return cls(
            form=form,
            model=manifest.name,
            version=manifest.version,
            provider=provider,
            precision=manifest.precision,
            digest=manifest.digest,
            stages=stages,
            variant=variant,
            code=code,
        )

    def labels(self) -> dict[str, str]:
        return {"model": self.model, "version": str(self.version or UNKNOWN), "variant": self.variant, "form": self.form}


class SplitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's keys are shared from now on; `cut`: because the canary has clearly failed in this process."""

    form: Form
    model: str
    stable: int
    canary: int
    weight: float  # the canary's
    cut: bool = False

    def labels(self, variant: str) -> dict[str, str]:
        version = self.canary if variant == "canary" else self.stable
        return {"model": self.model, "version": str(version), "variant": variant, "form": self.form}


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch run as it ended, committed or not."""

    form: Form = "batch"
    model: str
    version: int | None = None
    variant: str = "stable"
    code: str = "ok"  # or the error's code
    seconds: float
    rows_in: int | None = 0  # None: whoever tells of the run has not counted its rows
    rows_out: int = 0
    rows_dead: int = 0
    ended_at: float  # Unix time

    def labels(self) -> dict[str, str]:
        return {"model": self.model, "version": str(self.version or UNKNOWN), "variant": self.variant, "form": self.form}


class Telemetry(Protocol):
    """The hook. Called on the hot path: an implementation neither blocks nor raises."""

    def record(self, inference: InferenceRecord) -> None: ...

    def loaded(self, load: LoadRecord) -> None: ...

    def ran(self, run: RunRecord) -> None: ...

    def shared(self, split: SplitRecord) -> None: ...


class Silent:
    """Counts nothing."""

    def record(self, inference: InferenceRecord) -> None:
        """Does nothing."""

    def loaded(self, load: LoadRecord) -> None:
        """Does nothing."""

    def ran(self, run: RunRecord) -> None:
        """Does nothing."""

    def shared(self, split: SplitRecord) -> None:
        """Does nothing."""


def prometheus(registry: CollectorRegistry) -> Telemetry:
    """A backend that counts in the given `prometheus_client` registry."""
    from prometheus_client import Counter, Gauge, Histogram

    made: dict[str, Counter | Gauge | Histogram] = {}
    for metric in VOCABULARY:
        if metric.kind == "histogram":
            made[metric.name] = Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
        else:
            kind = Counter if metric.kind == "counter" else Gauge
            made[metric.name] = kind(metric.name, metric.help, metric.labels, registry=registry)
    return _Prometheus(made)


class _Prometheus:
    def __init__(self, metrics: Mapping[str, object]) -> None:
        self._metrics = metrics

    def _at(self, metric: Metric, labels: Mapping[str, str]) -> object:
        return self._metrics[metric.name].labels(**labels)  # type: ignore[attr-defined]  # the three classes share no base

    def record(self, inference: InferenceRecord) -> None:
        self._tell(observations(inference))

    def loaded(self, load: LoadRecord) -> None:
        self._tell(of_load(load))

    def ran(self, run: RunRecord) -> None:
        self._tell(of_run(run))

    def shared(self, split: SplitRecord) -> None:
        self._tell(of_split(split))

    def _tell(self, seen: list[Observation]) -> None:
        for metric, labels, value in seen:
            at = self._at(metric, labels)
            if metric.kind == "counter":
                at.inc(value)  # type: ignore[attr-defined]
            elif metric.kind == "gauge":
                at.set(value)  # type: ignore[attr-defined]
            else:
                at.observe(value)  # type: ignore[attr-defined]


def observations(inference: InferenceRecord) -> list[Observation]:
    """The record as (metric, labels, value): the one place that says what a record means, for every backend."""
    labels = inference.labels()
    series = [(REQUESTS, labels | {"code": inference.code}), (REQUEST_SECONDS, labels)]
    if inference.rows:
        series.append((ROWS, labels))
    if inference.batch_rows:
        series.append((BATCH_ROWS, labels))
    series += [(STAGE_SECONDS, labels | {"stage": stage}) for stage in inference.stages]
    series += [(DEAD_LETTER_ROWS, labels | {"code": code}) for code in inference.dead_letters]
    if inference.instead_of is not None:
        version, code = inference.instead_of
        series.append((CANARY_FAILURES, labels | {"version": str(version), "variant": "canary", "code": code}))
    return [(metric, of, value) for (metric, of), value in zip(series, observed(inference), strict=True)]


def observed(inference: InferenceRecord) -> list[float]:
    """The values of `observations` alone, in their order: for a backend that remembers which series records of a shape have."""
    values = [1.0, inference.seconds]
    if inference.rows:
        values.append(float(inference.rows))
    if inference.batch_rows:
        values.append(float(inference.batch_rows))
    values += inference.stages.values()
    if inference.dead_letters:
        values += map(float, inference.dead_letters.values())
    if inference.instead_of is not None:
        values.append(1.0)
    return values


def shape(inference: InferenceRecord) -> tuple[object, ...]:
    """Of a record: those that have the same are counted in the same series."""
    return (
        inference.model, inference.version, inference.variant, inference.form, inference.code, inference.rows > 0,
        inference.batch_rows > 0, *inference.stages, None, *inference.dead_letters, inference.instead_of,
    )  # fmt: skip


def of_load(load: LoadRecord) -> list[Observation]:
    """The same of a load, well or not, and of its end."""
    labels = load.labels()
    info = labels | {"provider": load.provider, "precision": load.precision, "digest": load.digest[:12]}
    if load.code == FREED:
        return [(MODEL_INFO, info, 0.0)]
    if load.code != "ok":
        return [(MODEL_LOAD_FAILURES, labels | {"code": load.code}, 1.0)]
    stages = [(MODEL_LOAD_SECONDS, labels | {"stage": stage}, seconds) for stage, seconds in load.stages.items()]
    return [*stages, (MODEL_INFO, info, 1.0)]


def of_split(split: SplitRecord) -> list[Observation]:
    """The same of a split."""
    stable, canary = split.labels("stable"), split.labels("canary")
    seen: list[Observation] = [(SPLIT_WEIGHT, stable, 1.0 - split.weight), (SPLIT_WEIGHT, canary, split.weight)]
    return [*seen, (CANARY_CUTS, canary, 1.0)] if split.cut else seen


def of_run(run: RunRecord) -> list[Observation]:
    """The same of a batch run. One that failed says nothing of the last success."""
    labels, ok = run.labels(), run.code == "ok"
    rows = {} if run.rows_in is None else {"in": run.rows_in, "answered": run.rows_out, "dead": run.rows_dead}
    seen: list[Observation] = [(RUN_SUCCESS, labels, float(ok)), (RUN_SECONDS, labels | {"code": run.code}, run.seconds)]
    seen += [(RUN_ROWS, labels | {"outcome": outcome}, float(n)) for outcome, n in rows.items()] if ok else []
    return [*seen, (RUN_SUCCESS_TIME, labels, run.ended_at)] if ok else seen
