"""The splits of a host, by model: between stable and a canary, or beside a shadow. One for each release that asks for one.

Models.replace: a release -> Splits.share -> canary.py: Split ──► live, which a request looks its model up in
a breaker, a dead session -> cut: not live any more ──► collect: what was counted, for whoever judges
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from triform.canary import Split, shares_keys
from triform.releases import Release
from triform.telemetry import Form, SplitRecord, Telemetry

if TYPE_CHECKING:  # models.py has the splits
    from triform.models import Served
    from triform.rollout.windows import Window

log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """A window of the revision that was in force; `cut_off`: why the canary gets no more keys, if it does not."""

    revision: int
    cut_off: str | None
    window: Window


class Splits:
    """The splits of a host, by model: `live` has those of canaries that get keys, and of shadows. Thread-safe."""

    def __init__(self, form: Form, telemetry: Telemetry) -> None:
        self.live: Mapping[str, Split] = {}  # replaced whole, never changed: who reads takes no lock
        self._all: dict[str, Split] = {}  # those that were cut off, too
        self._edges: dict[str, Sequence[float]] = {}  # of the bins of scores, as they were last asked for
        self._form = form
        self._telemetry = telemetry
        self._sharing = threading.Lock()

    def share(self, model: str, release: Release | None, load: Callable[[int], Served]) -> None:
        """Shares the model's keys anew as the release says; None, or one without a canary: stable has them all. A shadow is asked
        where no canary has keys: both would be counted on one side."""
        with self._sharing:
            before = self._all.pop(model, None)
            others = {name: split for name, split in self.live.items() if name != model}
            if release is not None and (shares_keys(release) or self._has_shadow(release)):
                split = Split(release, load, partial(self._cut, model), self._edges.get(model))
                others[model] = self._all[model] = split
            if release is not None and release.canary is not None and shares_keys(release):
                self._tell(model, others[model], release.canary.weight)
            elif before is not None and before.shadow is None:
                self._tell(model, before, 0.0, stable=release.stable if release is not None else None)
            if before is not None and before.shadow is not None:
                before.shadow.over = True
            self.live = others

    def _has_shadow(self, release: Release) -> bool:
        """Lambda does nothing after an answer: there a shadow is loaded, and not asked."""
        shadow = release.shadow
        return self._form == "serve" and shadow is not None and shadow.sample > 0 and shadow.version != release.stable

    def end(self) -> None:
        """The host is about to end: nothing more is asked of shadows."""
        for split in [*self._all.values()]:
            if split.shadow is not None:
                split.shadow.over = True

    def names(self) -> list[str]:
        """The models that have something to collect."""
        return list(self._all)

    def cuts(self) -> set[tuple[str, int]]:
        """The models whose canary gets no more keys here, with the revision that it has no more keys of."""
        return {(model, split.release.revision) for model, split in [*self._all.items()] if split.cut_off is not None}

    def collect(self, model: str, step: int = 0, edges: Sequence[float] | None = None) -> Collected | None:
        """What has been counted of a model's split since it was last collected; None where it has none. `step`: of the window;
        `edges`: of the bins of its scores from then on. On the event loop that answers requests."""
        split = self._all.get(model)
        if edges is not None:
            self._edges[model] = edges
        return Collected(split.release.revision, split.cut_off, split.tally.take(step, edges)) if split is not None else None

    def covers(self, model: str, version: int, why: str) -> bool:
        """Whether stable can answer what this version would, as it is a canary or shadow: then it does from now on, because of
        `why`."""
        split = self._all.get(model)
        if split is None or split.traffic.canary != version:
            return False
        split.cut(why)
        return True

    def _cut(self, model: str, split: Split, why: str) -> None:
        with self._sharing:
            if self.live.get(model) is not split:
                return
            self.live = {name: other for name, other in self.live.items() if name != model}
        told = {"model": model, "version": split.traffic.canary, "revision": split.release.revision}
        if split.shadow is not None:
            split.shadow.over = True
            log.warning("the shadow %s/%d is not asked any more here: %s", model, split.traffic.canary, why, extra=told)
            return
        log.warning("the canary %s/%d gets no more keys here: %s", model, split.traffic.canary, why, extra=told)
        self._tell(model, split, 0.0, cut=True)

    def _tell(self, model: str, split: Split, weight: float, *, stable: int | None = None, cut: bool = False) -> None:
        versions = {"stable": stable or split.traffic.stable, "canary": split.traffic.canary}
        self._telemetry.shared(SplitRecord(form=self._form, model=model, weight=weight, cut=cut, **versions))
