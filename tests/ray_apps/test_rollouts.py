"""Several rollouts at once on Ray Serve under load: good canaries are promoted, each kind of bad one is taken off, and stable
answers all that it is asked."""

from __future__ import annotations

import http.client
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import orjson
import pytest
from onnx import helper

from ray_apps.rollout import NAMESPACE
from tests.ray_apps.hosts import served
from triform import testing
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository
from triform.rollout.policy import Errors, Guards, Latency, Policy, ScoreShift, Step
from triform.rollout_log import RolloutLog

POLICY = Policy(
    steps=(Step(weight=0.2, min_requests=30, min_seconds=2), Step(weight=0.5, min_requests=200, min_seconds=2)),
    guards=Guards(
        errors=Errors(increase=0.05),
        latency=Latency(ratio=3.0, margin_ms=5.0, quantiles=(0.5,)),
        score_shift=ScoreShift(limit=0.5, min_rows=1000, edges=(0.25, 0.5, 0.75)),
    ),
    longest_seconds=120.0,
)
BAD = ("raises", "slow", "wrong", "nan", "memory")
ROWS = 10  # of a request
EACH_SECOND = 100  # requests, of all models together
LAYERS, WIDTH = 250, 512  # of a slow one: 25 ms or more
PLACES, KNOWN = 1000, 980  # of a row, and those for which a canary that raises, eats or crashes does not: a sixth of the requests

BITES, BITE = 8, 8 << 20  # of one that eats: so many times so many floats, 256 MiB together, which its session keeps


