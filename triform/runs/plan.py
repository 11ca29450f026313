"""The plan of a run: pure. Footers, model and options in; parts and identities out; frozen to `_run.json`.

Two identities: the *job* (inputs, key, kept columns, repository and the model as it was named) finds an unfinished run again even
if the alias has moved since; the *run* (the same, with the package digest in place of the name) is what the output is called.
Actors, addresses and limits count for neither: they change how rows are scored, not what comes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from triform.runs.inputs import InputFile, RowGroup
from triform.scoring import Layout, Part

PLAN_VERSION: Final = 1
PART_ROWS: Final = 1_000_000
PART_BYTES: Final = 128 << 20


class Pinned(msgspec.Struct, frozen=True):
    """The package that a run uses to its end."""

    ref: str  # name/version
    digest: str


class PinnedCanary(msgspec.Struct, frozen=True, kw_only=True):
    """The canary beside a run's version, and which rows are its: those whose key, in `column`, `salt` gives one of the first
    `points` of 10,000 places. As `revision` of the release log has it."""

    canary: Pinned
    points: int
    salt: str
    column: str
    revision: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    version: int = PLAN_VERSION
    run: str
    job: str
    model: str  # as it was asked for
    pinned: Pinned
    split: PinnedCanary | None = None
    repository: str
    layout: Layout
    files: tuple[InputFile, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def versions(self) -> tuple[Pinned, ...]:
        """The packages that answer rows, the canary's last."""
        return (self.pinned, self.split.canary) if self.split else (self.pinned,)


def job_id(files: Sequence[InputFile], layout: Layout, model: str, repository: str, *, split: bool = False) -> str:
    return _identity([_inputs(files), layout.key, layout.keep, "model", model, repository, *(["split"] if split else [])])


def run_id(files: Sequence[InputFile], layout: Layout, pinned: Pinned, split: PinnedCanary | None = None) -> str:
    """The package digest covers its column mapping and null policy too."""
    shared = ["split", split.canary.digest, split.points, split.salt, split.column] if split else []
    return _identity([_inputs(files), layout.key, layout.keep, "package", pinned.digest, *shared])


def _inputs(files: Sequence[InputFile]) -> list[tuple[str, int, str]]:
    return [(file.path, file.size, file.fingerprint) for file in files]


def _identity(content: list[Any]) -> str:
    return hashlib.sha256(msgspec.json.encode([PLAN_VERSION, *content])).hexdigest()[:16]


def make_plan(
    files: Sequence[InputFile],
    layout: Layout,
    *,
    model: str,
    pinned: Pinned,
    repository: str,
    split: PinnedCanary | None = None,
    job: str | None = None,
) -> Plan:
    """Parts in the order of the files. A file without rows has none; if no file has any, one empty part gives the output its
    schema. `job`: its `job_id`, where it is to be split."""
    parts = [part for file in files for part in _parts(file)] or [_part(file, (), 0, 0) for file in files[:1]]
    return Plan(
        run=run_id(files, layout, pinned, split),
        job=job or job_id(files, layout, model, repository),
        model=model,
        pinned=pinned,
        split=split,
        repository=repository,
        layout=layout,
        files=tuple(files),
        parts=tuple(msgspec.structs.replace(part, number=i) for i, part in enumerate(parts)),
    )


def _part(file: InputFile, row_groups: Sequence[int], first_row: int, rows: int) -> Part:
    return Part(0, file.path, file.size, file.fingerprint, tuple(row_groups), first_row, rows)


def _parts(file: InputFile) -> Iterator[Part]:
    """Neighbouring row groups together, up to PART_ROWS or PART_BYTES; one that is larger by itself stands alone."""
    first_row = 0
    for numbers, groups in _packed(file.row_groups):
        rows = sum(group.rows for group in groups)
        if rows:
            yield _part(file, numbers, first_row, rows)
        first_row += rows


def _packed(groups: Sequence[RowGroup]) -> Iterator[tuple[list[int], list[RowGroup]]]:
    numbers: list[int] = []
    rows = size = 0
    for i, group in enumerate(groups):
        if numbers and (rows + group.rows > PART_ROWS or size + group.size > PART_BYTES):
            yield numbers, [groups[n] for n in numbers]
            numbers, rows, size = [], 0, 0
        numbers.append(i)
        rows, size = rows + group.rows, size + group.size
    if numbers:
        yield numbers, [groups[n] for n in numbers]
