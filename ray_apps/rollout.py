"""Rollouts judged where they happen: replicas report what they counted, one controller of the application goes on or back.

    each replica: Splits.collect -> Report ──► Controller: reports of one moment -> one Window -> RolloutLog.look -> a revision
    each replica, each node: live.py <────────────────────────────── the release log <──────────────────────────────────┘

The controller is an actor that replicas start when they have something to report, under a name of which there is one; it ends
itself when they no longer have. It knows nothing that is not in the log: killed at any moment, the next one goes on from there,
and what was lost is the window that was being gathered. A window that some replica did not report speaks against a canary, but
not for it. Windows end at the same moments on all nodes, as far as their clocks agree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec
import ray
from ray import serve

from ray_apps.logs import log_as_json
from triform.errors import TriformError
from triform.models import Models
from triform.rollout.machine import ENDED, holds
from triform.rollout.windows import Window, merge
from triform.rollout_log import Rollout, RolloutLog
from triform.settings import Settings

log = logging.getLogger(__name__)

NAMESPACE: Final = "triform"
DEPLOYMENT: Final = "predict"  # whose replicas report
GLANCE_SECONDS: Final = 0.1  # between two looks at whether a breaker has opened, or a window is whole
LATE: Final = 1.0  # windows that a report may be late
IDLE_SECONDS: Final = 300.0  # without reports, after which a controller ends
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
        self._told: dict[str, str] = {}  # breakers that the controller knows of
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        slot = int(time.time() / self._every)
        while True:
            await asyncio.sleep(min(GLANCE_SECONDS, self._every / 5))
            now = int(time.time() / self._every)
            if now != slot or self._newly_cut():
                reports = self._reports(slot)
                slot = now
                if reports:
                    await self._send(reports)

    def _newly_cut(self) -> bool:
        splits = self._models.splits
        cut = {model: why for model in splits.names() if (why := splits.cut_off(model)) is not None}
        before, self._told = self._told, cut
        return bool(cut.keys() - before.keys())

    def _reports(self, slot: int) -> list[Report]:
        splits = self._models.splits
        collected = [(model, splits.collect(model, edges=self._edges.get(model))) for model in splits.names()]
        return [Report(self._replica, model, slot, *found) for model, found in collected if found is not None]

    async def _send(self, reports: list[Report]) -> None:
        """What cannot be told is lost, and its window not whole. A controller that is slow, or starts again, is kept: who lets go
        of its handle may end it."""
        try:
            if self._controller is None:
                self._controller = await asyncio.to_thread(self._start_controller)
            self._edges = await asyncio.wait_for(self._controller.report.remote(reports), max(TOLD_SECONDS, self._every))
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError | TimeoutError):
                self._controller = None
            log.warning("a window of %s is lost, its controller cannot be told: %r", reports[0].model, error)


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
        self._task: asyncio.Task[None] | None = None
        self._heard = time.monotonic()

    async def report(self, reports: list[Report]) -> Edges:
        """What replicas are to know of each model's policy."""
        self._heard = time.monotonic()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        for report in reports:
            self._gathering.setdefault(report.model, Gathering()).add(report)
        return self._edges

    async def _run(self) -> None:
        while time.monotonic() - self._heard < max(IDLE_SECONDS, 3 * self._every):
            await asyncio.sleep(min(GLANCE_SECONDS, self._every / 5))
            try:
                await self._look()
            except TriformError as error:
                log.warning("a rollout waits: %s", error, extra={"code": error.code})
            except Exception:
                log.exception("looking at a rollout failed")
        ray.actor.exit_actor()

    async def _look(self) -> None:
        due = [model for model, gathering in self._gathering.items() if gathering.due(time.time() / self._every)]
        if not due:
            return
        expected = await asyncio.wait_for(asyncio.to_thread(_replicas, self._application), STATUS_SECONDS)
        for model in due:
            gathering = self._gathering[model]
            gathering.close(time.time() / self._every, expected)
            seen = gathering.take()
            if seen.windows or seen.cut:
                try:
                    self._edges = {**self._edges, **await asyncio.to_thread(self._judges.look, model, seen)}
                except BaseException:
                    gathering.put_back(seen)
                    raise


