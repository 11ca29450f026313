"""The nightly job: partitions, from S3 to S3 on Ray, through kills and faults; what a scheduler sees of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from batch.nightly import run_all
from tests.batch.killing import scorers, started
from tests.batch.workbench import Cli, RemoteWorkbench, Workbench, assert_each_row_once
from tests.faulty_proxy import Fault, FaultyProxy
from triform import testing
from triform.errors import JobError
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.stores.files import open_files
from triform.telemetry import RunRecord, Silent

FILES, ROWS = 6, 2000
FAULTS: list[Fault] = ["503", "reset", "cut", "stall", "late"]


def options(bench: Workbench, *more: str) -> list[str]:
    spec = bench.spec()
    given = {"repository": spec.repository, "model": spec.model, "input": spec.input[0], "output": spec.output, "key": "id"}
    return [*(f"--{name}={value}" for name, value in given.items()), "--keep=note", "--max-dead-letters=0.5", *more]


def write_months(bench: Workbench, *months: int) -> None:
    for month in months:
        bench.write(f"month=2013-{month:02}/a.parquet", 100 * (month - 1))


def score_months(bench: Workbench, *months: int) -> None:
    """Does the actors' work in this process, so that the command has only to commit."""
    for month in months:
        name = f"month=2013-{month:02}"
        where = {"input": (f"{bench.spec().input[0]}/{name}",), "output": f"{bench.spec().output}/{name}"}
        assert all(outcome.scored for outcome in bench.score(**where))


def test_one_night(workbench: Workbench, call: Cli) -> None:
    write_months(workbench, 1, 2)
    score_months(workbench, 2)
    code, out, err = call("run", *options(workbench, "--partition=month=2013-02", "--lease=60"))
    assert (code, err) == (0, "")
    assert [path.name for path in workbench.output.iterdir()] == ["month=2013-02"]
    (run,) = (workbench.output / "month=2013-02").glob("run=*")
    assert "100 in = 86 answered + 14 dead letters" in out
    code, out, _ = call("current", workbench.output / "month=2013-02", "--json")
    assert json.loads(out)["data"] == f"{run}/data"
    code, out, _ = call("run", *options(workbench, "--partition=month=2013-02", "--lease=60"))
    assert (code, "is committed already" in out) == (0, True)


def test_a_backfill_goes_on_past_a_night_that_fails(workbench: Workbench, call: Cli) -> None:
    write_months(workbench, 1, 2, 3)
    (workbench.input / "month=2013-02/broken.parquet").write_bytes(b"PAR1")
    score_months(workbench, 1, 3)
    code, out, err = call("run", *options(workbench, "--partition=month", "--from=2013-01", "--to=2013-12", "--json"))
    assert code == 1
    assert [(one["partition"], one["code"]) for one in json.loads(out)] == [
        ("month=2013-01", "ok"), ("month=2013-02", "input_unreadable"), ("month=2013-03", "ok"),
    ]  # fmt: skip
    assert "broken.parquet" in err
    (workbench.input / "month=2013-02/broken.parquet").unlink()
    score_months(workbench, 2)
    code, out, err = call("run", *options(workbench, "--partition=month", "--from=2013-01"))
    assert (code, err) == (0, "")
    assert out.count("is committed already") == 2
    for month in 1, 2, 3:
        (run,) = (workbench.output / f"month=2013-{month:02}").glob("run=*")
        assert json.loads((run / "_manifest/000001.json").read_text())["rows_in"] == 100


def test_an_output_that_cannot_be_written_is_told_and_stops_no_other_night(workbench: Workbench, call: Cli) -> None:
    write_months(workbench, 1, 2)
    score_months(workbench, 2)
    (workbench.output / "month=2013-01").write_text("a file where a folder should be")
    code, out, err = call("run", *options(workbench, "--partition=month", "--json"))
    assert [(one["partition"], one["code"]) for one in json.loads(out)] == [
        ("month=2013-01", "store_unavailable"), ("month=2013-02", "ok"),
    ]  # fmt: skip
    assert (code, "the output failed" in err) == (1, True)


def test_late_data_replaces_its_night_and_no_other(workbench: Workbench, call: Cli) -> None:
    write_months(workbench, 1, 2)
    score_months(workbench, 1, 2)
    assert call("run", *options(workbench, "--partition=month"))[0] == 0
    pointers = {path: path.read_bytes() for path in workbench.output.glob("*/_current/*")}
    workbench.write("month=2013-02/late.parquet", 500, 50)
    code, _, err = call("run", *options(workbench, "--partition=month=2013-02"))
    assert (code, "output_exists" in err) == (1, True)
    late = {"input": (f"{workbench.input}/month=2013-02",), "output": f"{workbench.output}/month=2013-02"}
    assert all(outcome.scored for outcome in workbench.score(**late, if_exists="replace"))
    code, out, _ = call("run", *options(workbench, "--partition=month=2013-02", "--if-exists=replace"))
    assert (code, "150 in = " in out) == (0, True)
    assert len(list((workbench.output / "month=2013-02").glob("run=*"))) == 2  # the old one stays readable
    assert {path: path.read_bytes() for path in pointers} == pointers
    assert len(list(workbench.output.glob("*/_current/*"))) == 3


