"""Rollouts judged where they happen: replicas report what they counted, one controller of the application goes on or back.

    each replica: Splits.collect -> Report ──► Controller: reports of one moment -> one Window -> RolloutLog.look -> a revision
    each replica, each node: live.py <────────────────────────────── the release log <──────────────────────────────────┘

The controller is an actor that replicas start when they have something to report, under a name of which there is one. It knows
nothing that is not in the log: killed at any moment, the next one goes on from there, and what was lost are the windows that were
being gathered. A window that some replica did not report speaks against a canary, but not for it. Windows end at the same moments
on all nodes, as far as their clocks agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import msgspec
import ray
from ray import serve

from ray_apps.logs import log_as_json
from triform.audit import Action, Bounded, open_audit
from triform.errors import StoreError, TriformError
from triform.models import Models
from triform.rollout.machine import ENDED, in_force
from triform.rollout.windows import Window, joined, merge
from triform.rollout_log import HEARTBEAT_SECONDS, Rollout, RolloutLog, new_nonce
from triform.settings import Settings

log = logging.getLogger(__name__)

NAMESPACE: Final = "triform"
DEPLOYMENT: Final = "predict"  # whose replicas report
SERVING: Final = ("RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")  # states of replicas that answer callers
GLANCE_SECONDS: Final = 0.1  # between two looks at whether a breaker has opened, or a window is whole
LATE: Final = 1.0  # windows that a report may be late
AGAIN_SECONDS: Final = 5.0  # until what could not be judged is tried again
COARSE: Final = 1 / 200  # of a rollout's age, that its windows last at least: so there are hundreds of them, not thousands
ALONE_SECONDS: Final = 60.0  # that the canary's requests wait for such of stable's as they can be compared with
MOST_KEPT: Final = 100  # windows of a model, while its repository cannot be reached
TOLD_SECONDS: Final = 30.0  # that a controller may take to be told: its process may be about to start
STATUS_SECONDS: Final = 10.0  # that Serve may take to say how many replicas there are

Edges = Mapping[str, tuple[float, ...]]  # of the bins of scores, by model


class Report(NamedTuple):
    """What a replica has counted of a model under one revision. `slot`: the number of the window, the same everywhere."""

    replica: str
    model: str
    slot: int
    revision: int
    cut_off: str | None
    window: Window


class Reporter:
    """Belongs to the event loop that answers requests. `every`: seconds of a window."""

    def __init__(self, models: Models, settings: Settings, every: float) -> None:
        context = serve.get_replica_context()
        self._models = models
        self._every = every
        self._replica = context.replica_tag
        self._start_controller = lambda: start_controller(context.app_name, settings, every)
        self._controller: Any = None
        self._edges: Edges = {}
        self._told: set[tuple[str, int]] = set()  # breakers that the controller knows of
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        slot = int(time.time() / self._every)
        while True:
            await asyncio.sleep(min(GLANCE_SECONDS, self._every / 5))
            now, cut = int(time.time() / self._every), self._models.splits.cuts()
            if now == slot and not cut - self._told:
                continue
            try:
                if not (reports := self._reports(slot)) or await self._send(reports):
                    self._told = cut
                else:
                    await asyncio.sleep(1.0)
            except Exception:
                log.exception("reporting what was counted failed")
                await asyncio.sleep(1.0)
            slot = now

    def _reports(self, slot: int) -> list[Report]:
        splits = self._models.splits
        collected = [(model, splits.collect(model, edges=self._edges.get(model))) for model in splits.names()]
        return [Report(self._replica, model, slot, *found) for model, found in collected if found is not None]

    async def _send(self, reports: list[Report]) -> bool:
        """Whether they are told. What is not is lost, and its window not whole. A controller that is slow, or starts again, is
        kept: who lets go of its handle may end it."""
        try:
            if self._controller is None:
                self._controller = await asyncio.to_thread(self._start_controller)
            self._edges = await asyncio.wait_for(self._controller.report.remote(reports), max(TOLD_SECONDS, self._every))
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError | TimeoutError):
                self._controller = None
            log.warning("a window of %s is lost, its controller cannot be told: %r", reports[0].model, error)
            return False
        return True


def start_controller(application: str, settings: Settings, every: float) -> Any:
    """The application's controller, which is started if there is none."""
    options = {"name": f"rollouts of {application}", "namespace": NAMESPACE, "get_if_exists": True}
    actor = ray.remote(Controller).options(**options, num_cpus=0, max_restarts=-1, max_concurrency=1000)
    return actor.remote(application, settings, every)