def canary(kind: str, path: Path) -> Path:
    """y = the first column of x (FP32[rows, 2]), or what a version of that kind makes of it; the second is a place in a table.

    For rows beyond the known places `memory` takes and fills `BITES` times `BITE` floats, one after another, holds all of them,
    and then asks for more than a process can address: so the run fails, and the machine has memory left. `crashes` ends its
    process on x86, as `testing.fragile` does: SIGFPE, for the least of all integers is divided by -1. That is so up to `PLACES`
    and not beyond, as extreme rows are run in the process that packages it.
    """
    made: dict[str, list[Any]] = {
        "same": [],
        "raises": [
            helper.make_node("Gather", ["x", "one"], ["place"], axis=1),
            helper.make_node("Cast", ["place"], ["index"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["factor"], axis=0),
            helper.make_node("Squeeze", ["factor", "axis"], ["factors"]),
            helper.make_node("Mul", ["score", "factors"], ["made"]),
        ],
        "memory": [
            helper.make_node("Gather", ["x", "one"], ["place"], axis=1),
            helper.make_node("Less", ["place", "known"], ["near"]),
            helper.make_node("Not", ["near"], ["far"]),
            helper.make_node("Cast", ["far"], ["fars"], to=onnx.TensorProto.INT64),
            helper.make_node("ReduceMax", ["fars"], ["any"], keepdims=0),
            helper.make_node("Reshape", ["any", "one"], ["hungry0"]),
            *(node for bite in range(BITES) for node in _bite(bite)),
            helper.make_node("Mul", [f"hungry{BITES}", "everything"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["more"]),
            helper.make_node("Concat", [*(f"bite{bite}" for bite in range(BITES)), "more"], ["eaten"], axis=0),
            helper.make_node("ReduceSum", ["eaten"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["score", "nothing"], ["made"]),
        ],
        "crashes": [
            helper.make_node("Gather", ["x", "one"], ["place"], axis=1),
            helper.make_node("Cast", ["place"], ["index"], to=onnx.TensorProto.INT64),
            helper.make_node("Div", ["index", "unknown"], ["part"]),
            helper.make_node("Sub", ["part", "parts"], ["divisor"]),  # -1 in the last part
            helper.make_node("Div", ["least", "divisor"], ["quotient"]),
            helper.make_node("Mul", ["quotient", "zero"], ["none"]),
            helper.make_node("Cast", ["none"], ["nothing"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Add", ["score", "nothing"], ["made"]),
        ],
        "slow": [
            helper.make_node("MatMul", ["score", "wide"], ["w0"]),
            *(helper.make_node("MatMul", [f"w{layer}", "square"], [f"w{layer + 1}"]) for layer in range(LAYERS)),
            helper.make_node("MatMul", [f"w{LAYERS}", "narrow"], ["nothing"]),
            helper.make_node("Add", ["score", "nothing"], ["made"]),
        ],
        "wrong": [helper.make_node("Sqrt", ["score"], ["root"]), helper.make_node("Sqrt", ["root"], ["made"])],
        "nan": [  # for the lower half
            helper.make_node("Sub", ["score", "half"], ["less"]),
            helper.make_node("Sqrt", ["less"], ["root"]),
            helper.make_node("Sub", ["root", "root"], ["nothing"]),
            helper.make_node("Add", ["score", "nothing"], ["made"]),
        ],
    }
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "zero": np.array([0]), "one": np.array([1]), "axis": np.array([1]), "half": np.array(0.5, np.float32),
        "known": np.array(KNOWN, np.float32), "everything": np.array([2**46]), "bite": np.array([BITE]),
        "least": np.array([-(2**63)]), "unknown": np.array([PLACES - KNOWN]), "parts": np.array([PLACES // (PLACES - KNOWN)]),
        "table": np.ones((KNOWN, 1), np.float32), "wide": rng.random((1, WIDTH), np.float32),
        "square": rng.random((WIDTH, WIDTH), np.float32) / WIDTH, "narrow": np.zeros((WIDTH, 1), np.float32),
    }  # fmt: skip
    nodes = [helper.make_node("Slice", ["x", "zero", "one", "axis"], ["score"]), *made[kind]]
    nodes.append(helper.make_node("Identity", ["made" if made[kind] else "score"], ["y"]))
    used = {name: constants[name] for node in nodes for name in node.input if name in constants}
    return testing.save(path, nodes, [testing.value("x", "FP32", ["N", 2])], [testing.value("y", "FP32", ["N", 1])], used)


def _bite(number: int) -> list[Any]:
    """Takes and reads some memory, if it is hungry; the next one waits for what was read."""
    return [
        helper.make_node("Mul", [f"hungry{number}", "bite"], [f"floats{number}"]),
        helper.make_node("ConstantOfShape", [f"floats{number}"], [f"bite{number}"]),
        helper.make_node("ReduceSum", [f"bite{number}"], [f"read{number}"]),
        helper.make_node("Cast", [f"read{number}"], [f"nothing{number}"], to=onnx.TensorProto.INT64),
        helper.make_node("Add", [f"hungry{number}", f"nothing{number}"], [f"hungry{number + 1}"]),
    ]


def build(folder: Path, kinds: Sequence[str]) -> ModelRepository:
    """A model for each kind, `0-same` and so on, whose version 2 is of that kind; stable is 1."""
    repository = open_repository(folder / "models")
    samples = folder / "samples.npz"
    np.savez(samples, x=np.array([[0.6, 3], [0.9, 5], [0.7, 700]], np.float32))
    for number, kind in enumerate(kinds):
        for version in ("same", kind):
            file = canary(version, folder / f"{version}.onnx")
            package_model(file, name=f"{number}-{kind}", repository=repository, samples=samples)
        ReleaseLog(repository, f"{number}-{kind}").set(stable=1)
    return repository


EATEN = """
import sys, numpy as np, psutil
from triform.errors import ResourceExhausted
from triform.predictor import Predictor
from triform.repository import open_repository
predictor, process = Predictor.load(open_repository(sys.argv[1]).package("m", 1)), psutil.Process()
answer, before = predictor.predict({"x": np.array([[0.5, 0]], np.float32)})["y"].tolist(), process.memory_info().rss
try:
    predictor.predict({"x": np.array([[0.5, int(sys.argv[2])], [0.5, 0]], np.float32)})
except ResourceExhausted:
    print(answer, process.memory_info().rss - before)
"""


def test_one_that_eats_has_taken_memory_when_it_fails(tmp_path: Path) -> None:
    """And before that it answers. In a process of its own: this one may have memory left from other tests."""
    repository = open_repository(tmp_path / "models")
    package_model(canary("memory", tmp_path / "m.onnx"), name="m", repository=repository)
    command = [sys.executable, "-c", EATEN, str(tmp_path / "models"), str(KNOWN)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    answer, _, eaten = said.strip().rpartition(" ")
    assert answer == "[[0.5]]"
    assert 0.9 < int(eaten) / (BITES * BITE * 4) < 1.5


class Answer(NamedTuple):
    model: str  # and version: 0-same/1
    status: int


class Callers:
    """Each model is asked at a fixed rate until the end, whether answers before have come or not: a caller asks once a second,
    and only an answer that takes longer holds up his next request."""

    def __init__(self, address: tuple[str, int], prefix: str, models: Sequence[str]) -> None:
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self._address = address
        self._prefix = prefix
        self._done = threading.Event()
        callers = EACH_SECOND // len(models)
        each = [(model, number / callers) for number in range(callers) for model in models]
        self._threads = [threading.Thread(target=self._ask, args=(*one, seed)) for seed, one in enumerate(each)]

    @contextmanager
    def asking(self) -> Iterator[Callers]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join(60)

    def _ask(self, model: str, begins: float, seed: int) -> None:
        rng = random.Random(seed)
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        due = time.monotonic() + begins
        while not self._done.wait(max(0.0, due - time.monotonic())):
            body = orjson.dumps({"instances": [[rng.random(), rng.randrange(PLACES)] for _ in range(ROWS)]})
            try:
                connection.request("POST", f"{self._prefix}/v1/models/{model}:predict", body)
                response = connection.getresponse()
                response.read()
                told = Answer(response.getheader("x-triform-model", "nobody"), response.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                told = Answer(repr(error), 0)
            self.answers[model].append(told)
            due += 1.0
        connection.close()


SLOW = pytest.mark.slow
ROUNDS = [
    pytest.param(("same", "same", "raises", "nan"), 2, id="a tenth"),
    *(pytest.param(("same",) * 5, 0, id=f"good, {n}", marks=SLOW) for n in range(4)),
    *(pytest.param(BAD, 0, id=f"bad, {n}", marks=SLOW) for n in range(4)),
    pytest.param(("same", "raises"), 20, id="killed", marks=SLOW),
]


@pytest.mark.parametrize(("kinds", "kills"), ROUNDS)
def test_good_canaries_are_promoted_and_bad_ones_taken_off(
    ray_cluster: Any, tmp_path: Path, kinds: tuple[str, ...], kills: int
) -> None:
    """Their controller is killed so often meanwhile, a second apart."""
    roll_out(tmp_path, kinds, kills)


ISOLATED = [
    pytest.param(("same", "same", "raises", "slow"), id="a tenth"),
    *(pytest.param(("same",) * 5, id=f"good, {n}", marks=SLOW) for n in range(4)),
    *(pytest.param(BAD, id=f"bad, {n}", marks=SLOW) for n in range(4)),
    *(pytest.param(("crashes",), id=f"crashes, {n}", marks=SLOW) for n in range(4)),  # alone: it takes its neighbours along
]


@pytest.mark.parametrize("kinds", ISOLATED)
def test_isolated_ones_as_well_and_nobody_pays_for_them(ray_cluster: Any, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    statuses = roll_out(tmp_path, kinds, canary={"timeout_s": 5.0})
    assert statuses == {200}


def roll_out(folder: Path, kinds: tuple[str, ...], kills: int = 0, **args: Any) -> set[int]:
    """All at once, under load, each to the end that it must come to. What callers were answered with."""
    repository = build(folder, kinds)
    name = f"rollouts-{uuid.uuid4().hex[:8]}"
    fast = {"rollout_window_s": 0.5, "poll_s": 0.2, "num_replicas": 2, **args}
    models = repository.models()
    with served(folder / "models", f"/{name}", name, default_model=models[0], **fast) as address:
        logs = {model: RolloutLog(repository, model) for model in models}
        rollouts = {model: log.start(policy(kills), 2) for model, log in logs.items()}
        left = kills
        with Callers(address, f"/{name}", models).asking() as callers:
            until = time.monotonic() + POLICY.longest_seconds + 30.0
            while time.monotonic() < until and not all(logs[m].follow(r).ended for m, r in rollouts.items()):
                time.sleep(1.0)
                left -= left > 0 and kill_controller(name)
            time.sleep(1.0)
        assert left == 0, "it was over before"
        for model, rollout in rollouts.items():
            good = model.endswith("same")
            assert rollout.state.phase == ("promoted" if good else "rolled_back"), (model, rollout.state)
            assert "are up" not in rollout.state.reason, (model, "it was not found, its time was up", rollout.state)
            failed = [answer for answer in callers.answers[model] if answer.status != 200]
            assert [answer for answer in failed if good or answer.model != f"{model}/2"] == [], "whoever else says so"
            assert len(callers.answers[model]) > 100
    return {answer.status for answers in callers.answers.values() for answer in answers}


def policy(kills: int) -> Policy:
    """Whose steps take as long as the kills."""
    steps = tuple(msgspec.structs.replace(step, min_seconds=max(step.min_seconds, float(kills))) for step in POLICY.steps)
    return msgspec.structs.replace(POLICY, steps=steps)


def kill_controller(application: str) -> bool:
    """False where there is none yet."""
    import ray

    try:
        controller = ray.get_actor(f"rollouts of {application}", namespace=NAMESPACE)
    except ValueError:
        return False
    ray.kill(controller, no_restart=False)
    return True
