"""A shadow: what it is asked, what is counted of it, and that no caller notices."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pytest
from onnx import helper

from tests.canaries import USERS, Released, build, records, take
from triform import shadow, testing
from triform.errors import DeadlineExceeded, RunFailed
from triform.http import HttpRequest, HttpResponse, HttpSurface
from triform.models import Models, Served
from triform.packaging import package_model
from triform.releases import Canary, ReleaseLog, Shadow
from triform.repository import open_repository
from triform.rollout.windows import SHADOW, Window
from triform.service import Execute, InferenceService, Ran, run_here
from triform.shadow import MOST_REQUESTS, rows_apart
from triform.signature import Array
from triform.splits import Collected
from triform.telemetry import Form
from triform.testing import RecordingTelemetry


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Stable 1 and shadow 2, asked everything; `halves`: x -> x, and the shadow's max(x, 0)."""
    folder = tmp_path_factory.mktemp("shadows")
    made = build(folder)
    tensors = [testing.value("x", "FP32", ["N", 2])], [testing.value("y", "FP32", ["N", 2])]
    for operator in "Identity", "Relu":
        file = testing.save(folder / f"{operator}.onnx", [helper.make_node(operator, ["x"], ["y"])], *tensors, {})
        package_model(file, name="halves", repository=made.repository)
    for model in made.repository.models():
        ReleaseLog(made.repository, model).set(stable=1, shadow=Shadow(2, 1.0))
    return made


class Host(NamedTuple):
    surface: HttpSurface
    models: Models
    telemetry: RecordingTelemetry

    def ask(self, model: str, rows: list[Any], choice: str = "", **headers: str) -> Awaitable[HttpResponse]:
        given = [(name.replace("_", "-"), value) for name, value in headers.items()]
        request = HttpRequest("POST", f"/v1/models/{model}{choice}:predict", given, orjson.dumps({"instances": rows}))
        return self.surface.handle_async(request, deadline=time.monotonic() + 30)

    async def settled(self, model: str = "halves") -> None:
        """Nothing waits for the shadow any more."""
        asked = self.models.splits._all[model].shadow
        assert asked is not None
        if asked._task is not None:
            await asked._task

    def window(self, model: str = "halves") -> Window:
        time.sleep(0.001)  # a window has some length
        collected = self.models.splits.collect(model, SHADOW)
        assert isinstance(collected, Collected)
        assert collected.window.fault() is None
        return collected.window

    async def idle_but(self, held: Held) -> None:
        """The shadow is at its first request."""
        while not held.left:
            await asyncio.sleep(0.001)

    def shadows(self) -> list[tuple[str, str]]:
        return [(r.variant, r.code) for r in self.telemetry.records if r.variant != "stable"]


def host(released: Released, execute: Execute = run_here, form: Form = "serve") -> Host:
    telemetry = RecordingTelemetry()
    models = Models(form=form, telemetry=telemetry)
    for model in released.repository.models():
        take(models, released, model)
    return Host(HttpSurface(InferenceService(models, execute)), models, telemetry)


@pytest.fixture
def here(released: Released) -> Host:
    return host(released)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_callers_are_answered_by_stable_and_the_shadow_is_counted(here: Host) -> None:
    async def test() -> None:
        for rows in [[1, 2], [3, 4]], [[1, 1]], [[1, -1], [1, 1], [-1, -1]]:
            answer = await here.ask("halves", rows)
            assert orjson.loads(answer.body)["predictions"] == rows
            assert answer.headers["x-triform-model"] == "halves/1"
        await here.settled()

    run(test)
    window = here.window()
    told = window.shadowed
    assert (told.requests, told.rows, told.disagreed) == (3, 6, 2)
    assert (window.stable.requests, window.canary.requests) == (3, 3)
    assert (window.stable.errors, window.canary.errors) == (0, 0)
    assert window.stable.request_seconds.total == 3
    assert window.canary.request_seconds.total == 0, "nobody waited for it"
    buckets = {bucket: sketch.total for bucket, sketch in window.canary.execute.items()}
    assert buckets == {bucket: sketch.total for bucket, sketch in window.stable.execute.items()} == {0: 1, 1: 1, 2: 1}
    assert sum(window.canary.scores) == sum(window.stable.scores) == told.rows
    assert here.shadows() == [("shadow", "ok")] * 3
    assert here.window().shadowed.rows == 0, "the next window has begun"


