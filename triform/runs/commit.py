"""From finished parts to a committed run, and the proof afterwards.

    records -> inputs unchanged? -> rows in = rows out + dead letters? -> too many dead letters? -> keys unique?
            -> folders renamed (on a disk) -> manifest created exclusively -> _SUCCESS -> the output's pointer moved

A check that fails leaves the run as it is: nothing is visible, and the same command can go on once the cause is mended.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pyarrow.parquet as pq

from triform.errors import InputChanged, InputUnreadable, JobError, NotReconciled, TooManyDeadLetters
from triform.package import FileEntry
from triform.runs import keys
from triform.runs.folder import RunFolder, part_name
from triform.runs.inputs import READERS, InputFile
from triform.runs.plan import Pinned, PinnedCanary, Plan
from triform.runs.pointer import check_output, point_at
from triform.scoring import Part, ScoredPart
from triform.sources import Sources


class RunManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`_manifest/000001.json`: what a run answered. `seconds` by stage, summed over the parts."""

    format: int = 1
    run: str
    model: str
    pinned: Pinned
    split: PinnedCanary | None = None
    key: tuple[str, ...]
    scored_at: str
    committed_at: str
    rows_in: int
    rows_out: int
    dead: dict[str, int]
    parts: tuple[ScoredPart, ...]
    seconds: dict[str, float]

    @property
    def rows_dead(self) -> int:
        return sum(self.dead.values())

    @property
    def rows_canary(self) -> int:
        """Rows that the canary answered; 0 where there is none."""
        return sum(part.rows_canary for part in self.parts)

    @property
    def instead(self) -> dict[str, int]:
        """Rows of the canary's keys that stable answered, by the code for which the canary did not, the commonest first."""
        return _summed(part.instead for part in self.parts)


def commit(folder: RunFolder, plan: Plan, *, max_dead_letters: float, if_exists: str = "fail") -> RunManifest:
    """Reconciles the run and commits it; an already committed one is returned as it is.

    Raises `InputChanged`, `NotReconciled`, `TooManyDeadLetters` or `OutputExists`, and then nothing is visible to readers.
    """
    done = manifest(folder)
    if done is None:
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda number: _record(folder, number), range(len(plan.parts))))
        try:
            if not folder.swapped():
                check_output(folder.files, folder.run, if_exists)
                check_inputs(plan.files)
                reconcile(folder, plan, parts)
                check_dead_letters(plan, parts, max_dead_letters)
                check_keys(folder, plan, committed=False)
        except (OSError, NotReconciled):
            if not folder.swapped():  # else another driver has checked the same, and renamed the folders under our eyes
                raise
        folder.swap()
        folder.write_manifest(_manifest(plan, parts))
        done = manifest(folder)
        assert done is not None, "a manifest that was just created"  # noqa: S101 - for the type checker
    folder.mark_success()
    point_at(folder.files, folder.run, done.committed_at, if_exists)
    folder.tidy(plan.job)
    return done


def manifest(folder: RunFolder) -> RunManifest | None:
    return folder.manifest(RunManifest)


def _manifest(plan: Plan, parts: list[ScoredPart]) -> RunManifest:
    seconds: Counter[str] = Counter()
    for part in parts:
        seconds.update(part.seconds)
    return RunManifest(
        run=plan.run,
        model=plan.model,
        pinned=plan.pinned,
        split=plan.split,
        key=plan.layout.key,
        scored_at=plan.layout.scored_at,
        committed_at=utc_now(),
        rows_in=sum(p.rows_in for p in parts),
        rows_out=sum(p.rows_out for p in parts),
        dead=dead_by_code(parts),
        parts=tuple(parts),
        seconds={stage: round(s, 3) for stage, s in seconds.items()},
    )


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def dead_by_code(parts: list[ScoredPart]) -> dict[str, int]:
    """Dead letters by reason, the commonest first."""
    return _summed(part.dead for part in parts)


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _record(folder: RunFolder, number: int) -> ScoredPart:
    record = folder.record(number)
    if record is None:
        raise NotReconciled(f"part {number} is not done")
    return record


def check_inputs(files: tuple[InputFile, ...]) -> None:
    """Raises `InputChanged` if a file is no longer the one that was planned."""

    sources = Sources()

    def same(file: InputFile) -> bool:
        try:
            return sources.identify(file.path) == file.identity
        except InputUnreadable:
            return False

    with ThreadPoolExecutor(READERS) as pool:
        changed = [file.path for file, fits in zip(files, pool.map(same, files), strict=True) if not fits]
    if changed:
        raise InputChanged(
            f"{len(changed)} input file(s) changed while the job ran, so nothing is committed: {', '.join(changed[:5])}. "
            "Run the job again for their present content"
        )


def reconcile(folder: RunFolder, plan: Plan, parts: list[ScoredPart]) -> None:
    """Raises `NotReconciled` unless every planned row is in the output or in the dead letters, by records and by files."""
    data, letters = folder.data(committed=False), folder.dead_letters(committed=False)
    _check_strays(folder, data, letters, parts)

    def check(planned: Part, scored: ScoredPart) -> None:
        where = f"part {planned.number} ({planned.path}, row groups {list(planned.row_groups)})"
        if scored.rows_in != planned.rows or scored.rows_out + scored.rows_dead != planned.rows:
            raise NotReconciled(
                f"{where}: {planned.rows} rows planned, {scored.rows_in} read, {scored.rows_out} answered, "
                f"{scored.rows_dead} dead letters"
            )
        _check_file(folder, data, scored.part, scored.data, scored.rows_out, where)
        if scored.dead_letters is not None:
            _check_file(folder, letters, scored.part, scored.dead_letters, scored.rows_dead, where)

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check, plan.parts, parts):
            pass


