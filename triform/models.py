"""The models that a host serves: their versions, what aliases mean, and who is loaded.

A host fills `Models` (packages of a layer, an image, a repository); a model that is not loaded yet is loaded by the first request
that wants it. Versions come and go while requests are answered: what is read is replaced whole, so that who reads takes no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from triform.errors import AliasNotFound, InvalidRequest, ModelNotFound, NotReady, VersionNotFound
from triform.features import Features
from triform.package import Manifest
from triform.predictor import Predictor
from triform.releases import Release
from triform.signature import Signature
from triform.splits import Splits
from triform.telemetry import FREED, Form, LoadRecord, Silent, Telemetry


class Elsewhere:
    """A version that another process runs: what it takes to read requests for it, and to write its answers.

    `ready`: whether it is known to answer there.
    """

    provider = ""  # is known there

    def __init__(self, manifest: Manifest, ready: Callable[[], bool]) -> None:
        self.manifest = manifest
        self.ready = ready

    @property
    def signature(self) -> Signature:
        return self.manifest.signature


class Served(NamedTuple):
    """A version, ready to answer. `key`: a column that records may have beside the model's own (splitting.py)."""

    loaded: Predictor | Elsewhere
    features: Features
    variant: str = "stable"
    key: str | None = None

    @property
    def manifest(self) -> Manifest:
        return self.loaded.manifest

    @property
    def signature(self) -> Signature:
        return self.features.signature

    @property
    def elsewhere(self) -> bool:
        """Whether another process runs it."""
        return isinstance(self.loaded, Elsewhere)

    @property
    def predictor(self) -> Predictor:
        """That runs it, in this process."""
        assert isinstance(self.loaded, Predictor), f"{self.manifest.ref} runs elsewhere"  # noqa: S101 - a fault of ours
        return self.loaded


