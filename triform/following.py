"""The models of a host, kept at what their release logs ask for while it runs.

    one process of the node, every few seconds:  log -> the release in force -> full verification of what is new -> Seen
    each process of the node:                    Seen, a file -> load beside what is served -> swap

A release is taken up whole or not at all: where one of its versions cannot be served, everything stays as it was, a metric and a
log line say so, and it is tried again some minutes later. The request path takes no lock and knows nothing of all this.

A canary may be isolated: processes of its own load it, and nothing else; those that answer requests read its manifest, and take a
release up whatever becomes of its canary.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from triform.errors import AliasNotFound, PackageError, StoreError, TriformError, VersionNotFound, by_code
from triform.models import Elsewhere, Models
from triform.predictor import Predictor
from triform.releases import Release, ReleaseLog
from triform.repository import ModelRepository, Ref
from triform.runtime import ort
from triform.stores.shared import Shared
from triform.telemetry import LoadRecord

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 300.0  # until what could not be served is tried again
EARLIER: Final = 10  # releases that a start looks at, to find one that loads
REMEMBERED: Final = 20  # digests of versions that were verified: a rollback need not do it again
LISTED: Final = 10  # looks at the logs for one at the list of models, which costs more

Load = Callable[[str, int], Predictor]


class Refusal(msgspec.Struct, frozen=True):
    """Why a release is not served on this node; `at` in Unix time."""

    version: int
    code: str
    error: str
    at: float


class Seen(msgspec.Struct, frozen=True):
    """What a node knows of a model: the release in force, verified unless `refusal` says otherwise, and whose digests were."""

    release: Release
    verified: tuple[str, ...] = ()
    refusal: Refusal | None = None


class Node:
    """What the processes of a node find out together about a repository: each thing is asked, and verified, by one of them.

    `folder`: on the node's own disk. `every`: seconds between two looks at a log. `clock`: Unix time.
    """

    def __init__(
        self,
        repository: ModelRepository,
        folder: Path,
        models: Models,
        *,
        every: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.repository = repository
        self.every = every
        self.clock = clock
        about = f"{repository.location}\n{ort.__version__}"  # another ONNX Runtime has verified nothing yet
        self._folder = folder / f".node-{socket.gethostname()}" / hashlib.sha256(about.encode()).hexdigest()[:16]
        self._models = models
        self._names = Shared(self._folder / ".models", tuple[str, ...], every=LISTED * every, clock=clock)

    def names(self) -> list[str]:
        """The models in the repository. Raises `StoreError`."""
        return list(self._names.renew(lambda _: tuple(self.repository.models())) or ())

    def known(self, model: str) -> Seen | None:
        """What is known of a model; asks nobody."""
        return self._shared(model).get()

    def look(self, model: str, loaded: Collection[str] = ()) -> Seen | None:
        """The same, asked anew if it is time; None where nobody has asked yet. `loaded`: digests of what this process serves.

        Raises `StoreError` where the storage fails, and what is wrong with a log that cannot be read.
        """
        return self._shared(model).renew(partial(self._look, model, loaded))

    def _shared(self, model: str) -> Shared[Seen]:
        return Shared(self._folder / model, Seen, every=self.every, clock=self.clock)

    def _look(self, model: str, loaded: Collection[str], before: Seen | None) -> Seen:
        release = ReleaseLog(self.repository, model).in_force(before.release if before else None)
        if before is not None and before.release == release and not self._is_to_be_tried_again(before):
            return before
        verified = list(before.verified) if before else []
        canary = release.version_of("canary")
        for version in sorted(release.versions(), key=lambda v: (v == canary, v)):  # last: what refuses it refuses nothing else
            try:
                package = self.repository.package(model, version)
                digest = package.manifest.digest
                if digest not in verified and digest not in loaded:
                    package.verify("full")
            except StoreError:
                raise
            except TriformError as error:
                tell(self._models, model, release, version, error)
                return Seen(release, tuple(verified), Refusal(version, error.code, str(error), self.clock()))
            verified = [d for d in verified if d != digest] + [digest]
        return Seen(release, tuple(verified[-REMEMBERED:]))

    def _is_to_be_tried_again(self, seen: Seen) -> bool:
        return seen.refusal is not None and not 0 <= self.clock() - seen.refusal.at < AGAIN_SECONDS


class Follower:
    """Keeps one model of a host at what a reference to it means. One thread at a time may call it.

    `load` opens a version, raising what makes it unfit to be served. `isolated` opens a canary that other processes run; there
    (`canary_only`) it is all that is served, or nothing.
    """

    def __init__(
        self,
        ref: Ref,
        node: Node,
        models: Models,
        load: Load,
        *,
        isolated: Callable[[str, int], Elsewhere] | None = None,
        canary_only: bool = False,
    ) -> None:
        self.ref = ref
        self.release: Release | None = None  # that is served
        self._node = node
        self._models = models
        self._load = load
        self._isolated = isolated
        self._canary_only = canary_only
        self._held: dict[int, Predictor | Elsewhere] = {}
        self._failed: tuple[Release, float, TriformError] | None = None  # which could not be loaded here, when, and why

    def start(self) -> None:
        """Serves the newest release that loads, so that a bad one keeps no replica from starting beside those that run.

        The one in force is verified first, if that is due on this node: what kills its process then kills a child of it.
        Raises what is wrong with the one in force where none before it is better; `ModelNotFound`, `AliasNotFound`.
        """
        if self.ref.version is not None:
            version = self.ref.version
            self._models.replace(self.ref.model, {version: self._load(self.ref.model, version)}, {"stable": version})
            return
        self._node.look(self.ref.model)
        errors: list[TriformError] = []
        for release in islice(ReleaseLog(self._node.repository, self.ref.model).newest_first(), EARLIER):
            try:
                self._raise_if_refused(release)
                self._take(release)
                return
            except (PackageError, VersionNotFound, AliasNotFound) as error:
                errors.append(error)
        self._miss(errors[0].code)
        raise errors[0]

    def step(self) -> None:
        """Looks what there is, and serves it. Raises `StoreError` where the storage fails; what is served stays."""
        if self.ref.version is not None:
            return
        seen = self._node.look(self.ref.model, [p.manifest.digest for p in self._held.values() if isinstance(p, Predictor)])
        if seen is not None and (refusal := self._refusal(seen)) is not None:
            self._miss(refusal.code)
        elif seen is not None and self._is_news(seen.release):
            try:
                self._take(seen.release)
                self._failed = None
            except TriformError as error:
                self._failed = seen.release, self._node.clock(), error
                self._miss(error.code)

    def _miss(self, code: str) -> None:
        if not self._canary_only:  # whose models may well have none
            self._models.miss(self.ref.model, code)

    def why_not(self) -> tuple[int, TriformError] | None:
        """The canary that the release in force names and that is not served here for a reason, with it."""
        seen = self._node.known(self.ref.model)
        canary = None if seen is None else seen.release.version_of("canary")
        if seen is None or canary is None or canary in self._held:
            return None
        if (refusal := self._refusal(seen)) is not None:
            return canary, by_code(refusal.code)(refusal.error)
        return (canary, self._failed[2]) if self._failed is not None and self._failed[0] == seen.release else None

    def _is_news(self, release: Release) -> bool:
        """Whether it is later than what is served: a replica that has just started may be ahead of its node."""
        if self._failed is not None and self._failed[0] == release and self._node.clock() - self._failed[1] < AGAIN_SECONDS:
            return False
        return self.release is None or _order(release) > _order(self.release)

    def _raise_if_refused(self, release: Release) -> None:
        seen = self._node.known(self.ref.model)
        if seen is not None and seen.release == release and (refusal := self._refusal(seen)) is not None:
            raise by_code(refusal.code)(refusal.error)

    def _refusal(self, seen: Seen) -> Refusal | None:
        """What is refused and would be loaded here."""
        refusal = seen.refusal
        return None if refusal is None or self._is_isolated(seen.release, refusal.version) else refusal

    def _is_isolated(self, release: Release, version: int) -> bool:
        """Whether other processes run this version of the release."""
        return self._isolated is not None and self.ref.alias is None and version == release.version_of("canary")

    def _take(self, release: Release) -> None:
        """Raises what keeps it from being served, having told so; then nothing has changed."""
        version, held = None, {}
        try:
            aliases = self._aliases(release)
            for version in sorted(set(aliases.values())):
                held[version] = self._open(release, version)
        except TriformError as error:
            tell(self._models, self.ref.model, release, version, error)
            if version is None or not self._is_isolated(release, version) or isinstance(error, StoreError):
                raise
            self._take(msgspec.structs.replace(release, canary=None))  # of which not even the manifest can be read
            self.release = release
            return
        shares = self.ref.alias is None and not self._canary_only
        self._models.replace(self.ref.model, held, aliases, release if shares else None)
        self._held, self.release = held, release

    def _open(self, release: Release, version: int) -> Predictor | Elsewhere:
        """The version as it is to be held: as it is held already, else anew. A canary that becomes stable is loaded."""
        had = self._held.get(version)
        if self._isolated is not None and self._is_isolated(release, version):
            return had if isinstance(had, Elsewhere) else self._isolated(self.ref.model, version)
        return had if isinstance(had, Predictor) else self._load(self.ref.model, version)

    def _aliases(self, release: Release) -> dict[str, int]:
        """What each alias means, stable first. A reference to an alias serves that version, as stable."""
        if self._canary_only:
            return {alias: version for alias, version in release.aliases().items() if alias == "canary"}
        if self.ref.alias is None:
            return release.aliases()
        version = release.version_of(self.ref.alias) if release.revision else None
        if version is None:
            raise AliasNotFound(f"revision {release.revision} of '{self.ref.model}' has no {self.ref.alias}")
        return {"stable": version}


def tell(models: Models, model: str, release: Release | None, version: int | None, error: TriformError) -> None:
    """A log line and a metric for a version that cannot be served, or (None) a release that cannot be looked for."""
    variant = release.named().get(version or 0, "stable") if release else "stable"
    told = {"model": model, "version": version, "revision": release.revision if release else None, "code": error.code}
    log.warning("a release is not taken up: %s", error, extra=told, exc_info=error)
    models.telemetry.loaded(LoadRecord(form=models.form, model=model, version=version, variant=variant, code=error.code))


def _order(release: Release) -> tuple[int, int]:
    return release.revision, 0 if release.revision else release.stable