def _check_strays(folder: RunFolder, data: str, letters: str, parts: Sequence[ScoredPart]) -> None:
    for at, numbers in (data, {p.part for p in parts}), (letters, {p.part for p in parts if p.dead_letters}):
        if strays := sorted(set(folder.files.names(at)) - {part_name(number) for number in numbers}):
            raise NotReconciled(f"{folder.where(at)} holds files of no part: {', '.join(strays[:5])}; move them away")


def _check_file(folder: RunFolder, at: str, part: int, entry: FileEntry, rows: int, where: str) -> None:
    found = folder.part_file(f"{at}/{part_name(part)}")
    if found is None or found.footer.run != folder.run or found.size != entry.size or found.rows != rows:
        raise NotReconciled(f"{where}: {part_name(part)} is missing or is not the file that its record describes")


def check_dead_letters(plan: Plan, parts: list[ScoredPart], most: float) -> None:
    """Raises `TooManyDeadLetters`, naming the reasons that dominate."""
    dead = dead_by_code(parts)
    total = sum(dead.values())
    if total > allowed_dead(plan.rows, most):
        reasons = ", ".join(f"{code} {n:,}" for code, n in dead.items())
        raise TooManyDeadLetters(
            f"{total:,} of {plan.rows:,} rows are dead letters ({total / plan.rows:.2%}, allowed are {most:.2%}): {reasons}. "
            "Nothing is committed; mend the input, or run again with a larger --max-dead-letters, which goes on from here"
        )


def allowed_dead(rows: int, most: float) -> int:
    return int(rows * most + 1e-9)  # 0.29 * 100 is a little less than 29


def check_keys(folder: RunFolder, plan: Plan, *, committed: bool) -> None:
    """Raises `NotReconciled` with examples if a key occurs twice in output and dead letters together."""
    if not plan.layout.key:
        return
    folders = folder.data(committed=committed), folder.dead_letters(committed=committed)
    files = [f"{at}/{name}" for at in folders for name in sorted(folder.files.names(at))]
    scratch = None if committed else folder.files.scratch(folder.temporary)
    twice = keys.duplicates(files, plan.layout.key, folder.files.open, rows=plan.rows, scratch=scratch)
    if twice:
        shown = "; ".join(f"{', '.join(map(str, key))} ({n} times)" for key, n in twice)
        raise NotReconciled(f"the key ({', '.join(plan.layout.key)}) is not unique, so nothing is committed: {shown}")


def committed(folder: RunFolder) -> tuple[Plan, RunManifest]:
    """A committed run's plan and manifest. Raises `JobError` if it is not committed, `NotReconciled` if they do not fit."""
    plan, done = folder.plan(), manifest(folder)
    if done is None:
        raise JobError(f"{folder.location} is not committed: the command that started it finishes it")
    if done.run != plan.run or len(done.parts) != len(plan.parts):
        raise NotReconciled(f"{folder.location}: plan and manifest are of different runs")
    return plan, done


def verify(folder: RunFolder) -> list[str]:
    """Checks a committed run against its manifest: files, digests, counts, keys. Returns what was checked, a line each."""
    plan, done = committed(folder)
    data, letters = folder.data(committed=True), folder.dead_letters(committed=True)
    for planned, scored in zip(plan.parts, done.parts, strict=True):
        if not scored.rows_in == planned.rows == scored.rows_out + scored.rows_dead:
            raise NotReconciled(
                f"part {planned.number}: {planned.rows} rows planned, {scored.rows_out} + {scored.rows_dead} recorded"
            )
        _check_digest(folder, f"{data}/{part_name(scored.part)}", scored.data, scored.rows_out)
        if scored.dead_letters is not None:
            _check_digest(folder, f"{letters}/{part_name(scored.part)}", scored.dead_letters, scored.rows_dead)
    _check_strays(folder, data, letters, done.parts)
    if (done.rows_in, done.rows_out + done.rows_dead) != (plan.rows, plan.rows):
        raise NotReconciled(f"the manifest counts {done.rows_out} + {done.rows_dead} rows, the plan {plan.rows}")
    check_keys(folder, plan, committed=True)
    key = f"key ({', '.join(plan.layout.key)}) unique" if plan.layout.key else "no key to check"
    return [
        f"counts: {done.rows_in:,} rows in = {done.rows_out:,} answered + {done.rows_dead:,} dead letters",
        f"digests: {len(done.parts)} part(s) and their dead letters are the files that were committed",
        f"keys: {key}",
    ]


def _check_digest(folder: RunFolder, name: str, entry: FileEntry, rows: int) -> None:
    try:
        same = folder.files.entry(name) == entry
        with folder.files.open(name) as file:
            same = same and pq.read_metadata(file).num_rows == rows
    except (OSError, ValueError) as error:
        raise NotReconciled(f"{folder.where(name)} cannot be read: {error}") from error
    if not same:
        raise NotReconciled(f"{folder.where(name)} is not the file that was committed")
