"""The benchmarks' servers: started, checked and ended; a real one, the raw application on uvicorn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import serving
from benchmarks.load import Load
from benchmarks.report import Report
from benchmarks.servers.models import TINY, example, packaged, perceptron
from benchmarks.servers.running import ServerFailed, running
from benchmarks.servers.ways import WAYS, Place

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(perceptron(tmp_path / "tiny.onnx", TINY), tmp_path / "unused", tmp_path)


def test_a_server_is_checked_in_each_encoding_measured_and_ended(place: Place) -> None:
    x, y = example(place.model)
    with WAYS["uvicorn"].started(sys.executable, place, x, y) as server:
        process = psutil.Process(server._tree._root.pid)
        result, cpu = server.measured(lambda: "what the load came to")
        assert (result, cpu >= 0, server.cpu() > 0) == ("what the load came to", True, True)
    assert not process.is_running()


def test_a_wrong_answer_is_told_and_the_server_ended(place: Place) -> None:
    x, y = example(place.model)
    with pytest.raises(ServerFailed, match=r"it answers .* the model"), WAYS["uvicorn"].started(sys.executable, place, x, y + 1):
        pytest.fail("it was taken for right")
    line = "benchmarks.servers.raw_asgi:app"
    assert not [p for p in psutil.Process().children(recursive=True) if line in " ".join(p.cmdline())]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no model here')"]

    def nobody(_: object) -> None:
        raise ConnectionRefusedError

    with (
        pytest.raises(ServerFailed, match="it ended with 1; its log ends: no model here"),
        running(command, (1, 2), environ={}, check=nobody, log=tmp_path / "log"),
    ):
        pytest.fail("it runs")


def test_children_of_a_server_are_ended_too(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"

    def has_a_child(_: object) -> None:
        if not [p for p in psutil.Process().children(recursive=True) if p.cmdline()[-1:] == [child]]:
            raise ConnectionRefusedError

    others = psutil.Process().children(recursive=True)
    with running([sys.executable, "-c", parent], (1, 2), environ={}, check=has_a_child, log=tmp_path / "log"):
        started = [p for p in psutil.Process().children(recursive=True) if p not in others]
        assert len(started) == 2
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_packaged_model_is_the_one_that_peers_get(tmp_path: Path) -> None:
    model, repository = packaged(tmp_path, "tiny", TINY)
    assert (repository / "perceptron/1/model.onnx").read_bytes() == model.read_bytes()
    x, y = example(model, 4)
    assert (x.shape, y.shape) == ((4, 30), (4, 1))
    hidden = x
    for i in range(3):
        weights = {w.name: w for w in _weights(model)}
        hidden = hidden @ _array(weights[f"w{i}"])
        hidden = np.maximum(hidden, 0) if i < 2 else hidden
    assert np.allclose(hidden, y, rtol=1e-4, atol=1e-5)


def _weights(model: Path) -> list[object]:
    import onnx

    return list(onnx.load(model).graph.initializer)


def _array(tensor: object) -> np.ndarray:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))  # type: ignore[arg-type]


def test_ratios_are_of_the_same_round() -> None:
    def seen(rate: int) -> dict[serving.Key, serving.Seen]:
        return {("JSON", serving.MOST): serving.Seen(Load(rate, 1.0, 0.0, 0.0), 0.0)}

    rounds = {"triform": [seen(100), seen(10), seen(30)], "mosec": [seen(50), seen(5), seen(10)], "triton": []}
    assert serving.times(rounds, "mosec") == 2.0
    assert serving.times(rounds, "triton") is None


def test_the_table_says_whose_access_log_is_on(tmp_path: Path) -> None:
    one = {("JSON", clients): serving.Seen(Load(100, 1.0, 0.0, 0.0), 0.0) for clients in serving.CLIENTS}
    report = Report()
    serving.tell({name: [one] for name in WAYS}, "JSON", report)
    report.write(tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    assert rows[0][1:3] == ["server", "access log"]
    logging = [row[1] for row in rows if row[2] == "yes"]
    assert logging == [WAYS["ray-fastapi"].title, WAYS["bentoml"].title]


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.lock])
def test_each_peer_has_a_lock_that_pins_its_own_release(name: str) -> None:
    lock = WAYS[name].lock
    wanted = (ROOT / f"requirements/peers/{lock}.in").read_text()
    pinned = next(line for line in wanted.splitlines() if "==" in line)
    assert f"\n{pinned} " in "\n" + (ROOT / f"requirements/peers/{lock}.txt").read_text()


def test_a_stranger_among_the_servers_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--only", "triform,nobody"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "nobody: expected some of triform" in done.stderr) == (2, True), done.stderr