class Controller:
    """The actor. `application`: of Serve, whose replicas report; `every`: seconds of a window."""

    def __init__(self, application: str, settings: Settings, every: float) -> None:
        log_as_json()
        self._application = application
        self._every = every
        self._judges = Judges(settings)
        self._gathering: dict[str, Gathering] = {}
        self._edges: Edges = {}
        self._again: dict[str, float] = {}  # when to try again what could not be judged, by `time.monotonic()`
        self._judged: dict[str, float] = {}  # when each model was, by the same
        self._task: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="triform-status")  # Serve may not answer, for as long as it likes
        self._asked: asyncio.Future[int | None] | None = None

    async def report(self, reports: list[Report]) -> Edges:
        """What replicas are to know of each model's policy."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        for report in reports:
            self._gathering.setdefault(report.model, Gathering()).add(report)
        self._told.set()
        return self._edges

    async def _run(self) -> None:
        """Where nothing is being gathered it waits for a report, a heartbeat at most: where another release has ended a rollout
        nobody reports of it."""
        while True:
            await asyncio.sleep(min(GLANCE_SECONDS, self._every / 5))
            if not self._again and all(gathering.is_empty for gathering in self._gathering.values()):
                await self._wait()
            quiet = time.monotonic() - HEARTBEAT_SECONDS
            self._again |= {m: 0.0 for m in self._judges.under_way() if self._judged[m] < quiet and m not in self._again}
            for model, gathering in [*self._gathering.items()]:
                due = model in self._again or gathering.due(time.time() / self._every)
                if due and time.monotonic() >= self._again.get(model, 0.0):
                    await self._look(model, gathering)

    async def _wait(self) -> None:
        self._told.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), HEARTBEAT_SECONDS)

    async def _look(self, model: str, gathering: Gathering) -> None:
        """What goes wrong is told, and tried again: other models do not wait for it."""
        seen = None
        try:
            expected = None if gathering.cut is not None else await self._expected()
            gathering.close(time.time() / self._every, expected)
            seen = gathering.take()
            if seen.windows or seen.cut or model in self._again:
                self._judged[model] = time.monotonic()
                self._edges = {**self._edges, **await asyncio.to_thread(self._judges.look, model, seen)}
            self._again.pop(model, None)
        except Exception as error:
            if seen is not None:
                gathering.put_back(seen)
            self._again[model] = time.monotonic() + AGAIN_SECONDS
            log.warning("the rollout of %s waits: %s", model, error, exc_info=not isinstance(error, TriformError))

    async def _expected(self) -> int | None:
        """How many replicas should report; None where Serve does not say."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().run_in_executor(self._asking, _replicas, self._application)
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked), STATUS_SECONDS)
        except Exception as error:  # noqa: BLE001 - Ray's own, of whatever kind
            log.warning("Serve does not say how many replicas there are: %r", error)
            return None


class Seen(NamedTuple):
    """Of one model: windows, each with the revision that was in force, and the breaker that has opened, with its own."""

    windows: list[tuple[int, Window]]
    cut: tuple[int, str] | None


class Unsure(NamedTuple):
    """Of a rollout: what is on its way to its log. `nonce`: by which it is known there."""

    rollout: int
    windows: list[Window]
    cut: str | None
    nonce: str


class Gathering:
    """The reports of one model, until their windows are whole. Belongs to the event loop. `cut`: a breaker that has opened."""

    def __init__(self) -> None:
        self.cut: tuple[int, str] | None = None
        self._closed: list[tuple[int, Window]] = []
        self._open: dict[tuple[int, int], list[Report]] = {}  # by slot and revision

    def add(self, report: Report) -> None:
        if report.cut_off is not None:
            self.cut = (report.revision, report.cut_off)
        self._open.setdefault((report.slot, report.revision), []).append(report)
        if len(self._open) > MOST_KEPT:
            del self._open[min(self._open)]

    @property
    def is_empty(self) -> bool:
        return not (self._open or self._closed or self.cut)

    def due(self, now: float) -> bool:
        """Whether there may be something to close; `now`: in slots."""
        return bool(self._closed) or self.cut is not None or any(slot < int(now) for slot, _ in self._open)

    def close(self, now: float, expected: int | None) -> None:
        """Closes the windows that `expected` replicas have reported, those that wait for no more, and all where a breaker has
        opened. None: nobody knows how many there are, and no window is whole."""
        for slot, revision in sorted(self._open):
            reports = self._open[slot, revision]
            reported = len({report.replica for report in reports})
            whole = expected is not None and reported >= expected
            if self.cut is not None or (slot < int(now) and (whole or now - slot > 1.0 + LATE)):
                del self._open[slot, revision]
                window = merge(alike([report.window for report in reports]))
                wanted = reported + 1 if expected is None else expected
                self._closed.append((revision, msgspec.structs.replace(window, reported=reported, expected=wanted)))

    def take(self) -> Seen:
        """What was closed, which is somebody else's then."""
        taken = Seen(self._closed, self.cut)
        self._closed, self.cut = [], None
        return taken

    def put_back(self, seen: Seen) -> None:
        """What could not be judged: the latest of it, if it is much."""
        self._closed = [*seen.windows, *self._closed][-MOST_KEPT:]
        self.cut = self.cut or seen.cut


def alike(windows: list[Window]) -> list[Window]:
    """The same, without the scores of those that have other bins than most: a replica may not know of the policy's yet."""
    most = Counter(len(w.stable.scores or w.canary.scores) for w in windows).most_common(1)[0][0]
    bare = msgspec.structs.replace
    return [
        w
        if all(len(arm.scores) in (0, most) for arm in (w.stable, w.canary))
        else bare(w, stable=bare(w.stable, scores=()), canary=bare(w.canary, scores=()))
        for w in windows
    ]