def test_rows_of_several_outputs_and_of_named_columns_are_compared(here: Host) -> None:
    async def test() -> None:
        assert (await here.ask("scored", records(USERS))).status == 200
        assert (await here.ask("lookup", [5])).status == 200
        await here.settled("scored")
        await here.settled("lookup")

    run(test)
    assert here.window("scored").shadowed.disagreed == len(USERS)
    agreed = here.window("lookup").shadowed
    assert (agreed.rows, agreed.disagreed) == (1, 0)


def test_what_the_shadow_fails_is_its_error_alone(here: Host, released: Released) -> None:
    """And what stable fails is not asked of it."""

    async def test() -> None:
        assert [(await here.ask("lookup", [x])).status for x in (50, 5, 50, 1000)] == [200, 200, 200, 422]
        assert (await here.ask("lookup", ["text"])).status == 400
        await here.settled("lookup")

    run(test)
    window = here.window("lookup")
    assert (window.stable.requests, window.stable.errors) == (5, 1)
    assert (window.canary.requests, window.canary.errors, window.shadowed.requests) == (3, 2, 1)
    assert [code for _, code in here.shadows()] == ["run_failed", "ok", "run_failed"]
    assert "lookup" in here.models.splits.live, "no breaker: the gate decides"


def test_each_failure_of_the_shadow_counts(released: Released) -> None:
    async def fails(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if served.variant == "shadow":
            raise RunFailed("it fails")
        return await run_here(served, inputs, deadline)

    here = host(released, fails)

    async def test() -> None:
        for user in ["a", "a", "a", "b"]:
            assert (await here.ask("scored", records(["somebody"]), x_user=user)).status == 200
        twice = [("x-user", "a"), ("x-user", "b")]  # refused where it is a key; without a canary it is none
        body = orjson.dumps({"instances": records(["somebody"])})
        assert (await here.surface.handle_async(HttpRequest("POST", "/v1/models/scored:predict", twice, body))).status == 200
        await here.settled("scored")

    run(test)
    assert (here.window("scored").canary.errors, len(here.shadows())) == (5, 5)


def test_a_shadow_that_reads_requests_otherwise_fails_them(tmp_path: Path) -> None:
    repository = open_repository(tmp_path / "models")
    for name in "x", "z":
        tensors = [testing.value(name, "FP32", ["N", 1])], [testing.value("y", "FP32", ["N", 1])]
        file = testing.save(tmp_path / f"{name}.onnx", [helper.make_node("Identity", [name], ["y"])], *tensors, {})
        package_model(file, name="renamed", repository=repository)
    ReleaseLog(repository, "renamed").set(stable=1, shadow=Shadow(2, 1.0))
    here = host(Released(repository, tmp_path / "models"))

    async def test() -> None:
        body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}'
        answer = await here.surface.handle_async(HttpRequest("POST", "/v2/models/renamed/infer", [], body))
        assert answer.status == 200
        await here.settled("renamed")

    run(test)
    assert (here.window("renamed").canary.errors, here.shadows()) == (1, [("shadow", "invalid_input")])


