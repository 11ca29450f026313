"""A run beside another version, on one page of HTML: where they disagree, how the scores shifted, and what the gate says.

    ComparedPart by part -> disagreement.py: added up --+
    Evidence: verdict and findings ---------------------+-> page.py, plots.py -> report.html

Everything comes from the parts' records and the evidence: no row is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import numpy as np

from batch import page
from batch.report import require_plots
from triform.comparing import score_column, shared_columns
from triform.disagreement import ComparedColumn, ComparedPart, merge_columns, refused_by_code
from triform.features import Features
from triform.rollout.evidence import Evidence
from triform.rollout.shift import psi
from triform.rollout.windows import Arm, merge_arms
from triform.runs.comparison import Comparison
from triform.runs.plan import Plan


def render(
    plan: Plan,
    comparison: Comparison,
    parts: Sequence[ComparedPart | None],
    evidence: Evidence,
    ours: Features,
    theirs: Features,
    *,
    faults: Mapping[str, int],
) -> bytes:
    """The report's HTML. `faults`: parts that were not compared to their end, by the reason."""
    plots = require_plots()
    there = [part for part in parts if part is not None]
    names = plan.pinned.ref, comparison.candidate.ref
    sections = [
        *_overview(plan, names, parts, there, faults),
        *_verdict(evidence),
        *_disagreement(plots, plan, names, there, ours, theirs),
        *_shift(plots, comparison, names, there, score_column(ours, theirs)),
        *_refused(names, there),
        *_times(names, there),
    ]
    return page.page(f"Run {plan.run}: {names[0]} beside {names[1]}", sections)


def _overview(
    plan: Plan,
    names: tuple[str, str],
    parts: Sequence[ComparedPart | None],
    there: Sequence[ComparedPart],
    faults: Mapping[str, int],
) -> Iterator[str]:
    rows, apart = _rows(there)
    yield page.heading(1, f"{names[0]} beside {names[1]}: run {plan.run}")
    yield page.paragraph(
        f"{rows:,} rows were answered by both; in {apart:,} of them ({apart / rows:.3%}) the answers disagree."
        if rows
        else "No row was answered by both."
    )
    yield page.facts(
        "The comparison",
        [
            ("run", plan.run),
            ("the run's version", names[0]),
            ("compared with", names[1]),
            ("parts compared", f"{sum(not part.code for part in there):,} of {len(parts):,}"),
            ("rows of the run", plan.rows),
            ("rows compared", rows),
            ("rows that disagree", apart),
            ("run begun", plan.layout.scored_at),
        ],
    )
    if faults:
        yield page.paragraph("Parts that were not compared, or not to their end, count towards no promotion.", "note")
        yield page.table("Not compared to the end", ("reason", "parts"), list(faults.items()))


def _verdict(evidence: Evidence) -> Iterator[str]:
    verdict = evidence.verdict
    yield page.heading(2, "What the gate says")
    yield page.paragraph(f"{verdict.decision}, as of a shadow: {'; '.join(verdict.reasons)}.")
    rows = [
        (f.guard, f.says, _cell(f.canary), _cell(f.stable), f.against, f.against_at, f.in_favour, f.in_favour_at)
        for f in verdict.findings
    ]
    headers = ("guard", "says", "candidate", "stable", "against", "needs", "in favour", "needs")
    yield page.table("Findings; `triform rollout replay evidence.json` computes them again", headers, rows)


def _cell(value: float | None) -> float | str:
    return "" if value is None else value


def _disagreement(
    plots: ModuleType, plan: Plan, names: tuple[str, str], there: Sequence[ComparedPart], ours: Features, theirs: Features
) -> Iterator[str]:
    yield page.heading(2, "Disagreement")
    shared = {column.name for column, _ in shared_columns(ours, theirs)}
    for name, features in zip(names, (ours, theirs), strict=True):
        if only := [column.name for column in features.outputs if column.name not in shared]:
            yield page.paragraph(f"Only {name} answers: {', '.join(only)}. Not compared.", "note")
    rows, apart = _rows(there)
    if not rows:
        yield page.paragraph("No row was answered by both versions.", "soft")
        return
    columns = merge_columns(there)
    table = [
        (
            c.name,
            c.rows,
            f"{c.rows / rows:.3%}",
            c.largest,
            c.relative,
            f"{c.tolerance.atol:g} + {c.tolerance.rtol:g} of it",
        )
        for c in columns
    ]
    headers = ("column", "rows apart", "of all", "largest difference", "as a share of it", "allowed (numbers)")
    yield page.table("By output column; a row disagrees if any of its columns does", headers, table)
    some = [part for part in there if part.rows]
    shares = [part.disagreed / part.rows for part in some]
    says = f"From {min(shares):.3%} to {max(shares):.3%} of a part's rows."
    picture = plots.disagreement([part.part for part in some], shares, apart / rows)
    yield page.picture(picture, f"Share of rows that disagree, by part. {says}")
    told = [(c.name, c.example) for c in columns if c.example is not None]
    if told:
        rows_told = [(name, plan.parts[e.part].path, e.row, e.stable, e.candidate) for name, e in told]
        caption = "The row that differs most, of each column; rows count from 0"
        yield page.table(caption, ("column", "file", "row", *names), rows_told)


