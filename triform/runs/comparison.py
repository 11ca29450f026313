"""A run beside another version, in the run's folder: what was compared so far, and what follows from it for the gate.

    <output>/_open/<hash>.json                   the version that a comparison under way has pinned
    <output>/run=<id>/_compare/2-1a2b3c4d/00007.json       a part's comparison, created exclusively
                                          evidence.json    the windows and the gate's verdict on them
                                          report.html

    ComparedPart by part -> windows, neighbours together -> gate.py -> Evidence

Only committed runs are compared, and nothing that readers look at is touched: a comparison can fail, be killed and be made again
as it likes. The folder's name holds the version, its digest and the score bins, so only what belongs together is added up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from triform.disagreement import ComparedPart
from triform.errors import NotReconciled, TriformError
from triform.repository import Ref
from triform.rollout.evidence import Evidence
from triform.rollout.gate import judge
from triform.rollout.policy import MOST_SECONDS, Disagreement, Guards, Policy, ScoreShift, Shadow
from triform.rollout.windows import SHADOW, Window, merge
from triform.runs.folder import RunFolder, open_name, read_json
from triform.runs.plan import Pinned

MOST_WINDOWS: Final = 200
DEFAULT: Final = Policy(
    shadow=Shadow(sample=1.0, min_seconds=0.0),
    guards=Guards(disagreement=Disagreement(), score_shift=ScoreShift()),
    longest_seconds=MOST_SECONDS,  # nobody waits for a run: its seconds are those of many actors, one after another
)
_MISSING: Final = Window(step=SHADOW, seconds=0.001, reported=0)
_RECORD: Final = re.compile(r"(\d{5,})\.json")


class Comparison:
    """One run beside one version. `policy`: by which it is judged; its score bins are those that are counted."""

    def __init__(self, folder: RunFolder, candidate: Pinned, policy: Policy) -> None:
        self.folder, self.candidate, self.policy = folder, candidate, policy
        bins = policy.guards.score_shift or ScoreShift()
        self.edges = bins.edges
        identity = hashlib.sha256(msgspec.json.encode([candidate.digest, self.edges])).hexdigest()[:8]
        self.name = f"{folder.name}/_compare/{Ref.parse(candidate.ref).version}-{identity}"

    def where(self, name: str) -> str:
        return self.folder.where(f"{self.name}/{name}")

    def record(self, part: int) -> ComparedPart | None:
        return read_json(self.folder.files, self._record(part), ComparedPart)

    def add(self, part: ComparedPart) -> ComparedPart:
        """Records a part, unless another process was first; returns what counts."""
        self.folder.files.create(self._record(part.part), msgspec.json.encode(part))
        placed = self.record(part.part)
        if placed is None:
            raise NotReconciled(f"{self.where(f'{part.part:05d}.json')} vanished while it was written")
        return placed

    def recorded(self) -> set[int]:
        """The parts that were compared."""
        return {int(m[1]) for m in map(_RECORD.fullmatch, self.folder.files.names(self.name)) if m}

    def begin(self) -> None:
        self.folder.files.make_folder(self.name)

    def write(self, name: str, content: bytes) -> str:
        """A file beside the records, whole; returns where."""
        self.folder.files.replace(f"{self.name}/{name}", content)
        return self.where(name)

    def _record(self, part: int) -> str:
        return f"{self.name}/{part:05d}.json"


def pinned(folder: RunFolder, asked: str) -> Pinned | None:
    """The version that an unfinished comparison of this run, asked for by this name, has begun with."""
    return read_json(folder.files, _marker(folder, asked), Pinned)


def pin(folder: RunFolder, asked: str, candidate: Pinned) -> Pinned:
    """Notes the version; where another driver was first, that one counts."""
    folder.files.make_folder("_open")
    folder.files.create(_marker(folder, asked), msgspec.json.encode(candidate))
    return pinned(folder, asked) or candidate


def unpin(folder: RunFolder, asked: str) -> None:
    """After the last part: the next comparison asks anew what the name means."""
    with suppress(TriformError):  # a role that may not delete
        folder.files.remove(_marker(folder, asked))


def _marker(folder: RunFolder, asked: str) -> str:
    return open_name(hashlib.sha256(f"compare {folder.run} {asked}".encode()).hexdigest()[:16])


def windows(compared: Sequence[ComparedPart | None]) -> tuple[Window, ...]:
    """The windows of all parts, neighbours together where there are many. None: a part that was not compared, or not yet; what
    holds such a part is not complete, and promotes nothing."""
    found = [window for part in compared for window in (part.windows if part is not None else (_MISSING,))]
    size = max(1, -(-len(found) // MOST_WINDOWS))
    return tuple(_together(found[at : at + size]) for at in range(0, len(found), size))


def _together(found: Sequence[Window]) -> Window:
    """They were measured one after another, so their seconds add up, unlike those of replicas."""
    return msgspec.structs.replace(merge(found), seconds=sum(window.seconds for window in found), expected=len(found))


def evidence(ours: Pinned, comparison: Comparison, compared: Sequence[ComparedPart | None], at: str) -> Evidence:
    """What the gate says of the candidate as a shadow, with all that it rests on. `at`: now, ISO 8601."""
    seen = windows(compared)
    stable, canary = Ref.parse(ours.ref), Ref.parse(comparison.candidate.ref)
    return Evidence(
        model=stable.model,
        stable=stable.version or 0,
        canary=canary.version or 0,
        at=at,
        policy=comparison.policy,
        windows=seen,
        verdict=judge(comparison.policy, seen, SHADOW, sum(window.seconds for window in seen)),
        digests=(ours.digest, comparison.candidate.digest),
    )