class Held:
    """Runs models; the shadow's runs wait until they may, or for their deadline. `left`: seconds that each was given."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.left: list[float] = []

    async def __call__(self, served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if served.variant == "shadow":
            assert deadline is not None
            self.left.append(deadline - time.monotonic())
            await self.gate.wait()
        return await run_here(served, inputs, deadline)


def test_a_shadow_that_hangs_keeps_nobody_waiting_and_what_is_too_much_is_dropped(released: Released) -> None:
    held = Held()
    here = host(released, held)
    more = 10

    async def test() -> None:
        for _ in range(1 + MOST_REQUESTS + more):
            assert (await here.ask("halves", [[1, -1]])).status == 200
            await here.idle_but(held)
        assert len(held.left) == 1, "one at a time"
        assert here.shadows() == [("shadow", "overloaded")] * more
        held.gate.set()
        await here.settled()

    run(test)
    window = here.window()
    assert (window.stable.requests, window.stable.errors) == (1 + MOST_REQUESTS + more, 0)
    assert (window.canary.requests, window.canary.errors) == (1 + MOST_REQUESTS, 0), "what was dropped is nobody's error"
    assert window.shadowed.disagreed == 1 + MOST_REQUESTS
    assert all(25 < left <= 30 for left in held.left), "its own time, however long it waited"


def test_what_waits_is_bounded_in_bytes(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    here = host(released, held)
    monkeypatch.setattr(shadow, "MOST_BYTES", 10_000)

    async def test() -> None:
        for rows in 1, 500, 500, 2000, 1:
            assert (await here.ask("halves", [[1, 1]] * rows)).status == 200
            await here.idle_but(held)
        held.gate.set()
        await here.settled()

    run(test)
    told = here.window().shadowed
    assert (told.requests, told.rows) == (3, 502)  # of 4,000 bytes in and out; while the first one runs
    assert [code for _, code in here.shadows()].count("overloaded") == 2


def test_a_run_past_its_deadline_is_the_shadows_error(released: Released) -> None:
    async def late(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if served.variant == "shadow":
            raise DeadlineExceeded("the deadline passed before the model had answered")
        return await run_here(served, inputs, deadline)

    here = host(released, late)

    async def test() -> None:
        assert (await here.ask("halves", [[1, 1]])).status == 200
        await here.settled()

    run(test)
    assert (here.window().canary.errors, here.shadows()) == (1, [("shadow", "deadline_exceeded")])


def test_a_shadow_that_breaks_in_python_is_counted_and_told(released: Released, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
        if served.variant == "shadow":
            raise ZeroDivisionError
        return await run_here(served, inputs, deadline)

    here = host(released, broken)

    async def test() -> None:
        for _ in range(2):
            assert (await here.ask("halves", [[1, 1]], x_request_id="r1")).status == 200
        await here.settled()

    run(test)
    assert (here.window().canary.requests, here.shadows()) == (2, [("shadow", "internal")] * 2)
    assert [r.getMessage() for r in caplog.records] == ["request r1: the shadow halves/2: internal"] * 2


def test_a_share_is_sampled(released: Released) -> None:
    log = released.log("halves")
    log.set(stable=1, shadow=Shadow(2, 0.25))
    try:
        here = host(released)
    finally:
        log.set(stable=1, shadow=Shadow(2, 1.0))
    split = here.models.splits.live["halves"]
    assert split.shadow is not None
    split.shadow._chance = random.Random(7).random

    async def test() -> None:
        for _ in range(400):
            await here.ask("halves", [[1, 1]])
            await here.settled()

    run(test)
    window = here.window()
    assert window.stable.requests == 400
    assert 75 < window.canary.requests < 125


def test_who_names_a_version_is_not_shadowed(here: Host) -> None:
    async def test() -> None:
        for choice in "/versions/1", "/labels/stable":
            assert (await here.ask("halves", [[1, 1]], choice)).status == 200
        assert (await here.ask("halves", [[1, -1]], "/labels/shadow")).body == b'{"predictions":[[1.0,0.0]]}'

    run(test)
    window = here.window()
    assert (window.stable.requests, window.canary.requests) == (0, 0)


def test_another_revision_ends_it(released: Released) -> None:
    held = Held()
    here = host(released, held)
    log = released.log("halves")

    async def test() -> None:
        for _ in range(3):
            await here.ask("halves", [[1, 1]])
            await here.idle_but(held)
        before = here.models.splits.live["halves"].shadow
        assert before is not None
        log.set(stable=1, canary=Canary(2, 0.5))
        take(here.models, released, "halves")
        held.gate.set()
        assert before._task is not None
        await before._task
        assert len(held.left) == 1, "what waited is not asked"
        await here.ask("halves", [[1, 1]])

    try:
        run(test)
        window = here.window()
        assert (window.shadowed.requests, window.stable.requests + window.canary.requests) == (0, 1)
        assert [(s.weight, s.cut) for s in here.telemetry.splits if s.model == "halves"] == [(0.5, False)]
        log.set(stable=1, canary=Canary(2, 0.5), shadow=Shadow(2, 1.0))
        take(here.models, released, "halves")
        assert here.models.splits.live["halves"].shadow is None, "both would be one side"
    finally:
        log.set(stable=1, shadow=Shadow(2, 1.0))
    take(here.models, released, "halves")
    assert [(s.weight, s.cut) for s in here.telemetry.splits if s.model == "halves"][-1] == (0.0, False)


def test_a_host_that_ends_waits_for_no_shadow(released: Released) -> None:
    held = Held()
    here = host(released, held)

    async def test() -> None:
        for _ in range(3):
            await here.ask("halves", [[1, 1]])
            await here.idle_but(held)
        here.models.splits.end()
        held.gate.set()
        await here.settled()
        assert (await here.ask("halves", [[1, 1]])).status == 200

    run(test)
    assert (len(held.left), here.window().stable.requests) == (1, 4)


def test_a_dead_shadow_is_let_be(here: Host, caplog: pytest.LogCaptureFixture) -> None:
    """As of a canary, a replica's look at itself finds it (ray_apps/health.py)."""
    assert not here.models.splits.covers("halves", 1, "stable is nobody's to cover")
    assert here.models.splits.covers("halves", 2, "its session is dead")

    async def test() -> None:
        assert (await here.ask("halves", [[1, 1]])).status == 200

    run(test)
    assert (here.shadows(), {model for model, _ in here.models.splits.cuts()}) == ([], {"halves"})
    assert [r.getMessage() for r in caplog.records] == ["the shadow halves/2 is not asked any more here: its session is dead"]
    assert here.telemetry.splits == [], "it had no keys"


