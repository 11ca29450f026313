"""Locust's processes against a server that answers as it is told to: what they send, and what they say of what came back."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtests.driving import Driven, drive
from loadtests.order import Order, Protocol, Stage
from loadtests.shapes import stages
from loadtests.wording import GRPC_PATH
from tests.loadtests.made import MODEL, PATH, payloads
from tests.loadtests.stub import grpc_stub, predicted, stub
from triform.errors import TriformError


def driven(folder: Path, host: str, *, over: Protocol = "tfs", **options: Any) -> Driven:
    given = {"stages": stages("soak", 1.5), "rate": 40.0, "users": 3, "timeout": 5.0, **options}
    return drive(Order(host=host, **given), payloads(over=over), folder)


def outcomes(found: Driven) -> Counter[str]:
    return Counter(found.generated.outcomes[number] for number in found.records["outcome"])


ANSWERS = [
    (predicted(0.25), "ok"),
    (predicted(0.2500005), "ok"),  # within the bound
    (predicted(0.5), "wrong_answer"),
    ((200, b'{"predictions": []}'), "wrong_answer"),
    ((200, b"<html>"), "wrong_answer"),
    ((200, b'{"predictions": [{"p_late": null}]}'), "wrong_answer"),
    ((429, b"{}"), "refused"),
    ((503, b'{"error": "gone", "code": "unavailable"}'), "http_503_unavailable"),
    ((404, b'{"error": "..", "code": "../../etc"}'), "http_404"),
    ((500, b"[1]"), "http_500"),
    (None, "connection"),
]


def test_each_answer_is_called_what_it_is_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    with stub(lambda number: ANSWERS[number % len(ANSWERS)][0]) as server:
        found = driven(tmp_path, server.url, connections=1)  # one after the other, so that each is the answer to its request
        assert len(server.heads) == len(found.records["due"]) > len(ANSWERS)
        assert set(server.paths) == {PATH}
    said = [found.generated.outcomes[number] for number in found.records["outcome"]]
    assert said == [ANSWERS[number % len(ANSWERS)][1] for number in range(len(said))]
    assert "0.5 where the batch job has 0.25" in found.generated.examples["wrong_answer"]
    assert found.generated.locust_requests == len(said)
    assert found.generated.locust_failures == sum(one != "ok" for one in said)


def test_grpc_is_asked_without_holding_up_others_and_its_codes_are_told(tmp_path: Path) -> None:
    def answer(number: int, context: grpc.ServicerContext) -> bytes:
        if number == 0:
            time.sleep(1.0)
        code = {1: grpc.StatusCode.RESOURCE_EXHAUSTED, 2: grpc.StatusCode.UNAVAILABLE}.get(number)
        if code is not None:
            context.abort(code, "not now")
        value = 0.5 if number == 3 else 0.25
        made: Any = service_pb2.ModelInferResponse(model_name=MODEL)
        made.outputs.add(name="probabilities", datatype="FP32", shape=[1, 2])
        made.raw_output_contents.append(np.float32([1 - value, value]).tobytes())
        return bytes(made.SerializeToString())

    with grpc_stub(GRPC_PATH, answer) as (target, metadata):
        found = driven(tmp_path, "http://127.0.0.1:9", grpc=target, grpc_metadata=(("application", "x"),), over="oip-grpc")
    said = outcomes(found)
    assert said.pop("ok") == len(found.records["due"]) - 3
    assert said == {"refused": 1, "grpc_unavailable": 1, "wrong_answer": 1}
    assert len(metadata) == len(found.records["due"]), "nothing was sent twice"
    assert all(one["application"] == "x" for one in metadata)
    ends = found.records["due"] + found.records["waited"]
    slow = int(np.argmax(found.records["waited"]))
    assert (ends[slow + 1 :] < ends[slow]).any(), "who came later was answered while one waited"


def test_a_latency_counts_from_when_the_request_was_due(tmp_path: Path) -> None:
    """The first answer takes a second, and there is one connection: all who are due meanwhile have waited for it."""
    with stub(lambda number: predicted(0.25, 1.0 if number == 0 else 0.0)) as server:
        found = driven(tmp_path, server.url, connections=1)
    records = found.records
    assert records["waited"][0] >= 1.0
    stood = (records["due"] > records["due"][0]) & (records["due"] < records["due"][0] + 0.9)
    assert stood.any()
    assert (records["due"][stood] + records["waited"][stood] > records["due"][0] + 1.0).all()
    assert (records["late"] <= records["waited"]).all()


@pytest.mark.slow
def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with stub(lambda number: predicted(0.25, 12.0 if number == 0 else 0.0)) as server:
        found = driven(tmp_path, server.url, timeout=4.0)
        asked = len(server.heads)
    assert outcomes(found) == {"timeout": 1, "ok": asked - 1}
    assert "4 s" in found.generated.examples["timeout"]


@pytest.mark.parametrize("loop", ["open", pytest.param("closed", marks=pytest.mark.slow)])
def test_two_workers_share_the_load(loop: str, tmp_path: Path) -> None:
    with stub(lambda _: predicted(0.25, 0.01)) as server:
        found = driven(tmp_path, server.url, loop=loop, workers=2, users=4)
        asked = len(server.heads)
        clients = {head["host"] for head in server.heads}
    assert outcomes(found) == {"ok": asked}
    assert asked > 10
    assert clients == {server.url.removeprefix("http://")}
    assert (found.generated.workers, found.generated.locust_requests) == (2, asked)
    assert (np.diff(found.records["due"]) >= 0).all()


@pytest.mark.slow
def test_a_closed_loop_never_has_more_requests_out_than_callers(tmp_path: Path) -> None:
    with stub(lambda _: predicted(0.25, 0.02)) as server:
        found = driven(tmp_path, server.url, loop="closed", users=3)
    begins, ends = found.records["due"], found.records["due"] + found.records["waited"]
    out = [int(((begins <= at) & (ends > at + 1e-3)).sum()) for at in begins]
    assert max(out) <= 3
    assert outcomes(found)["ok"] == len(begins) > 10


@pytest.mark.slow
def test_nobody_is_asked_while_the_level_is_nothing(tmp_path: Path) -> None:
    over = (Stage(0, 0.5, 1.0), Stage(0.5, 1.0, 0.0), Stage(1.5, 0.5, 1.0))
    with stub(lambda _: predicted(0.25)) as server:
        found = driven(tmp_path, server.url, stages=over)
    at = found.records["due"] - found.generated.began
    assert ((at < 0.5) | (at >= 1.5)).all()
    assert (at < 0.5).any()
    assert (at >= 1.5).any()


def test_steps_end_with_the_first_that_is_not_kept_up_with(tmp_path: Path) -> None:
    """One answer at a time, each in a fifth of a second: five a second, of up to two hundred."""
    with stub(lambda _: predicted(0.25, 0.2)) as server:
        found = driven(tmp_path, server.url, stages=stages("steps", 60), rate=200, connections=1, saturates=True)
    assert found.generated.saturated == 0.0
    assert found.records["due"].max() - found.generated.began < 30, "it did not go through all steps"


def test_a_generator_that_cannot_work_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(TriformError, match="the load generator failed: error: --auth sigv4: botocore finds no credentials"):
        driven(tmp_path, "http://127.0.0.1:9", auth="sigv4")
