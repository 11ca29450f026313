"""The release log of one model: which version is stable, which canary or shadow stands beside it, and who said so when.

    <model>/releases/000017.json : one file a revision, created exclusively, never changed; the highest is current

Creating revision N+1 is at once the compare-and-swap and the audit trail: of many writers one wins, the others are told
(`ReleaseConflict`). `set` never tries again by itself; `rollback` re-reads and tries until it wins. Whatever a revision names
newly is claimed first (claims.py), so that a prune which runs beside it does not take it away.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from triform import claims
from triform.errors import AliasNotFound, InvalidRequest, ModelNotFound, ReleaseConflict, StoreError, VersionNotFound
from triform.splitting import KeyRule

if TYPE_CHECKING:  # repository.py resolves aliases through this module
    from triform.package import ModelPackage
    from triform.repository import ModelRepository

ROLLBACK_ATTEMPTS: Final = 100
MAX_REASON: Final = 1000


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    version: int
    weight: float  # share of the keys, 0..1
    key: KeyRule | None = None  # of a request; None: as the stable version's model.toml says


class Shadow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    sample: float  # share of the requests, 0..1


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    revision: int
    stable: int
    previous: int | None
    canary: Canary | None
    shadow: Shadow | None
    salt: str  # stays for one rollout, so that a user stays on a version
    nonce: str  # tells the writer whether a revision is its own after a lost response
    reason: str
    changed_by: str
    changed_at: str  # ISO 8601, UTC

    def version_of(self, alias: str) -> int | None:
        beside = {"canary": self.canary, "shadow": self.shadow}.get(alias)
        return self.stable if alias == "stable" else beside.version if beside else None

    def aliases(self) -> dict[str, int]:
        """What each alias means, stable first."""
        meant = {alias: self.version_of(alias) for alias in ("stable", "canary", "shadow")}
        return {alias: version for alias, version in meant.items() if version is not None}

    def versions(self) -> set[int]:
        return {self.stable, *(b.version for b in (self.canary, self.shadow) if b)}

    def named(self) -> dict[int, str]:
        """Every version that a rollback or a reader of this revision may want, and as what."""
        aliases = [("previous", self.previous), *((alias, self.version_of(alias)) for alias in ("shadow", "canary", "stable"))]
        return {version: alias for alias, version in aliases if version is not None}


class ReleaseLog:
    """The log of one model in a repository. Holds no state of its own."""

    def __init__(self, repository: ModelRepository, model: str) -> None:
        self.repository = repository
        self.model = model

    def current(self) -> Release | None:
        """The release in force, or None where nothing was released."""
        latest = self.repository.latest_revision(self.model)
        return self.read(latest) if latest else None

    def in_force(self, known: Release | None = None) -> Release:
        """The release in force; of a model that was never released one of revision 0, whose stable version is the highest.

        It is looked for from `known` on, if the log still holds that: two reads where nothing changed, however long the log is.
        Raises `ModelNotFound` where there is no version at all.
        """
        if known is None or not known.revision or self._find(known.revision) != known:
            return self.current() or next(self._never_released())
        while (later := self._find(known.revision + 1)) is not None:
            known = later
        return known

    def newest_first(self) -> Iterator[Release]:
        """The release in force, then those before it; of a model that was never released its versions, in the same way."""
        latest = self.repository.latest_revision(self.model)
        return (self.read(r) for r in range(latest, 0, -1)) if latest else self._never_released()

    def _never_released(self) -> Iterator[Release]:
        versions = self.repository.versions(self.model)
        if not versions:
            raise no_such_model(self.repository, self.model)
        return (_unreleased(version) for version in reversed(versions))

    def read(self, revision: int) -> Release:
        found = self._find(revision)
        if found is None:
            raise VersionNotFound(f"'{self.model}' has no release revision {revision}")
        return found

    def _find(self, revision: int) -> Release | None:
        content = self.repository.read_release(self.model, revision)
        try:
            return None if content is None else msgspec.json.decode(content, type=Release)
        except msgspec.DecodeError as error:
            raise StoreError(f"release revision {revision} of '{self.model}' is damaged: {error}") from error

    def history(self, limit: int = 20) -> list[Release]:
        """The latest revisions, newest first."""
        latest = self.repository.latest_revision(self.model)
        return [self.read(r) for r in range(latest, max(0, latest - limit), -1)]

    def set(
        self,
        *,
        stable: int | None = None,
        canary: Canary | None = None,
        shadow: Shadow | None = None,
        reason: str = "",
        changed_by: str | None = None,
        expect: int | None = None,
    ) -> Release:
        """Writes the next revision: what is not named is not there, except that `stable` stays as it is.

        Every version that it names newly is verified in full first. `expect` is the revision the caller has looked at.
        Raises `ReleaseConflict` if another writer was first, `VersionNotFound`, `PackageError`, `InvalidRequest`.
        """
        now = self.current()
        if expect is not None and expect != (now.revision if now else 0):
            by = f" (by {now.changed_by}: stable {now.stable}, {now.changed_at})" if now else ""
            raise ReleaseConflict(
                f"'{self.model}' is at revision {now.revision if now else 0}{by}, not {expect}: look again and decide anew"
            )
        if stable is None:
            if now is None:
                raise InvalidRequest(f"'{self.model}' was never released: name its first stable version with --stable")
            stable = now.stable
        wanted = self._next(now, stable, canary, shadow, reason, changed_by)
        new = sorted(wanted.versions() - (now.versions() if now else set()))
        for version in sorted(wanted.versions()):
            package = self._known(version)
            if version in new:
                package.verify("full")
        for version in new:  # last, because a claim holds for an hour; what `now` names is safe without
            claims.claim(self.repository, self.model, version, by=wanted.changed_by)
        return self._append(wanted)

    def rollback(self, *, reason: str = "rollback", changed_by: str | None = None) -> Release:
        """Away from what is new: a canary or shadow is taken off; without one, `previous` becomes stable again.

        What is to be left is fixed at the first look, so that two who roll back at once do not undo each other: whoever comes
        second finds it gone, and gets the release that the first one made. Re-reads and retries until it wins. Needs neither
        the new version nor anything that runs.
        """
        seen = now = self.current()
        for _ in range(ROLLBACK_ATTEMPTS):
            if seen is None or now is None:
                raise AliasNotFound(f"'{self.model}' was never released: there is nothing to roll back")
            if now is not seen and _left(seen, now):
                return now
            # Where what was new is stable: it had been released, or was promoted meanwhile.
            back = now.stable in _new(seen) and (now.stable != seen.stable or not (seen.canary or seen.shadow))
            target = now.previous if back else now.stable
            if target is None:
                raise AliasNotFound(
                    f"'{self.model}' has had no stable version before {now.stable}: there is nothing to roll back to"
                )
            self._known(target)
            try:
                return self._append(self._next(now, target, None, None, reason, changed_by))
            except ReleaseConflict:
                now = self.current()
        raise ReleaseConflict(f"'{self.model}': {ROLLBACK_ATTEMPTS} other writers were first, one after another; try again")

    def _known(self, version: int) -> ModelPackage:
        versions = self.repository.versions(self.model)
        if version not in versions:
            raise no_such_version(self.repository, self.model, version, versions, "; the release stays as it is")
        return self.repository.package(self.model, version)

    def _next(
        self, now: Release | None, stable: int, canary: Canary | None, shadow: Shadow | None, reason: str, by: str | None
    ) -> Release:
        _check_share("canary weight", canary.weight if canary else 0.0)
        _check_share("shadow sample", shadow.sample if shadow else 0.0)
        if canary and canary.version == stable:
            raise InvalidRequest(f"version {stable} cannot be stable and canary at once")
        if len(reason) > MAX_REASON:
            raise InvalidRequest(f"reason: {len(reason)} characters, {MAX_REASON} at most")
        before = now.canary if now else None
        same_rollout = bool(before and canary and before.version == canary.version)
        if same_rollout and before and canary and canary.key is None:  # it stays as the salt does
            canary = msgspec.structs.replace(canary, key=before.key)
        return Release(
            revision=(now.revision if now else 0) + 1,
            stable=stable,
            previous=now.previous if now and now.stable == stable else now.stable if now else None,
            canary=canary,
            shadow=shadow,
            salt=now.salt if now and same_rollout else _token(),
            nonce=_token(),
            reason=reason,
            changed_by=by or whoami(),
            changed_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _append(self, release: Release) -> Release:
        content = msgspec.json.format(msgspec.json.encode(release), indent=2)
        if self.repository.create_release(self.model, release.revision, content):
            return release
        winner = self.read(release.revision)
        if winner.nonce == release.nonce:
            return release
        raise ReleaseConflict(
            f"revision {release.revision} of '{self.model}' was taken by {winner.changed_by} "
            f"(stable {winner.stable}, {winner.changed_at}): look again and decide anew"
        )


def no_such_model(repository: ModelRepository, model: str) -> ModelNotFound:
    """What to raise for a model without versions: it says what there is."""
    known = ", ".join(repository.models()[:10]) or "none at all"
    return ModelNotFound(f"no model '{model}' in {repository.location} (it has: {known})")


def no_such_version(
    repository: ModelRepository, model: str, version: int, versions: list[int], then: str = ""
) -> VersionNotFound:
    """What to raise for a version that is not among `versions`: it says what there is, and whether this one was pruned."""
    listed = ", ".join(map(str, versions)) or "none"
    if version in repository.pruned(model):
        return VersionNotFound(f"version {version} of '{model}' was pruned (it has: {listed}){then}")
    return VersionNotFound(f"'{model}' has no version {version} (it has: {listed}){then}")


def _left(before: Release, after: Release) -> bool:
    """Whether what was new in `before` is no longer in `after`."""
    return not _new(before) & after.versions()


def _new(release: Release) -> set[int]:
    """Its canary and shadow, or else its stable version."""
    return {beside.version for beside in (release.canary, release.shadow) if beside} or {release.stable}


def _unreleased(version: int) -> Release:
    return Release(
        revision=0, stable=version, previous=None, canary=None, shadow=None, salt="", nonce="", reason="", changed_by="",
        changed_at="",
    )  # fmt: skip


def _token() -> str:
    return os.urandom(8).hex()


def _check_share(what: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise InvalidRequest(f"{what}: expected 0 to 1, got {share}")


def whoami() -> str:
    """user@host, for the log."""
    import getpass  # whoever only reads the log does not pay for these
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
