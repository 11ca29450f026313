"""Which versions of a model stay, and how the others go: `triform repo prune`.

    log, versions -> judge -> verdicts, each with its reason -> claim -> tombstone -> remove -> sweep

What stays: whatever a release of the last revisions names (as stable, previous, canary or shadow), the newest versions (a model
that was never released is served by its highest), and what is younger than the grace period.

What goes, goes in an order that a crash may interrupt anywhere; the next prune ends what this one began:

    1. claims/3-000002.json   decides it, against releases made at the same time: see claims.py
    2. pruned/3.json          hides the version from whoever looks for one, and spends its number for ever: versions never change
    3. the version            its name first (a rename; on S3 the manifest), so that nobody sees half of it
    4. leftovers              of killed packagers, and on S3 the blobs that no manifest names any more
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from triform import claims
from triform.errors import InvalidRequest, ModelNotFound
from triform.releases import Release, ReleaseLog, whoami
from triform.repository import ABANDONED_SECONDS, Leftover, ModelRepository, Stored

DAY: Final = 24 * 3600.0
NO_VERSION: Final = 0


class Policy(msgspec.Struct, frozen=True):
    """What stays: what the last `revisions` name, the newest `versions`, and what is younger than `days`."""

    revisions: int = 10
    versions: int = 1
    days: float = 7.0

    def __post_init__(self) -> None:
        for name in ("revisions", "versions"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} to keep: at least 1, got {getattr(self, name)}")
        if not 0 <= self.days < 1e6:
            raise InvalidRequest(f"older than: expected a number of days, got {self.days:g}")


class Verdict(msgspec.Struct, frozen=True):
    version: int
    digest: str
    age_seconds: float
    bytes: int  # that go with it alone
    stays: str | None  # why; None: it goes


class Outcome(msgspec.Struct, frozen=True):
    """What a prune of one model did, or would do."""

    model: str
    verdicts: list[Verdict]
    leftovers: list[Leftover]

    @property
    def gone(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.stays is None]

    @property
    def bytes(self) -> int:
        return sum(verdict.bytes for verdict in self.gone) + sum(leftover.size for leftover in self.leftovers)


def prune(repository: ModelRepository, model: str, policy: Policy, *, dry_run: bool, by: str | None = None) -> Outcome:
    """Removes the versions that the policy does not keep; a dry run says which.

    Raises `ModelNotFound`, or `StoreError`: where removing is denied before anything has changed.
    """
    if not repository.versions(model):
        raise ModelNotFound(f"no model '{model}' in {repository.location} (it has: {', '.join(repository.models()) or 'none'})")
    run = _Run(repository, model, policy, by or whoami())
    verdicts = run.judge()
    older_than = max(policy.days * DAY, ABANDONED_SECONDS)
    if dry_run:
        going = {verdict.version for verdict in verdicts if verdict.stays is None}
        return Outcome(model, verdicts, repository.sweep(model, older_than=older_than, without=going, dry_run=True))
    repository.remove(model, NO_VERSION)  # where removing is denied, this says so
    verdicts = [run.carry_out(verdict) for verdict in verdicts]
    return Outcome(model, verdicts, repository.sweep(model, older_than=older_than))


def judge(stored: Sequence[Stored], condemned: Collection[int], named: dict[int, str], policy: Policy) -> list[Verdict]:
    """`condemned` are the versions that an earlier prune has decided about and did not finish; `named` says who needs which."""
    alive = [one.version for one in stored if one.version not in condemned]
    newest = alive[-policy.versions :]

    def stays(one: Stored) -> str | None:
        if one.version in named:
            return named[one.version]
        if one.version in condemned:
            return None
        if one.version in newest:
            return "the newest" if len(newest) == 1 else f"one of the newest {policy.versions}"
        if one.age < policy.days * DAY:
            return f"published {one.age / DAY:.1f} days ago"
        return None if one.digest else "its manifest cannot be read"

    return [Verdict(one.version, one.digest, round(one.age), one.size, stays(one)) for one in stored]


class _Run:
    """One prune of one model, and what it has seen of the release log."""

    def __init__(self, repository: ModelRepository, model: str, policy: Policy, by: str) -> None:
        self.repository = repository
        self.model = model
        self.policy = policy
        self.by = by
        self.log = ReleaseLog(repository, model)
        self.named: dict[int, str] = {}
        self.revision = 0

    def judge(self) -> list[Verdict]:
        stored = self.repository.stored(self.model)
        self.spent = set(self.repository.pruned(self.model))
        unspent = (one.version for one in stored if one.version not in self.spent)
        decided = {v for v in unspent if claims.last_claim(self.repository, self.model, v).final}
        for release in reversed(self.log.history(self.policy.revisions)):
            self._see(release)
        return judge(stored, self.spent | decided, self.named, self.policy)

    def carry_out(self, verdict: Verdict) -> Verdict:
        """Removes the version if it is to go, and if no release that was made meanwhile needs it."""
        if verdict.stays is not None:
            return verdict
        if verdict.version not in self.spent:
            stays = self._claimed_by_others(verdict.version)
            if stays is not None:
                return msgspec.structs.replace(verdict, stays=stays)
            self._spend(verdict)
        self.repository.remove(self.model, verdict.version)
        return verdict

    def _claimed_by_others(self, version: int) -> str | None:
        """The prune's side of the contest that claims.py describes."""
        while True:
            last = claims.last_claim(self.repository, self.model, version)
            if last.final:
                return None
            if last.fresh:
                return "a release that names it was just being made"
            for revision in range(self.revision + 1, self.repository.latest_revision(self.model) + 1):
                self._see(self.log.read(revision))
            if version in self.named:
                return self.named[version]
            if claims.append(self.repository, self.model, version, last, "prune", by=self.by):
                return None

    def _see(self, release: Release) -> None:
        self.revision = release.revision
        self.named |= {v: f"{alias} in revision {release.revision}" for v, alias in release.named().items()}

    def _spend(self, verdict: Verdict) -> None:
        tombstone = {"version": verdict.version, "digest": verdict.digest, "pruned_by": self.by, "pruned_at": claims.now()}
        self.repository.create_note(self.model, f"pruned/{verdict.version}.json", msgspec.json.encode(tombstone))