def test_exit_codes_tell_a_scheduler_what_to_do(workbench: Workbench, call: Cli) -> None:
    write_months(workbench, 1)
    night = "--partition=month=2013-01"
    score_months(workbench, 1)
    assert call("run", *options(workbench, night, "--max-dead-letters=0.01"))[0] == 4
    code, _, err = call("run", *options(workbench, "--partition=month=2013-09"))
    assert (code, "it has month=2013-01 to 2013-01" in err) == (1, True)
    assert call("run", *options(workbench, "--partition=month=2013-01", "--from=2013-01"))[0] == 2
    assert call("run", *options(workbench, night, "--lease=0"))[0] == 2
    files = open_files(workbench.output / "month=2013-01")
    files.make_folder("_lease")
    files.create("_lease/000001.json", b'{"host": "elsewhere", "pid": 7, "seconds": 600, "nonce": "theirs"}')
    code, _, err = call("run", *options(workbench, night, "--lease=60"))
    assert (code, "process 7 on elsewhere is at work" in err) == (3, True)
    assert call("run", *options(workbench, night))[0] == 0  # whoever asks for no lease is not held up


def test_a_night_that_is_not_there_is_told_as_a_failure(workbench: Workbench) -> None:
    write_months(workbench, 1)
    told: list[RunRecord] = []
    telemetry = Silent()
    telemetry.ran = told.append  # type: ignore[method-assign]
    with pytest.raises(JobError, match="it has month=2013-01"):
        list(run_all(workbench.spec(partition=("month=2013-09",)), workbench.console, telemetry))
    assert [(record.model, record.code) for record in told] == [("lookup", "input_unreadable")]


@pytest.fixture
def night(
    tmp_path: Path, lookup_repository: Path, s3_bucket: str, s3_server: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> RemoteWorkbench:
    """Input, models and output on S3, reached through the proxy by the driver and its actors."""
    proxy.fail()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = open_repository(f"s3://{s3_bucket}/models")
    package_model(testing.lookup(tmp_path / "lookup.onnx", entries=10), name="lookup", repository=models)
    ReleaseLog(models, "lookup").set(stable=1)
    bench = RemoteWorkbench(tmp_path, Path(models.location), s3_bucket, s3_server)
    for i in range(FILES):
        bench.write(f"month=2013-12/{i}.parquet", i * ROWS, ROWS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return bench


@contextmanager
def driver(bench: RemoteWorkbench) -> Iterator[subprocess.Popen[str]]:
    """The nightly command, with a Ray of its own. Whatever descends from it has ended afterwards."""
    repository = f"--repository=s3://{bench.bucket}/models"
    more = repository, "--partition=month=2013-12", "--lease=30", "--actors=2"
    with started(sys.executable, "-m", "batch", "run", *options(bench, *more)) as process:
        yield process


def recorded(bench: RemoteWorkbench) -> int:
    return sum("/_parts/" in key for key in bench.listed("out/month=2013-12/"))


def killed(bench: RemoteWorkbench, chance: random.Random) -> bool:
    """A kill -9 of an actor where there is one (which it says), then one of the driver. The Ray that it started ends with it.

    There is none while the driver adopts what killed ones have placed, before it starts any, and when all parts are done.
    """
    actors: list[psutil.Process] = []
    parts = recorded(bench) + chance.randrange(2)
    with driver(bench) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and recorded(bench) < parts + 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            actors = scorers(psutil.Process(process.pid))
            for actor in actors[:1]:
                with suppress(psutil.NoSuchProcess):
                    actor.kill()
        time.sleep(chance.random())
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    return bool(actors)


def finished(bench: RemoteWorkbench) -> None:
    for _ in range(3):  # where the store fails for longer than the budget lasts, the same command goes on
        with driver(bench) as process:
            said, _ = process.communicate(timeout=240)
        assert "Traceback" not in said
        if process.returncode == 0:
            break
        assert "store_unavailable" in said, said
    assert process.returncode == 0, said
    runs = {key.split("/")[2] for key in bench.listed("out/month=2013-12/") if "/run=" in key}
    (run,) = runs
    assert_each_row_once(bench.fetch(f"s3://{bench.bucket}/out/month=2013-12/{run}"), FILES * ROWS)
    assert f"out/month=2013-12/{run}/data/_SUCCESS" in bench.listed()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")  # starts Rays of its own: two at once take a machine of two cores a minute
def test_a_night_from_s3_to_s3_survives_kills_and_faults(night: RemoteWorkbench, proxy: FaultyProxy) -> None:
    chance = random.Random(1)
    proxy.fail(*(chance.choice(FAULTS) if chance.random() < 0.1 else "late" for _ in range(100)))
    assert killed(night, chance), "there was no actor to kill"
    finished(night)
    assert len(proxy.taken) == 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_nights_from_s3_to_s3_killed_again_and_again(night: RemoteWorkbench, proxy: FaultyProxy, seed: int) -> None:
    chance = random.Random(seed)
    proxy.fail(*(chance.choice(FAULTS) if chance.random() < 0.1 else "late" for _ in range(400)))
    assert sum(killed(night, chance) for _ in range(3)), "there was no actor to kill"
    finished(night)