class _Slot:
    """One version: loaded once, by whoever wants it first. A load that fails is tried again by the next.

    `served`: what was loaded.
    """

    def __init__(self, load: Callable[[], Predictor | Elsewhere], variant: str, loaded: Callable[[Served], None]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._loaded = loaded
        self._failed = False
        self.variant = variant
        self.served: Served | None = None

    @property
    def ready(self) -> bool:
        """Whether a request can be expected to be answered; not so after a load that failed."""
        at = None if self.served is None else self.served.loaded
        return at.ready() if isinstance(at, Elsewhere) else not self._failed

    def get(self) -> Served:
        if self.served is not None:
            return self.served
        with self._lock:
            if self.served is None:
                self.served = self._open()
        return self.served

    def _open(self) -> Served:
        try:
            loaded = self._load()
            config = loaded.manifest.config
            served = Served(loaded, Features(loaded.signature, config), self.variant, config.key.column)
        except BaseException:
            self._failed = True
            raise
        self._failed = False
        self._loaded(served)
        return served


class _Versions(NamedTuple):
    """Of one model. Replaced whole, never changed: who reads takes no lock."""

    slots: Mapping[int, _Slot] = {}
    aliases: Mapping[str, int] = {}


class Models:
    """Versions by model, and what their aliases mean. Thread-safe: a version may be added while requests are answered.

    `default`: the model of requests that name none; without it the only one. `leaving`: set where the host is about to end: it
    is not ready any more, so that no new callers come, and answers those who do. `splits`: between a
    model's stable version and its canary.
    """

    def __init__(self, *, form: Form, default: str | None = None, telemetry: Telemetry | None = None) -> None:
        self.form = form
        self.default = default
        self.leaving = False
        self.telemetry = telemetry or Silent()
        self._adding = threading.Lock()
        self._models: Mapping[str, _Versions] = {}
        self.missing: Mapping[str, str] = {}  # models that are to be served and cannot be: the code of the error
        self.splits = Splits(form, self.telemetry)

    def add(
        self, model: str, version: int, load: Callable[[], Predictor], *, aliases: tuple[str, ...] = ("stable",), now: bool = True
    ) -> None:
        """Adds a version; `load` opens it, at once or (`now=False`) for its first request. Raises what `load` raises."""
        slot = _Slot(load, aliases[0] if aliases else "stable", self._told)
        if now:
            slot.get()
        with self._adding:
            before = self._models.get(model, _Versions())
            after = _Versions({**before.slots, version: slot}, {**before.aliases, **dict.fromkeys(aliases, version)})
            self._models = {**self._models, model: after}

    def replace(
        self,
        model: str,
        loaded: Mapping[int, Predictor | Elsewhere],
        aliases: Mapping[str, int],
        release: Release | None = None,
    ) -> None:
        """Makes these the model's versions, and what its aliases mean, all at once in place of what it had; none: it is gone.

        Who was given a version keeps it until he is done. The first alias that means a version is its variant. What is new is
        told of before it is served, so that no request waits for that. `release`: that shares the keys between them.
        """
        with self._adding:
            before = self._models.get(model, _Versions()).slots
            slots = {version: self._slot_of(held, version, aliases, before) for version, held in loaded.items()}
            for slot in slots.values():
                slot.get()
            others = {name: versions for name, versions in self._models.items() if name != model}
            self._models = {**others, model: _Versions(slots, dict(aliases))} if slots else others
            self.missing = {name: code for name, code in self.missing.items() if name not in self._models}
            self.splits.share(model, release if slots else None, lambda version: slots[version].get())
        here = {(version, slot.variant) for version, slot in slots.items()}
        for version, slot in before.items():
            if slot.served is not None and (version, slot.variant) not in here:
                self._told(slot.served, code=FREED)

    def miss(self, model: str, code: str) -> None:
        """The model is to be served and cannot be, says the code of an error. It is not ready, until it has a version."""
        with self._adding:
            if model not in self._models:
                self.missing = {**self.missing, model: code}

    def share(self, model: str, release: Release | None) -> None:
        """Shares the model's keys as the release says, whose versions are here; None: stable has them all."""
        slots = self._models[model].slots
        self.splits.share(model, release, lambda version: slots[version].get())

    def _slot_of(
        self, held: Predictor | Elsewhere, version: int, aliases: Mapping[str, int], before: Mapping[int, _Slot]
    ) -> _Slot:
        """That which holds it as this variant already, else a new one."""
        variant = next((alias for alias, meant in aliases.items() if meant == version), "stable")
        had = before.get(version)
        if had is not None and had.variant == variant and had.served is not None and had.served.loaded is held:
            return had
        return _Slot(lambda: held, variant, self._told)

    def _told(self, served: Served, code: str = "ok") -> None:
        """Of every load once, and of the end of what no other took the place of; what runs elsewhere is told of there."""
        if served.elsewhere:
            return
        predictor = served.predictor
        load = LoadRecord.of(
            predictor.manifest, predictor.provider, predictor.load_seconds, form=self.form, variant=served.variant, code=code
        )
        self.telemetry.loaded(load)

    def predictors(self) -> list[Predictor]:
        """All that are loaded here."""
        return [held for held in self._held() if isinstance(held, Predictor)]

    def elsewhere(self) -> list[Elsewhere]:
        """All that other processes run for this one."""
        return [held for held in self._held() if isinstance(held, Elsewhere)]

    def _held(self) -> list[Predictor | Elsewhere]:
        slots = (slot for versions in self._models.values() for slot in versions.slots.values())
        return [slot.served.loaded for slot in slots if slot.served is not None]

    def is_beside(self, model: str, version: int) -> bool:
        """Whether it is here beside another version that is stable."""
        found = self._models.get(model)
        return found is not None and found.aliases.get("stable", version) != version

    def names(self) -> list[str]:
        return sorted(self._models)

    def versions(self, model: str) -> list[int]:
        """The versions at hand, rising. Raises `ModelNotFound`, `NotReady` where there is none and should be."""
        return sorted(self._versions(model).slots)

    def states(self, model: str, *, version: int | None = None, alias: str | None = None) -> dict[int, bool]:
        """Whether each version at hand, or the one that was asked for, is ready; all of one moment. Raises as `get`."""
        if version is not None or alias is not None:
            number, slot = self._find(model, version, alias)
            return {number: slot.ready}
        return {number: slot.ready for number, slot in sorted(self._versions(model).slots.items())}

    def get(self, model: str, *, version: int | None = None, alias: str | None = None) -> Served:
        """The version that was asked for, loaded if it must be. Raises `ModelNotFound`, `VersionNotFound`, `AliasNotFound`,
        and `NotReady` where the model has no version and should have one."""
        found = self._models.get(model)
        slot = None if found is None or version is not None else found.slots.get(found.aliases.get(alias or "stable", 0))
        if slot is not None and slot.served is not None:  # as nearly always
            return slot.served
        return self._slot(model, version, alias).get()

    def is_ready(self, model: str, version: int | None = None) -> bool:
        """Whether the version can answer: it is loaded, or will be by its first request. Raises `ModelNotFound`,
        `VersionNotFound`."""
        return model not in self.missing and self._slot(model, version, None).ready

    def all_ready(self) -> bool:
        """Whether callers may come: each model's stable version can answer, and will be able to."""
        return not self.leaving and all(self.is_ready(name) for name in self._models)

    def default_name(self) -> str | None:
        """The model of a request that names none, if there is one."""
        return next(iter(self._models)) if self.default is None and len(self._models) == 1 else self.default

    def the_default(self) -> str:
        """The same. Raises `InvalidRequest` where there is none."""
        if (default := self.default_name()) is not None:
            return default
        names = ", ".join(self.names()[:10]) or "none"
        raise InvalidRequest(f"the request names no model and TRIFORM_DEFAULT_MODEL is not set; models here: {names}")

    def _slot(self, model: str, version: int | None, alias: str | None) -> _Slot:
        return self._find(model, version, alias)[1]

    def _find(self, model: str, version: int | None, alias: str | None) -> tuple[int, _Slot]:
        slots, aliases = self._versions(model)
        if version is None and alias is not None and alias not in aliases:
            raise AliasNotFound(f"'{model}' has no alias {alias[:100]!r} here (it has: {', '.join(sorted(aliases)) or 'none'})")
        number = version if version is not None else aliases.get(alias or "stable", max(slots))
        if number not in slots:
            raise VersionNotFound(f"'{model}' has no version {number} here (it has: {', '.join(map(str, sorted(slots)))})")
        return number, slots[number]

    def _versions(self, model: str) -> _Versions:
        if model in self.missing:
            raise NotReady(f"'{model}' is not ready: none of its versions can be served ({self.missing[model]})")
        if model not in self._models:
            raise ModelNotFound(f"no model {model[:100]!r} is served here (there is: {', '.join(self.names()[:10]) or 'none'})")
        return self._models[model]
