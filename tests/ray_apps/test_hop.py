"""The way to an isolated canary and back, without Serve between: what is waited for, for how long, and what is not."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ray_apps.arguments import Arguments
from ray_apps.autoscaling import NEEDED
from ray_apps.canary import Canary, Deployed
from ray_apps.hop import Done, Failed, Hop
from ray_apps.hosting import host
from tests.canaries import Released, build
from tests.gates import within
from tests.ray_apps.hosts import CACHE
from triform.errors import DeadlineExceeded, DigestMismatch, NotReady, RunFailed, TriformError, Unavailable
from triform.http import HttpRequest, HttpSurface
from triform.models import Models, Served
from triform.repository import open_repository
from triform.service import Ran, run_here
from triform.signature import Array
from triform.telemetry import Silent
from triform.testing import RecordingTelemetry

MOST = 3  # requests that may be on their way


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Not to be changed."""
    return build(tmp_path_factory.mktemp("hop"))


@pytest.fixture
def own(released: Released, tmp_path: Path) -> Released:
    """The same, to be changed."""
    root = Path(shutil.copytree(released.root, tmp_path / "models"))
    return Released(open_repository(root), root)


def arguments_of(released: Released) -> Arguments:
    given = {"repository": str(released.root), "models": ["lookup"], "allow_anonymous": True, "poll_s": 0.05}
    return Arguments.of({**given, "canary": {"timeout_s": 30}})


class Line:
    """`hop.Replicas`: one replica, a real one in this process, and what happens on the way to it."""

    def __init__(self, canary: Canary) -> None:
        self.canary = canary
        self.broken = False
        self.hangs = False
        self.asked: list[str] = []
        self.seconds: list[float] = []

    async def run(self, model: str, version: int, inputs: Mapping[str, Array], seconds: float) -> Done | Failed:
        self.asked.append("run")
        self.seconds.append(seconds)
        if self.broken:
            raise Unavailable("it died")
        if self.hangs:
            await asyncio.sleep(60)
        return await self.canary.run(model, version, inputs, seconds)

    async def look(self) -> dict[str, Failed | None]:
        self.asked.append("look")
        if self.broken:
            raise Unavailable("it died")
        if self.hangs:
            await asyncio.sleep(60)
        return await self.canary.look()


async def started(released: Released) -> Line:
    arguments = arguments_of(released).isolated()
    assert arguments is not None
    canary = Canary.__new__(Canary)
    await canary.__init__(arguments, arguments.settings_of_models({"TRIFORM_CACHE": CACHE}))  # type: ignore[misc]  # as Serve does
    return Line(canary)


def answering(released: Released, hop: Hop) -> HttpSurface:
    arguments = arguments_of(released)
    return host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE}), Silent(), hop).surface


def numbers(*given: int) -> dict[str, Array]:
    return {"x": np.array(given)}


async def run(hop: Hop, served: Served, *given: int, deadline: float | None = None) -> Ran:
    return await hop.beside(run_here)(served, numbers(*given), deadline)


def scenario(released: Released, test: Callable[[Line, Hop, Models], Any], *, timeout: float = 30.0) -> None:
    async def play() -> None:
        line = await started(released)
        hop = Hop(line, timeout, MOST)
        await test(line, hop, answering(released, hop).service.models)
        await line.canary.hosted.live.end()

    within(play())


def test_a_canary_is_asked_once_it_is_known_to_be_there(released: Released) -> None:
    async def test(line: Line, hop: Hop, models: Models) -> None:
        stable, canary = models.get("lookup"), models.get("lookup", alias="canary")
        assert (stable.elsewhere, canary.elsewhere) == (False, True)
        with pytest.raises(NotReady, match="lookup/2"):
            await run(hop, canary, 5)
        assert models.states("lookup") == {1: True, 2: False}
        await hop.look(models)
        assert models.states("lookup") == {1: True, 2: True}
        ran = await run(hop, canary, 5, 6)
        assert (ran.outputs["y"].tolist(), ran.batch_rows) == ([50.0, 60.0], 2)
        assert ran.hop > 0
        with pytest.raises(RunFailed, match="the model raised"):
            await run(hop, canary, 50)
        assert line.asked == ["look", "run", "run"]
        assert (await run(hop, stable, 5)).outputs["y"].tolist() == [50.0]
        assert line.asked == ["look", "run", "run"], "stable runs here"

    scenario(released, test)


