"""`run --compare VERSION`: what another version would have answered, part by part, and what follows from it.

    before anything is scored: VERSION -> prepare -> pinned, verified, fit for the input -> Comparison
    after the commit: parts without a record -> PartComparer (comparer.py) -> records -> evidence.json, report.html -> Compared

The run itself does not know of it: it scores and commits first, as without. What goes wrong from then on is told, and the run
stays committed; the same command goes on with the parts that are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from batch.compare_report import render
from batch.comparer import PartComparer
from batch.pool import Cluster, fitting_pool
from batch.progress import RunProgress
from batch.registry import Watch
from batch.remote import drive
from batch.report import require_plots
from batch.spec import JobSpec
from triform.comparing import shared_columns
from triform.errors import ConfigurationError, InvalidReference
from triform.features import Features
from triform.package import ModelPackage
from triform.repository import VERSION, ModelRepository, Ref, open_repository, resolve
from triform.rollout.evidence import encode
from triform.rollout.policy import Policy, read_policy
from triform.runs import inputs
from triform.runs.commit import utc_now
from triform.runs.comparison import DEFAULT, Comparison, evidence, pin, pinned, unpin
from triform.runs.folder import RunFolder
from triform.runs.inputs import READERS
from triform.runs.plan import Pinned, Plan
from triform.scoring import Layout
from triform.sources import Sources

MAX_FAULTS: Final = 10  # after so many parts that could not be compared the cause is not a single one
EVIDENCE: Final = "evidence.json"
REPORT: Final = "report.html"


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison came to. `rows` were answered by both; `decision`: the gate's, of the shadow step; `faults`: parts
    that were not compared, or not to their end, by the reason."""

    candidate: Pinned
    parts: int
    parts_compared: int
    rows: int
    disagreed: int
    decision: str
    reasons: tuple[str, ...]
    evidence: str  # a path or s3://...
    report: str
    faults: dict[str, int] = {}


def reference(compare: str | int, model: str) -> Ref:
    """What `--compare` names: a number, an alias, or both with the model's name. Raises `ConfigurationError`."""
    name, text = Ref.parse(model).model, str(compare)
    given = f"{name}/{text}" if VERSION.fullmatch(text) else f"{name}@{text}" if text in ("stable", "canary", "shadow") else text
    try:
        ref = Ref.parse(given)
    except InvalidReference:
        ref = None
    if ref is None or ref.model != name or (ref.version is None and ref.alias is None):
        raise ConfigurationError(f"compare: expected a version of {name} (2, canary, {name}/2), got {text[:120]!r}")
    return ref


def prepare(spec: JobSpec, plan: Plan, folder: RunFolder) -> Comparison:
    """The comparison with the version that `spec.compare` means now, or meant when this run's unfinished comparison began: it
    stays, wherever the alias moves, until all parts are compared.

    Raises, before anything is scored or written, what keeps it from being made: `ConfigurationError` (the run's own version, no
    output in common, a policy that is none, no matplotlib), `NotFound`, `PackageError`, `InvalidInput` for columns that the input
    lacks.
    """
    require_plots()
    asked = reference(spec.compare or "", plan.model)
    policy = _policy(spec.policy)
    if (begun := pinned(folder, str(asked))) is not None:
        return Comparison(folder, begun, policy)
    repository = open_repository(plan.repository)
    package = repository.package(*resolve(repository, asked))
    manifest = package.manifest
    if manifest.digest == plan.pinned.digest:
        raise ConfigurationError(f"compare: {manifest.ref} is the version that the run uses: name another one")
    package.verify("golden")
    ours, theirs = _features(_package(repository, plan.pinned)), _features(package)
    if not shared_columns(ours, theirs):
        has = ", ".join(c.name for c in ours.outputs), ", ".join(c.name for c in theirs.outputs)
        raise ConfigurationError(f"compare: no output in common: {plan.pinned.ref} answers {has[0]}; {manifest.ref} {has[1]}")
    if theirs.inputs != ours.inputs:
        sources = Sources()
        inputs.check_columns(inputs.read_files([file.path for file in plan.files], sources), theirs, Layout())
    return Comparison(folder, pin(folder, str(asked), Pinned(manifest.ref, manifest.digest)), policy)


def _policy(path: str | None) -> Policy:
    if path is None:
        return DEFAULT
    policy = read_policy(Path(path))
    if policy.shadow is None:
        raise ConfigurationError(
            f"{path}: shadow: missing; a run is compared as a shadow is, so the policy needs a [shadow] table"
        )
    return policy


def _package(repository: ModelRepository, wanted: Pinned) -> ModelPackage:
    ref = Ref.parse(wanted.ref)
    return repository.package(ref.model, ref.version or 0)


def _features(package: ModelPackage) -> Features:
    return Features(package.manifest.signature, package.manifest.config)


def finish(comparison: Comparison, spec: JobSpec, console: Console, stack: ExitStack) -> Compared:
    """Compares what is missing of a committed run, and writes evidence and report anew from all records."""
    comparison.begin()
    plan, done = comparison.folder.plan(), comparison.recorded()
    missing = [part.number for part in plan.parts if part.number not in done]
    faults = _compare_missing(comparison, plan, missing, spec, console, stack) if missing else Counter[str]()
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(comparison.record, range(len(plan.parts))))
    faults.update(part.error for part in parts if part is not None and part.code)
    found = evidence(plan.pinned, comparison, parts, utc_now())
    repository = open_repository(plan.repository)
    features = [_features(_package(repository, wanted)) for wanted in (plan.pinned, comparison.candidate)]
    written = comparison.write(EVIDENCE, encode(found))
    report = comparison.write(REPORT, render(plan, comparison, parts, found, *features, faults=faults))
    there = [part for part in parts if part is not None]
    if len(there) == len(parts):
        unpin(comparison.folder, str(reference(spec.compare or "", plan.model)))
    return Compared(
        candidate=comparison.candidate,
        parts=len(parts),
        parts_compared=sum(not part.code for part in there),
        rows=sum(part.rows for part in there),
        disagreed=sum(part.disagreed for part in there),
        decision=found.verdict.decision,
        reasons=found.verdict.reasons,
        evidence=written,
        report=report,
        faults=dict(faults),
    )


def _compare_missing(
    comparison: Comparison, plan: Plan, missing: Sequence[int], spec: JobSpec, console: Console, stack: ExitStack
) -> Counter[str]:
    """Returns why parts have no record after this, and how many."""
    repository, candidate = open_repository(plan.repository), comparison.candidate
    threads = max(_package(repository, wanted).manifest.config.runtime.threads for wanted in (plan.pinned, candidate))
    console.print(f"committed; comparing {len(missing)} part(s) with {candidate.ref}", highlight=False, soft_wrap=True)
    faults, ended, watch = Counter[str](), 0, Watch()
    rows = sum(plan.parts[number].rows for number in missing)
    with RunProgress(console, rows=rows, parts=len(missing), under_way=watch.rows_under_way) as progress:
        cluster = stack.enter_context(Cluster(spec.address))
        outcomes = drive(
            fitting_pool(spec, cluster, parts=len(missing), threads=threads, console=console),
            missing,
            worker=PartComparer,
            args=(comparison.folder.files.location, plan.run, spec.runtime(), candidate, comparison.policy),
            watch=watch,
        )
        for outcome in outcomes:
            compared = outcome.compared
            if compared is None:
                faults[outcome.error] += 1
            else:
                progress.advance(plan.parts[outcome.part].rows, 0, sum(window.seconds for window in compared.windows))
            ended += compared is None or bool(compared.code)
            if ended >= MAX_FAULTS:
                break
    return faults