class Judges:
    """The rollouts of a repository's models, each read once and then followed. One thread at a time may use it."""

    def __init__(self, settings: Settings) -> None:
        self._repository = settings.open_repository()
        self._audit = Bounded(open_audit(settings.audit))
        self._rollouts: dict[str, Rollout] = {}
        self._waiting: dict[str, tuple[int, Window]] = {}  # with their revision: windows that are to become longer
        self._unsure: dict[str, Unsure] = {}  # what may be on record, or not: the store did not say

    def under_way(self) -> list[str]:
        """The models whose rollouts had not ended at the latest look."""
        return [model for model, rollout in self._rollouts.items() if not rollout.ended]

    def look(self, model: str, seen: Seen) -> Edges:
        """Judges what was seen; what replicas are to know of the model's policy. Raises `TriformError`; the windows that
        `seen` still has then are to be shown again."""
        rollouts = RolloutLog(self._repository, model)
        rollout = rollouts.latest(self._rollouts.get(model))
        if rollout is None:
            return {}
        self._rollouts[model] = rollout
        self._make_sure(rollouts, rollout)
        release = rollout.release = rollouts.releases.in_force(rollout.release)
        step = in_force(rollout.policy, rollout.state, release)
        now = release.revision if step is not None else None
        cut = seen.cut[1] if seen.cut is not None and seen.cut[0] == now else None
        waiting = self._waiting.get(model)
        ready, left = coarser(
            [window for revision, window in [*([waiting] if waiting else []), *seen.windows] if revision == now],
            *((0.0, 0.0) if cut else (COARSE * (time.time() - rollout.began), ALONE_SECONDS)),
        )
        quiet = time.time() - (rollout.state.at or 0.0) >= HEARTBEAT_SECONDS
        if ready or cut or left is None or quiet:
            windows = [msgspec.structs.replace(window, step=step) for window in ready if step is not None]
            self._unsure[model] = Unsure(rollout.number, windows, cut, new_nonce())
        self._waiting.pop(model, None)
        if left is not None and now is not None:
            self._waiting[model] = now, left
        seen.windows.clear()
        self._make_sure(rollouts, rollout)
        shift = rollout.policy.guards.score_shift
        return {} if shift is None else {model: shift.edges}

    def _make_sure(self, rollouts: RolloutLog, rollout: Rollout) -> None:
        """That what was seen is on record, once. Raises `TriformError`: then the next look tries."""
        unsure = self._unsure.get(rollout.model)
        if unsure is not None and unsure.rollout == rollout.number:
            before = rollout.state.phase
            rollouts.look(rollout, windows=unsure.windows, cut=unsure.cut, nonce=unsure.nonce)
            self._record(rollout, unsure.nonce)
            _tell(rollout, before)
        self._unsure.pop(rollout.model, None)

    def _record(self, rollout: Rollout, nonce: str) -> None:
        """In the audit log: what the look of that nonce decided, if it did. Rollouts do not wait for a log that is full or
        hangs."""
        number = next((n for n, entry in enumerate(rollout.entries) if entry.nonce == nonce), 0)
        before, now = rollout.entries[number - 1].state, rollout.entries[number].state
        if number and (before.phase, before.step) != (now.phase, now.step):
            what = "rollout.step" if now.phase == "running" else f"rollout.{now.phase}"
            by, note = rollout.entries[number].by, f"version {now.canary}, {now.reason}"
            action = Action(who=by, what=what, target=rollout.model, where="controller", note=note)
            try:
                self._audit.append(action)
            except StoreError as error:
                log.warning("rollout %d of %s, %s: %s", rollout.number, rollout.model, what, error)


def coarser(windows: Sequence[Window], seconds: float, alone: float) -> tuple[list[Window], Window | None]:
    """Neighbours put together until they last so long, complete ones with complete ones; and what is left, too short yet.

    Where stable had no request there is nothing to compare the canary's with: such a window waits for stable's, until it lasts
    `alone` seconds.
    """
    ready: list[Window] = []
    left: Window | None = None
    for window in windows:
        if left is not None and left.complete != window.complete:
            ready.append(left)
            left = None
        left = window if left is None else joined(*alike([left, window]))
        lonely = left.canary.requests > 0 and left.stable.requests == 0
        if left.seconds >= (max(seconds, alone) if lonely else seconds):
            ready.append(left)
            left = None
    return ready, left


def _tell(rollout: Rollout, before: str) -> None:
    state = rollout.state
    if state.phase in ENDED and before not in ENDED:
        told = {"model": rollout.model, "version": state.canary, "rollout": rollout.number}
        log.warning("rollout %d of %s is over: %s: %s", rollout.number, rollout.model, state.phase, state.reason, extra=told)


def _replicas(application: str) -> int | None:
    """How many should report; None where nobody knows of any."""
    found = serve.status().applications.get(application)
    deployment = found.deployments.get(DEPLOYMENT) if found is not None else None
    states = deployment.replica_states if deployment is not None else {}
    return sum(int(states.get(state, 0)) for state in SERVING) or None
