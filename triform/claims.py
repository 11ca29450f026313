"""Who has the last say about a version: a release that is about to name it, or a prune that is about to remove it.

    <model>/claims/3-000001.json    exclusively created in order, as revisions are; the last one counts, and a prune's is final

    release set                                     prune
    1. append a claim: refused after a prune's      1. read the last claim: a release's that is fresh? then it stays
    2. append the revision                          2. read the release log: is it named? then it stays
                                                    3. append a claim; taken? then again from 1

A prune that wins step 3 knows that no release has claimed the version since step 1, so whatever was to name it is in the log
that it read in step 2, and whatever comes later is refused. Of many prunes one wins, and the others may finish its work.

What remains: a claim protects for CLAIM_SECONDS, so a `release set` whose process stands still for longer between its steps 1
and 2 (with no other release made meanwhile, which would be a conflict) can name a version that is gone. So can one by a
Triform that knows no claims yet.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from triform.errors import StoreError, VersionNotFound

if TYPE_CHECKING:  # repository.py comes to this module through releases.py
    from triform.repository import ModelRepository

CLAIM_SECONDS: Final = 3600.0


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    purpose: Literal["release", "prune"]
    claimed_by: str
    claimed_at: str  # ISO 8601, UTC


class Last(NamedTuple):
    """The last claim on a version, if there is one, and how long ago it was made."""

    number: int = 0
    claim: Claim | None = None
    age: float = 0.0

    @property
    def final(self) -> bool:
        return self.claim is not None and self.claim.purpose == "prune"

    @property
    def fresh(self) -> bool:
        return self.claim is not None and self.age < CLAIM_SECONDS


def claim(repository: ModelRepository, model: str, version: int, *, by: str) -> None:
    """Keeps the version from being pruned while a release that names it is made. Raises `VersionNotFound` if it is too late."""
    while True:
        last = last_claim(repository, model, version)
        if last.final:
            raise VersionNotFound(f"version {version} of '{model}' was just pruned; the release stays as it is")
        if append(repository, model, version, last, "release", by=by):
            return


def last_claim(repository: ModelRepository, model: str, version: int) -> Last:
    number, last = 0, None
    while note := repository.read_note(model, _name(version, number + 1)):  # few: one for each time it was newly released
        number, last = number + 1, note
    if last is None:
        return Last()
    try:
        return Last(number, msgspec.json.decode(last.content, type=Claim), last.age)
    except msgspec.DecodeError as error:
        raise StoreError(f"claim {number} on version {version} of '{model}' is damaged: {error}") from error


def append(
    repository: ModelRepository, model: str, version: int, last: Last, purpose: Literal["release", "prune"], *, by: str
) -> bool:
    """Makes the claim after `last`; False if somebody else was first (or it was us, and the response was lost)."""
    content = msgspec.json.encode(Claim(purpose, by, now()))
    return repository.create_note(model, _name(version, last.number + 1), content)


def _name(version: int, number: int) -> str:
    return f"claims/{version}-{number:06d}.json"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