def test_in_lambda_nothing_is_done_after_an_answer(released: Released) -> None:
    here = host(released, form="lambda")
    assert not here.models.splits.live
    body = orjson.dumps({"instances": [[1, 1]]})
    assert here.surface.handle(HttpRequest("POST", "/v1/models/halves:predict", [], body)).status == 200
    assert here.models.splits.collect("halves") is None


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        (np.float32([1, 2, np.nan]), np.float32([1, 2, np.nan]), [False, False, False]),
        (np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [3, 5]]), [False, True]),
        (np.float32([[[1], [2]]]), np.float32([[[1], [np.nan]]]), [True]),
        (np.int64([1, 2]), np.int64([[1], [2]]), [True, True]),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), [False, True]),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), []),
    ],
)
def test_rows_are_apart_where_any_of_their_values_is(here: Host, first: Array, second: Array, apart: list[bool]) -> None:
    versions = here.models.get("halves", version=1), here.models.get("halves", version=2)
    assert rows_apart(first, second, *versions).tolist() == apart


def test_the_recorded_tolerance_counts(here: Host) -> None:
    stable, other = here.models.get("halves", version=1), here.models.get("halves", version=2)
    tolerance = stable.manifest.tolerances["CPUExecutionProvider"]["float32"]
    base = np.float32([1.0])
    near, far = base + np.float32(tolerance.atol / 2), base + np.float32(3 * (tolerance.atol + tolerance.rtol) + 1e-3)
    assert rows_apart(base, near, stable, other).tolist() == [False]
    assert rows_apart(base, far, stable, other).tolist() == [True]
