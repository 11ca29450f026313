"""Runs one job: from its specification to a committed run.

    JobSpec -> take the lease -> resolve and pin the model -> plan, or find the unfinished run again -> score what is missing
            -> commit -> with `compare`: compare.py, after it -> Summary

The way of a row: `score_missing` hands part numbers to the actors of `pool.py`; each actor streams its part through
`triform/scoring.py`; `commit.py` counts every row before anybody sees one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import msgspec
from rich.console import Console

from batch import canary, compare
from batch.actor import Outcome, PartScorer
from batch.lease import Lease, held
from batch.pool import Cluster, fitting_pool
from batch.progress import RunProgress
from batch.registry import Watch
from batch.remote import drive
from batch.spec import JobSpec
from triform.cli.output import printable
from triform.errors import JobError, StoreError, TooManyDeadLetters, TriformError, by_code
from triform.features import Features
from triform.package import Manifest
from triform.repository import ModelRepository, Ref, open_repository, resolve
from triform.runs import inputs
from triform.runs.commit import RunManifest, allowed_dead, commit, utc_now
from triform.runs.comparison import Comparison
from triform.runs.folder import RunFolder, open_run
from triform.runs.plan import Pinned, Plan, job_id, make_plan
from triform.runs.pointer import check_output
from triform.scoring import Layout, ScoredPart
from triform.sources import Sources
from triform.stores.files import FileStore, open_files
from triform.telemetry import InferenceRecord, RunRecord, Silent, Telemetry

MAX_FAILED_PARTS: Final = 10  # after so many the cause is not a single file
TELEMETRY_STAGES: Final = {"decode": "decode", "execute": "predict", "encode": "encode"}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. This call scored `scored` rows in `scoring_seconds`, and took `seconds` with Ray's start and the
    commit; parts that were done before are in the manifest only."""

    folder: str  # <output>/run=<id>, a path or s3://bucket/...
    manifest: RunManifest
    scored: int
    seconds: float
    scoring_seconds: float
    compared: compare.Compared | None = None

    @property
    def data(self) -> str:
        return f"{self.folder}/data"

    @property
    def rows_per_second(self) -> float:
        return self.scored / self.scoring_seconds if self.scoring_seconds else 0.0


def run(spec: JobSpec, console: Console, telemetry: Telemetry | None = None, *, stack: ExitStack | None = None) -> Summary:
    """Scores the job's rows and commits them, or goes on with the unfinished run of the same job, or finds it done.

    `stack`: where a Ray that is started here is kept running, for another job; None: it is stopped again. Raises `JobError` and
    its kinds, `InvalidInput` for inputs that cannot feed the model, `OutputExists`, `LeaseHeld`, `NotFound`,
    `ConfigurationError`, `PackageError`.
    """
    telemetry = telemetry or Silent()
    with told_if_failed(spec, telemetry), _output_failures(), ExitStack() as own:
        output = open_files(spec.output)
        with held(output, spec.lease) as lease:
            return _run(spec, output, console, telemetry, lease, stack or own)


@contextmanager
def told_if_failed(spec: JobSpec, telemetry: Telemetry) -> Iterator[None]:
    """A job that fails is recorded as a run that failed, so that alerts hear of it."""
    started = time.perf_counter()
    try:
        yield
    except TriformError as error:
        seconds, model = time.perf_counter() - started, spec.model.split("@")[0].split("/")[0]
        telemetry.ran(RunRecord(model=model, code=error.code, seconds=seconds, ended_at=time.time()))
        raise