class Seen(NamedTuple):
    """Of one model: windows, each with the revision that was in force, and the breaker that has opened, with its own."""

    windows: list[tuple[int, Window]]
    cut: tuple[int, str] | None


class Gathering:
    """The reports of one model, until their windows are whole. Belongs to the event loop."""

    def __init__(self) -> None:
        self._closed: list[tuple[int, Window]] = []
        self._cut: tuple[int, str] | None = None
        self._open: dict[tuple[int, int], list[Report]] = {}  # by slot and revision

    def add(self, report: Report) -> None:
        if report.cut_off is not None:
            self._cut = (report.revision, report.cut_off)
        self._open.setdefault((report.slot, report.revision), []).append(report)

    def due(self, now: float) -> bool:
        """Whether there may be something to close; `now`: in slots."""
        return bool(self._closed) or self._cut is not None or any(slot < int(now) for slot, _ in self._open)

    def close(self, now: float, expected: int) -> None:
        """Closes the windows that `expected` replicas have reported, those that wait for no more, and all where a breaker has
        opened. Raises `InvalidInput` for one whose reports do not go together, which is lost."""
        for slot, revision in sorted(self._open):
            reports = self._open[slot, revision]
            reported = len({report.replica for report in reports})
            if self._cut is not None or (slot < int(now) and (reported >= expected or now - slot > 1.0 + LATE)):
                del self._open[slot, revision]
                whole = merge([report.window for report in reports])
                self._closed.append((revision, msgspec.structs.replace(whole, reported=reported, expected=max(expected, 1))))

    def take(self) -> Seen:
        """What was closed, which is somebody else's then."""
        taken = Seen(self._closed, self._cut)
        self._closed, self._cut = [], None
        return taken

    def put_back(self, seen: Seen) -> None:
        """What could not be judged: the latest of it, if it is much."""
        self._closed = [*seen.windows, *self._closed][-MOST_KEPT:]
        self._cut = self._cut or seen.cut


class Judges:
    """The rollouts of a repository's models, each read once and then followed. One thread at a time may use it."""

    def __init__(self, settings: Settings) -> None:
        self._repository = settings.open_repository()
        self._rollouts: dict[str, Rollout] = {}

    def look(self, model: str, seen: Seen) -> Edges:
        """Judges what was seen; what replicas are to know of the model's policy. Raises `TriformError`."""
        rollouts = RolloutLog(self._repository, model)
        rollout = self._rollouts.get(model)
        if rollout is None or rollouts.follow(rollout).ended:
            rollout = rollouts.latest()
        if rollout is None:
            return {}
        self._rollouts[model] = rollout
        release = rollout.release = rollouts.releases.in_force(rollout.release)
        step, now = rollout.state.step, release.revision if holds(rollout.policy, rollout.state, release) else None
        windows = [msgspec.structs.replace(window, step=step) for revision, window in seen.windows if revision == now]
        cut = seen.cut[1] if seen.cut is not None and seen.cut[0] == now else None
        before = rollout.state.phase
        rollouts.look(rollout, windows=windows, cut=cut)
        _tell(rollout, before)
        shift = rollout.policy.guards.score_shift
        return {} if shift is None else {model: shift.edges}


def _tell(rollout: Rollout, before: str) -> None:
    state = rollout.state
    if state.phase in ENDED and before not in ENDED:
        told = {"model": rollout.model, "version": state.canary, "rollout": rollout.number}
        log.warning("rollout %d of %s is over: %s: %s", rollout.number, rollout.model, state.phase, state.reason, extra=told)


def _replicas(application: str) -> int:
    """How many should report."""
    found = serve.status().applications.get(application)
    deployment = found.deployments.get(DEPLOYMENT) if found is not None else None
    return int(deployment.replica_states.get("RUNNING", 0)) if deployment is not None else 0
