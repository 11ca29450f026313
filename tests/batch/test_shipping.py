"""Somebody else's cluster: a driver elsewhere, in the cluster or outside of it, and a job of the job API ship their code."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import batch
import triform
from batch import shipping
from batch.actor import PartScorer, pinned_predictor
from batch.pool import Cluster
from tests.batch.workbench import Workbench, assert_each_row_once
from triform.errors import VersionNotFound
from triform.runtime import RuntimeOptions


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with another copy of the packages, whose actors note the file that they came from in `seen/`."""
    root = tmp_path / "elsewhere"
    for package in (triform, batch):
        folder = Path(str(package.__file__)).parent
        shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "seen").mkdir()
    with (root / "batch/actor.py").open("a") as actor:
        actor.write(f"\nimport pathlib\n(pathlib.Path({str(root / 'seen')!r}) / str(os.getpid())).write_text(__file__)\n")
    (root / "empty").mkdir()
    return root


def seen(elsewhere: Path) -> set[str]:
    """Where the processes of a run have imported the actor from."""
    return {file.read_text() for file in (elsewhere / "seen").iterdir()}


def options(bench: Workbench) -> list[str]:
    given = {"repository": bench.repository, "model": "lookup@stable", "input": bench.input, "output": bench.output, "key": "id"}
    return [f"--{name}={value}" for name, value in given.items()] + ["--keep=note", "--max-dead-letters=0.5", "--actors=2"]


def drive(bench: Workbench, elsewhere: Path, address: str) -> subprocess.CompletedProcess[str]:
    """`python -m batch run` of the copy, in a folder that holds nothing."""
    environ = os.environ | {"PYTHONPATH": str(elsewhere)}
    command = [sys.executable, "-m", "batch", "run", *options(bench), "--address", address]
    return subprocess.run(command, cwd=elsewhere / "empty", env=environ, capture_output=True, text=True, timeout=240)


def assert_scored_by_the_copy(bench: Workbench, elsewhere: Path, rows: int, *, driver: bool = True) -> None:
    (run,) = bench.output.glob("run=*")
    assert_each_row_once(run, rows)
    actors = seen(elsewhere) - {str(elsewhere / "batch/actor.py")}
    assert actors
    assert all("/py_modules_files/" in file for file in actors)
    assert not driver or str(elsewhere / "batch/actor.py") in seen(elsewhere)


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """What `act` returns as soon as it returns something; a cluster that has just begun refuses jobs for some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if done := act():
                return done
        except RuntimeError as error:
            if "try again" not in str(error) or time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def client_server(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray Client server of the session's cluster, as the head node of a real one runs it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = ray_cluster._private.worker._global_node  # no public name: `ray start` alone starts these servers
    command = [
        sys.executable, "-m", "ray.util.client.server", "--address", ray_cluster.get_runtime_context().gcs_address,
        "--host", "127.0.0.1", "--port", str(port), "--node-id", node.node_id,
        "--runtime-env-agent-address", node.runtime_env_agent_address,
    ]  # fmt: skip
    with (tmp_path_factory.mktemp("client") / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        yield f"ray://127.0.0.1:{port}"
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_a_driver_in_another_folder_ships_its_code(workbench: Workbench, elsewhere: Path, ray_cluster: Any) -> None:
    done = drive(workbench.write_some(4), elsewhere, ray_cluster.get_runtime_context().gcs_address)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    assert_scored_by_the_copy(workbench, elsewhere, 400)


@pytest.mark.slow
def test_a_driver_outside_of_the_cluster_ships_its_code(workbench: Workbench, elsewhere: Path, client_server: str) -> None:
    done = drive(workbench.write_some(4), elsewhere, client_server)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    assert "400 of 400 rows" in done.stdout
    assert_scored_by_the_copy(workbench, elsewhere, 400)


@pytest.mark.slow
def test_what_fails_is_told_through_ray_client_as_elsewhere(workbench: Workbench, elsewhere: Path, client_server: str) -> None:
    workbench.write_some(1)
    workbench.write("all-null.parquet", 1000, 300, x=[None] * 300)
    done = drive(workbench, elsewhere, client_server)
    assert done.returncode == 4
    assert "all-null.parquet: 300 dead letters in its first 300 rows are more than the whole run may have (200)" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_job_of_the_job_api_brings_its_code(workbench: Workbench, elsewhere: Path, ray_cluster: Any) -> None:
    """As `ray job submit --runtime-env-json "$(python -m batch.shipping)"` does."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = [sys.executable, "-m", "batch.shipping"]
    printed = subprocess.run(
        command, cwd=elsewhere / "empty", env=os.environ | {"PYTHONPATH": str(elsewhere)}, capture_output=True, check=True
    )
    address = (
        ray_cluster.get_runtime_context().gcs_address
    )  # where one machine has two clusters, Ray may tell a job the wrong one
    run = shlex.join([sys.executable, "-m", "batch", "run", *options(workbench.write_some(4)), f"--address={address}"])
    client = JobSubmissionClient(address)
    there = f"cd {elsewhere / 'empty'} && {run}"  # this cluster was started in a checkout
    job = within(90, lambda: client.submit_job(entrypoint=there, runtime_env=json.loads(printed.stdout)))
    within(240, lambda: client.get_job_status(job).is_terminal())
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert_scored_by_the_copy(workbench, elsewhere, 400, driver=False)


def test_a_node_that_does_not_see_the_files_says_so(workbench: Workbench) -> None:
    folder, _ = workbench.write_some(1).begin()
    moved = workbench.output.rename(workbench.root / "not seen")
    outcome = PartScorer(str(workbench.output), folder.run, RuntimeOptions(), 0).score(0)
    assert outcome.code == "job_failed"
    assert f"the output is not on this node ({platform.node()})" in outcome.error
    moved.rename(workbench.output)
    with pytest.raises(VersionNotFound, match=rf"in {workbench.root}/models as this node"):
        pinned_predictor(f"{workbench.root}/models", folder.plan().pinned, RuntimeOptions())


def test_only_the_two_packages_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    env = shipping.runtime_env()
    assert [Path(folder).name for folder in env["py_modules"]] == ["triform", "batch"]
    assert env.keys() == {"py_modules", "excludes"}  # no variable, no credential
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert shipping.of_driver() is None


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "ray://127.0.0.1:1", "nobody.invalid:6379"])
def test_a_cluster_that_is_not_there_is_named_at_once(address: str) -> None:
    """In a process of its own: this one may be in a cluster already."""
    code = f"from batch.pool import Cluster\nwith Cluster({address!r}):\n    pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert re.search(rf"ConfigurationError: address: the cluster at {address} cannot be (used|reached): \S+", done.stderr)


def test_ray_address_names_a_cluster_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Cluster(None).address, Cluster(None).may_grow) == ("local", False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (Cluster(None).address, Cluster(None).may_grow) == ("10.0.0.1:6379", True)
    assert Cluster("auto").address == "auto"