def test_it_has_its_time_and_at_most_half_of_the_requests(released: Released) -> None:
    async def test(line: Line, hop: Hop, models: Models) -> None:
        canary = models.get("lookup", alias="canary")
        await hop.look(models)
        await run(hop, canary, 5)
        await run(hop, canary, 5, deadline=time.monotonic() + 1000)
        await run(hop, canary, 5, deadline=time.monotonic() + 20)
        assert line.seconds[:2] == [30.0, 30.0]
        assert 5 < line.seconds[2] <= 10.0
        line.hangs = True
        deadline = time.monotonic() + 0.2
        with pytest.raises(DeadlineExceeded, match=r"lookup/2 did not answer within the 0\.\d+ s"):
            await run(hop, canary, 5, deadline=deadline)
        line.hangs = False
        line.asked.clear()
        with pytest.raises(NotReady):  # nobody else waits for it
            await run(hop, canary, 5)
        assert line.asked == []
        await hop.look(models)
        await run(hop, canary, 5)

    scenario(released, test)


def test_so_many_requests_may_be_on_their_way(released: Released) -> None:
    """Whatever becomes of them: one that is slow leaves others of the replica's places."""

    async def test(line: Line, hop: Hop, models: Models) -> None:
        canary = models.get("lookup", alias="canary")
        for _ in range(3):
            await hop.look(models)
            line.hangs = True
            waiting = [asyncio.create_task(run(hop, canary, 5, deadline=time.monotonic() + 0.4)) for _ in range(MOST - 1)]
            gone = asyncio.create_task(run(hop, canary, 5))
            await asyncio.sleep(0)
            with pytest.raises(NotReady, match="3 requests are at lookup/2 already"):
                await run(hop, canary, 5)
            gone.cancel()
            assert [type(e) for e in await asyncio.gather(*waiting, return_exceptions=True)] == [DeadlineExceeded] * (MOST - 1)
            line.hangs = False
        await hop.look(models)
        await asyncio.gather(*(run(hop, canary, 5) for _ in range(MOST)))

    scenario(released, test)


def test_a_canary_whose_process_went_away_is_not_waited_for_until_it_is_back(released: Released) -> None:
    async def raised(hop: Hop, canary: Served) -> str:
        with pytest.raises(Unavailable) as failed:
            await run(hop, canary, 5)
        return failed.value.code

    async def test(line: Line, hop: Hop, models: Models) -> None:
        canary = models.get("lookup", alias="canary")
        await hop.look(models)
        line.broken = True
        line.asked.clear()
        assert [await raised(hop, canary) for _ in range(3)] == ["unavailable", "not_ready", "not_ready"]
        assert line.asked == ["run"]
        with pytest.raises(Unavailable):
            await hop.look(models)
        assert not hop.is_ready("lookup/2")
        line.broken = False
        await hop.look(models)
        assert (await run(hop, canary, 5)).outputs["y"].tolist() == [50.0]

    scenario(released, test)


def test_a_canary_that_says_nothing_for_long_is_taken_to_be_gone(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_apps.hop.LOOK_SECONDS", 0.2)

    async def test(line: Line, hop: Hop, models: Models) -> None:
        hop.start(models)
        while not hop.is_ready("lookup/2"):
            await asyncio.sleep(0.01)
        line.hangs = True
        with pytest.raises(DeadlineExceeded):  # and doubted
            await run(hop, models.get("lookup", alias="canary"), 5, deadline=time.monotonic() + 0.1)
        while hop.is_ready("lookup/2"):
            await asyncio.sleep(0.01)
        line.hangs = False
        while not hop.is_ready("lookup/2"):
            await asyncio.sleep(0.01)
        await hop.end()

    scenario(released, test)


def test_of_a_canary_that_is_gone_other_replicas_are_asked_at_once(released: Released) -> None:
    async def test(line: Line, hop: Hop, models: Models) -> None:
        canary = models.get("lookup", alias="canary")
        hop.start(models)
        while not hop.is_ready("lookup/2"):
            await asyncio.sleep(0.01)
        line.broken = True
        with pytest.raises(Unavailable):
            await run(hop, canary, 5)
        line.broken = False
        while not hop.is_ready("lookup/2"):
            await asyncio.sleep(0)
        assert (await run(hop, canary, 5)).outputs["y"].tolist() == [50.0]
        await hop.end()

    scenario(released, test)


def test_a_canary_that_was_refused_fails_with_the_reason(own: Released) -> None:
    file = own.root / "lookup/2/model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")

    async def test(line: Line, hop: Hop, models: Models) -> None:
        await hop.look(models)
        with pytest.raises(DigestMismatch, match="lookup/2"):
            await run(hop, models.get("lookup", alias="canary"), 5)
        assert models.states("lookup") == {1: True, 2: False}

    scenario(own, test)