@contextmanager
def _output_failures() -> Iterator[None]:
    """The output's disk is full, gone or not ours to write."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the output failed: {error}") from error


def _run(
    spec: JobSpec, output: FileStore, console: Console, telemetry: Telemetry, lease: Lease | None, stack: ExitStack
) -> Summary:
    started = time.perf_counter()
    plan = prepare(spec, console, output)
    folder = RunFolder(output, plan.run)
    check_output(folder.files, plan.run, spec.if_exists)
    comparison = compare.prepare(spec, plan, folder) if spec.compare is not None else None
    scored, scoring_seconds = 0, 0.0
    if not folder.committed():
        plan = folder.begin(plan)
        if not folder.swapped():
            scored, scoring_seconds = score_missing(folder, plan, spec, console, telemetry, lease, stack)
    else:
        console.print(f"run {plan.run} is committed already: nothing to score", highlight=False, soft_wrap=True)
    done = commit(folder, plan, max_dead_letters=spec.max_dead_letters, if_exists=spec.if_exists)
    summary = Summary(
        folder=folder.location,
        manifest=done,
        scored=scored,
        seconds=time.perf_counter() - started,
        scoring_seconds=scoring_seconds,
    )
    _record_run(summary, telemetry)
    if comparison is None:
        return summary
    return msgspec.structs.replace(summary, compared=_compared(comparison, spec, console, stack))


def _record_run(summary: Summary, telemetry: Telemetry) -> None:
    ref, done = Ref.parse(summary.manifest.pinned.ref), summary.manifest
    telemetry.ran(
        RunRecord(
            model=ref.model,
            version=ref.version,
            seconds=summary.seconds,
            rows_in=done.rows_in,
            rows_out=done.rows_out,
            rows_dead=done.rows_dead,
            ended_at=time.time(),
        )
    )


def _compared(comparison: Comparison, spec: JobSpec, console: Console, stack: ExitStack) -> compare.Compared | None:
    """What came of the comparison; None, and a word, where it failed: the rows are committed, whatever happens here."""
    try:
        return compare.finish(comparison, spec, console, stack)
    except Exception as error:  # noqa: BLE001 - as above
        told = f"the run is committed, but its comparison is not done: {printable(error)}. The same command goes on with it"
        console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return None


def prepare(spec: JobSpec, console: Console, output: FileStore) -> Plan:
    """The plan: of the job's unfinished run where there is one, else a new one with the version that the model means now."""
    repository = open_repository(spec.repository)
    sources = Sources()
    files = inputs.read_files(inputs.find(spec.input, sources), sources)
    footers = [file for file, _ in files]
    inputs.check_apart(footers, output.location)
    layout = Layout(key=spec.key, keep=spec.keep, scored_at=utc_now())
    job = job_id(footers, layout, spec.model, repository.location, split=spec.split)
    unfinished = open_run(output, job)
    if unfinished is not None and not RunFolder(output, unfinished).committed():
        plan = RunFolder(output, unfinished).plan()
        beside = f" and canary {canary.told(plan.split)}" if plan.split else ""
        told = f"going on with run {plan.run}, begun {plan.layout.scored_at} with {plan.pinned.ref}{beside}"
        console.print(told, highlight=False, soft_wrap=True)
        return plan
    release = canary.release_of(repository, spec.model) if spec.split else None
    asked = Ref.parse(spec.model)
    name, version = resolve(repository, asked if release is None else Ref(asked.model, version=release.stable))
    package = repository.package(name, version)
    package.verify("golden")
    inputs.check_columns(files, Features(package.manifest.signature, package.manifest.config), layout)
    pinned = Pinned(package.manifest.ref, package.manifest.digest)
    split = canary.pin(repository, release, package, files) if release is not None else None
    plan = make_plan(footers, layout, job=job, model=spec.model, pinned=pinned, split=split, repository=repository.location)
    for manifest in _manifests(repository, plan):
        if manifest.row_independence.kind == "dependent":
            told = f"{manifest.ref}: rows depend on one another, so they are scored one by one, slowly"
            console.print(told, highlight=False, soft_wrap=True)
    alone = ", alone: its release has no canary with a share of the keys" if spec.split else ""
    beside = f" and canary {canary.told(split)}" if split else alone
    console.print(
        f"run {plan.run}: {plan.rows:,} rows in {len(files)} file(s), {len(plan.parts)} part(s), model {pinned.ref}{beside}",
        highlight=False,
        soft_wrap=True,
    )
    return plan