def _shift(
    plots: ModuleType, comparison: Comparison, names: tuple[str, str], there: Sequence[ComparedPart], judged: str | None
) -> Iterator[str]:
    yield page.heading(2, "Score shift")
    columns = [column for column in merge_columns(there) if sum(column.stable) and sum(column.candidate)]
    if not columns:
        yield page.paragraph("No column of floats was answered by both versions.", "soft")
    for column in columns:
        index = float(psi(np.array(column.candidate), np.array(column.stable)))
        yield page.heading(3, column.name)
        says = f"Population stability index {index:.4g}; NaN: {column.stable[-1]:,} and {column.candidate[-1]:,} rows."
        gate = " This is the column that the gate looks at." if column.name == judged else ""
        yield page.paragraph(f"{says}{gate}{_coarse(column)}")
        picture = plots.two_histograms(comparison.edges, column.stable, column.candidate, names)
        yield page.picture(picture, f"Scores of {names[0]} and {names[1]} in fixed bins. {says}")


def _coarse(column: ComparedColumn) -> str:
    """Bins that were made for probabilities say nothing about other numbers."""
    if max(column.stable[0], column.stable[-2]) < 0.9 * sum(column.stable):
        return ""
    return " Nearly all rows are in an outer bin: set guards.score_shift.edges in a policy to see more."


def _refused(names: tuple[str, str], there: Sequence[ComparedPart]) -> Iterator[str]:
    yield page.heading(2, "Rows without an answer")
    stable = refused_by_code(part.stable_refused for part in there)
    candidate = refused_by_code(part.candidate_refused for part in there)
    codes = list(dict.fromkeys([*stable, *candidate]))
    if not codes:
        yield page.paragraph("None: both versions answered every row.")
        return
    rows = [(code, stable.get(code, 0), candidate.get(code, 0)) for code in codes]
    yield page.table("By reason", ("code", *names), rows)
    arms = _arms(there)
    yield page.paragraph(
        f"Errors, as the gate counts them: {arms[0].errors:,} and {arms[1].errors:,} of {arms[0].requests:,} rows. Rows that "
        "both versions refuse although no run of theirs failed are the data's fault, and not counted."
    )


def _times(names: tuple[str, str], there: Sequence[ComparedPart]) -> Iterator[str]:
    yield page.heading(2, "Time of a run of the model")
    arms = _arms(there)
    rows = []
    for bucket in sorted(arms[0].execute.keys() & arms[1].execute.keys()):
        times = [[arm.execute[bucket].quantile(share) or 0.0 for arm in arms] for share in (0.5, 0.95)]
        cells = [1e3 * seconds for pair in times for seconds in pair]
        rows.append((f"up to {2**bucket:,}", arms[0].execute[bucket].total, *cells, times[0][1] / max(times[0][0], 1e-12)))
    if not rows:
        yield page.paragraph("No run was timed.", "soft")
        return
    yield page.paragraph(
        "The first rows of each window were answered by both versions in turn, up to 256 rows a run, in one process; to 2.2%."
    )
    headers = (
        "rows",
        "runs each",
        *(f"{share} of {name} (ms)" for share in ("median", "95%") for name in names),
        "median, ratio",
    )
    yield page.table("By rows of a run", headers, rows)


def _rows(there: Sequence[ComparedPart]) -> tuple[int, int]:
    """Compared, and disagreeing."""
    return sum(part.rows for part in there), sum(part.disagreed for part in there)


def _arms(there: Sequence[ComparedPart]) -> tuple[Arm, Arm]:
    windows = [window for part in there for window in part.windows]
    return merge_arms([window.stable for window in windows]), merge_arms([window.canary for window in windows])