class Handle:
    """As Serve's, of a deployment that does this when it is called."""

    def __init__(self, called: Callable[[], Awaitable[Any]]) -> None:
        self._called = called

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *_: Any) -> Awaitable[Any]:
        return self._called()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackPressureError(1, 1), "overloaded"),
        (ActorDiedError(), "unavailable"),
        (ActorUnavailableError("gone", None), "unavailable"),
        (DeploymentUnavailableError(DeploymentID("canary")), "unavailable"),
        (asyncio.CancelledError(), "unavailable"),
        (RuntimeError("something of Ray's"), "internal"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ray_raises_is_one_of_our_errors(error: BaseException, code: str) -> None:
    async def fail() -> None:
        raise error

    async def test() -> None:
        with pytest.raises(TriformError) as failed:
            await Deployed(Handle(fail)).look()  # type: ignore[arg-type]
        assert (failed.value.code, failed.value.__cause__) == (code, error)

    within(test())


def test_a_caller_who_goes_away_ends_the_call() -> None:
    async def test() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            began.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        asking = asyncio.create_task(Deployed(Handle(hang)).look())  # type: ignore[arg-type]
        await began.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended.is_set()

    within(test())


def test_while_no_release_has_a_canary_nobody_is_asked_and_none_is_needed(own: Released) -> None:
    own.log("lookup").rollback()

    async def test(line: Line, hop: Hop, models: Models) -> None:
        assert await line.look() == {}
        assert (await line.canary.record_autoscaling_stats())[NEEDED] == 0.0
        line.asked.clear()
        await hop.look(models)
        assert line.asked == []
        await line.canary.check_health()

    scenario(own, test)


def test_a_release_goes_all_the_way(own: Released) -> None:
    """Both processes follow: a canary ends, is forgotten, comes back, and becomes stable in the process that answers."""

    async def play() -> None:
        line = await started(own)
        hop = Hop(line, 30.0, MOST)
        arguments, telemetry = arguments_of(own), RecordingTelemetry()
        hosted = host(arguments, arguments.settings({"TRIFORM_CACHE": CACHE}), telemetry, hop)
        models = hosted.surface.service.models
        hosted.live.start()
        hop.start(models)
        (key,) = own.keys_of(2, "lookup", wanted=1)

        async def until_answered_by(ref: str) -> None:
            while True:
                request = HttpRequest("POST", "/v1/models/lookup:predict", [("x-request-id", key)], b'{"instances": [5]}')
                answer = await hosted.surface.handle_async(request, deadline=time.monotonic() + 30)
                assert answer.status == 200, answer.body
                if answer.headers["x-triform-model"] == ref:
                    return
                await asyncio.sleep(0.02)

        await until_answered_by("lookup/2")
        over = telemetry.records[-1]
        assert (over.variant, over.batch_rows) == ("canary", 1)
        assert {*over.stages} == {"decode", "queue", "hop", "execute", "encode"}
        assert min(over.stages.values()) > 0, "the run's time is its own"
        assert (await line.canary.record_autoscaling_stats())[NEEDED] == 1.0
        log = own.log("lookup")
        log.rollback()
        await until_answered_by("lookup/1")
        while hop.is_ready("lookup/2") or "lookup" in line.canary.hosted.models.names():
            await asyncio.sleep(0.02)
        log.set(stable=2)
        await until_answered_by("lookup/2")
        assert not models.get("lookup").elsewhere
        await hop.end()
        await hosted.drain()
        await line.canary.hosted.live.end()

    within(play())