def score_missing(
    folder: RunFolder,
    plan: Plan,
    spec: JobSpec,
    console: Console,
    telemetry: Telemetry,
    lease: Lease | None,
    stack: ExitStack,
) -> tuple[int, float]:
    """Scores the parts without a record; returns the rows scored, and the seconds since the first part was begun."""
    done = folder.recorded()
    done |= {number for number in folder.placed() - done if folder.adopt(number) is not None}
    missing = [part.number for part in plan.parts if part.number not in done]
    if done and missing:
        console.print(
            f"{len(plan.parts) - len(missing)} of {len(plan.parts)} parts were done before", highlight=False, soft_wrap=True
        )
    if not missing:
        return 0, 0.0
    rows = sum(plan.parts[number].rows for number in missing)
    watch = Watch()
    with RunProgress(console, rows=rows, parts=len(missing), under_way=watch.rows_under_way) as progress:
        cluster = stack.enter_context(Cluster(spec.address))
        failed: list[Outcome] = []
        for outcome in _outcomes(folder, plan, spec, cluster, missing, console, watch):
            if lease is not None:
                lease.check()
            _record(outcome, plan, telemetry)
            if outcome.scored and outcome.attempts > 1:
                told = f"{plan.parts[outcome.part].label}: done at attempt {outcome.attempts}, the processes before it died"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
            if outcome.scored is None:
                failed.append(outcome)
                if outcome.code == TooManyDeadLetters.code or len(failed) >= MAX_FAILED_PARTS:
                    break
            else:
                scored = outcome.scored
                ago = time.time() - scored.began if scored.began else 0.0
                progress.advance(scored.rows_in, scored.rows_dead, scored.elapsed, ago)
        seconds = progress.seconds
    if failed:
        raise _failure(failed)
    return rows, seconds


def _outcomes(
    folder: RunFolder, plan: Plan, spec: JobSpec, cluster: Cluster, missing: list[int], console: Console, watch: Watch
) -> Iterator[Outcome]:
    threads = max(manifest.config.runtime.threads for manifest in _manifests(open_repository(plan.repository), plan))
    max_dead = allowed_dead(plan.rows, spec.max_dead_letters)
    yield from drive(
        fitting_pool(spec, cluster, parts=len(missing), threads=threads, console=console),
        missing,
        worker=PartScorer,
        args=(folder.files.location, plan.run, spec.runtime(), max_dead),
        watch=watch,
    )


def _manifests(repository: ModelRepository, plan: Plan) -> list[Manifest]:
    """Of the versions that answer rows."""
    refs = [Ref.parse(pinned.ref) for pinned in plan.versions]
    return [repository.package(ref.model, ref.version or 0).manifest for ref in refs]


def _failure(failed: list[Outcome]) -> TriformError:
    """One error for the parts that failed: the kind they share, and each one's message."""
    kinds = {outcome.code for outcome in failed}
    kind = by_code(kinds.pop()) if len(kinds) == 1 else JobError
    messages = dict.fromkeys(outcome.error for outcome in failed)  # a model that does not load fails every part alike
    return kind("; ".join(messages) + f" ({len(failed)} part(s) failed; finished ones are kept, and the same command goes on)")


def _record(outcome: Outcome, plan: Plan, telemetry: Telemetry) -> None:
    """Counts a part as one request of the batch form: stable's, and the canary's too if it has answered rows of it; and the loads
    that actors tell with it."""
    for load in outcome.loads:
        telemetry.loaded(load)
    ref = Ref.parse(plan.pinned.ref)
    scored = outcome.scored
    stages = {name: scored.seconds.get(was, 0.0) for name, was in TELEMETRY_STAGES.items()} if scored and scored.seconds else {}
    record = InferenceRecord(
        form="batch",
        model=ref.model,
        version=ref.version,
        code="ok" if scored else outcome.code,
        rows=scored.rows_out - scored.rows_canary if scored else 0,
        seconds=scored.elapsed if scored else 0.0,
        stages=stages,
        dead_letters=scored.dead if scored else {},
        instead_of=_failed_canary(plan, scored),
        request_id=f"{plan.run}/{outcome.part}",
    )
    telemetry.record(record)
    if plan.split is not None and scored is not None and scored.rows_canary:
        version = Ref.parse(plan.split.canary.ref).version
        share = msgspec.structs.replace(record, version=version, variant="canary", rows=scored.rows_canary)
        telemetry.record(msgspec.structs.replace(share, stages={}, dead_letters={}, instead_of=None))


def _failed_canary(plan: Plan, scored: ScoredPart | None) -> tuple[int, str] | None:
    """The canary, if stable had to answer rows of its, and the commonest reason."""
    if plan.split is None or scored is None or not scored.instead:
        return None
    return Ref.parse(plan.split.canary.ref).version or 0, max(scored.instead, key=scored.instead.__getitem__)
