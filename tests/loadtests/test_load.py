"""Whole runs of `python -m loadtests`: real flights, each answer held against the batch job's."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest

from batch.job import Summary
from infra.local.gateway import local_gateway
from loadtests import flights as flights_of
from loadtests.answers import wrong
from loadtests.order import PROTOCOLS
from loadtests.payloads import SIZES
from tests.ray_apps.hosts import metrics_port, served
from tests.ray_apps.ports import SERVE_PORTS


class Run(NamedTuple):
    code: int
    said: str
    told: dict[str, Any]
    failed: list[str | None]


class Deployment(NamedTuple):
    """`options`: how the load tests are told of it."""

    options: list[str]
    metrics: list[str]


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    """What holds on any machine, however slow."""
    file = tmp_path / "limits.toml"
    file.write_text("[serve]\nerror_rate = 0\nrefused_share = 0\n[lambda]\nerror_rate = 0\n")
    return file


def load(example: Path, output: Path, *options: object) -> Run:
    command = [sys.executable, "-m", "loadtests", "--example", example, "--output", output, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, check=False)
    (file,) = output.glob("*.json") if output.exists() else [None]
    assert file is not None, done.stdout + done.stderr
    suite = ElementTree.parse(file.with_suffix(".xml")).getroot()[0]  # noqa: S314 - our own
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert file.with_suffix(".html").read_text().startswith("<!DOCTYPE html>")
    return Run(done.returncode, done.stdout + done.stderr, json.loads(file.read_bytes()), failed)


@pytest.fixture(scope="module")
def deployment(ray_cluster: Any, flights: Path, scored: Summary) -> Iterator[Deployment]:
    """The flights' model on the session's cluster."""
    name = f"load-{uuid.uuid4().hex[:8]}"
    with served(flights / "repository", f"/{name}", name, default_model="flight-delay") as (host, port):
        options = ["--target", "serve", "--host", f"http://{host}:{port}/{name}", "--grpc", f"{host}:{SERVE_PORTS.grpc}"]
        options += ["--grpc-metadata", f"application={name}"]
        yield Deployment(options, ["--metrics", f"http://{host}:{metrics_port(ray_cluster)}/metrics"])


def test_payloads_are_flights_of_all_sizes_in_every_protocol(flights: Path, scored: Summary) -> None:
    made = flights_of.payloads(flights, Path(scored.data), PROTOCOLS, seed=1)
    assert {(one.protocol, one.rows) for one in made.payloads} == {(p, rows) for p in PROTOCOLS for rows in SIZES}
    expected = np.concatenate([np.frombuffer(one.expected, np.float32) for one in made.payloads])
    assert ((expected > 0) & (expected < 1)).all()
    assert len(np.unique(expected)) > 1_000
    tfs = next(one for one in made.payloads if one.protocol == "tfs" and one.rows == 8)
    answer = [{"p_late": float(value)} for value in np.frombuffer(tfs.expected, np.float32)]
    assert wrong(made, tfs, {}, json.dumps({"predictions": answer}).encode()) is None
    answer[3]["p_late"] += 0.01
    said = wrong(made, tfs, {}, json.dumps({"predictions": answer}).encode())
    assert said is not None
    assert said.startswith("row 3 of 8")
    assert "answers where" in (wrong(made, tfs, {}, json.dumps({"predictions": answer[:5]}).encode()) or "")


def test_a_few_seconds_of_serve_in_every_protocol(deployment: Deployment, flights: Path, limits: Path, tmp_path: Path) -> None:
    run = load(
        flights, tmp_path / "out", *deployment.options, "--shape", "soak", "--seconds", 3, "--rate", 25, "--thresholds", limits
    )
    assert run.code == 0, run.said
    assert {*run.told["protocols"]} == {*PROTOCOLS}
    assert all(figures["ok"] > 0 for figures in run.told["protocols"].values())
    assert {*run.told["outcomes"]} == {"ok"}
    assert run.told["generator"]["locust_requests"] == run.told["total"]["requests"]


@pytest.mark.slow
def test_a_few_seconds_of_the_local_lambda(flights: Path, scored: Summary, limits: Path, tmp_path: Path) -> None:
    """A burst after a pause, so that environments start; the counters of callers and function agree; a limit that nobody keeps
    is told by the exit code."""
    given = ["--target", "lambda", "--shape", "burst", "--seconds", 6, "--rate", 20, "--environments", 2]
    limits.write_text(limits.read_text() + "p50_ms = 0\n")
    run = load(flights, tmp_path / "out", *given, "--thresholds", limits, "--pictures", tmp_path / "img")
    assert run.code == 1, run.said
    assert run.failed == ["p50_ms"]
    assert run.told["counters"]["server"] == {"ok": run.told["outcomes"]["ok"]}
    assert {*run.told["outcomes"]} <= {"ok", "refused"}
    assert run.told["watched"][-1]["starts"] >= 1
    assert any(seen["serving"] == 0 for seen in run.told["watched"])
    names = {file.name for file in (tmp_path / "img").iterdir()}
    assert names == {f"load-lambda-burst-{name}.svg" for name in ("latency-by-rate", "rate", "latency", "queue", "serving")}


@pytest.mark.slow
def test_another_model_than_the_batch_job_used_gives_wrong_answers(
    flights: Path, scored: Summary, limits: Path, tmp_path: Path
) -> None:
    environ = {"TRIFORM_REPOSITORY": str(flights / "repository"), "TRIFORM_MODELS": "flight-delay/2"}
    with local_gateway(environ=environ, max_concurrency=4, provisioned=1) as gateway:
        given = ["--target", "lambda", "--host", gateway.url, "--protocols", "oip-binary", "--loop", "closed", "--users", 1]
        run = load(flights, tmp_path / "out", *given, "--shape", "soak", "--seconds", 2, "--thresholds", limits)
    assert run.code == 1
    assert {*run.told["outcomes"]} == {"wrong_answer"}
    assert "no answer differs from the batch job's" in run.failed
    assert "where the batch job has" in run.told["examples"]["wrong_answer"]


@pytest.mark.slow  # a minute of load
def test_client_server_and_prometheus_count_the_same(deployment: Deployment, flights: Path, limits: Path, tmp_path: Path) -> None:
    given = [*deployment.options, *deployment.metrics, "--prometheus", "--workers", 2, "--shape", "diurnal", "--rate", 40]
    run = load(flights, tmp_path / "out", *given, "--seconds", 60, "--thresholds", limits)
    assert run.code == 0, run.said
    counters = run.told["counters"]
    assert counters["client"] == counters["server"] == counters["prometheus"] == {"ok": run.told["total"]["requests"]}
    assert run.told["total"]["requests"] > 500
    assert run.told["generator"]["workers"] == 2
    assert run.told["generator"]["locust_requests"] == run.told["total"]["requests"]


@pytest.mark.slow  # a Ray of its own, and up to the target's limit
@pytest.mark.parametrize(("target", "unit"), [("serve", "replicas"), ("lambda", "environments")])
def test_make_load_starts_what_it_needs_and_stops_by_itself(
    target: str, unit: str, flights: Path, scored: Summary, tmp_path: Path
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(f"[{target}]\nerror_rate = 0\n")
    options = f"--seconds 20 --example {flights} --output {tmp_path / 'out'} --thresholds {file}"
    command = ["make", "load", f"TARGET={target}", "SHAPE=steps", f"OPTIONS={options}"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / f"out/{target}-steps.json").read_bytes())
    assert told["unit"] == unit
    assert max(seen["serving"] for seen in told["watched"]) >= 1
    assert told["counters"]["server"]["ok"] == told["outcomes"]["ok"]
