"""What a cold start of the Lambda form takes, through the real runtime client: process started -> ready for the first event.

    python -m benchmarks.lambda_cold_start [--rounds 15] [--repository DIR --model NAME] [--plot FILE] [--markdown FILE]

Interleaved rounds, medians: a bare handler that imports numpy and ONNX Runtime and opens the same model; Triform's without and
with Powertools; then what each import and stage takes in fresh processes. The goals: 1.25 and 1.45 times the bare handler. On a
busy machine the CPU time says more than the wall's.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks import plot
from benchmarks.report import Report
from infra.local.environments import ROOT, Environment, FunctionConfig
from infra.local.events import Request, http_v2
from triform import testing
from triform.repository import open_repository, resolve


class Start(NamedTuple):
    """`init`, the CPU time that it took (`cpu`) and `first` (the first request after it) in milliseconds, `peak` in bytes."""

    init: float
    cpu: float
    first: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repository", type=Path, help="a local one; without it, one with a linear model of 30 features is made")
    parser.add_argument("--model", default="linear")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    report = Report()
    for folder in "triform", "handlers", "benchmarks/functions":  # as in the layers: else each start may compile them
        compileall.compile_dir(ROOT / folder, quiet=2)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.repository.absolute() if given.repository else made(Path(scratch))
        repository = open_repository(root)
        package = repository.package(*resolve(repository, given.model))
        settings = {"TRIFORM_REPOSITORY": str(root), "TRIFORM_DEFAULT_MODEL": given.model, "TRIFORM_ALLOW_ANONYMOUS": "true"}
        ways = {
            "bare": FunctionConfig("benchmarks.functions.bare.handler", {**os.environ, "BENCH_MODEL": str(package.model_path)}),
            "triform": FunctionConfig(environ={**os.environ, **settings, "TRIFORM_TELEMETRY": "none"}),
            "triform and Powertools": FunctionConfig(environ={**os.environ, **settings}),
        }
        starts = measured(ways, given.rounds, f"/v2/models/{given.model}")
        spans = [stages(settings) for _ in range(given.rounds)]
    show(report, starts, spans, package.manifest.ref)
    if given.markdown:
        report.write(given.markdown)
    if given.plot:
        draw(given.plot, spans)


def made(folder: Path) -> Path:
    """A repository with one linear model."""
    testing.repository(folder / "models", {"linear": testing.linear(folder / "linear.onnx", features=30)})
    return folder / "models"


def measured(ways: Mapping[str, FunctionConfig], rounds: int, path: str) -> dict[str, list[Start]]:
    """Starts of each way in turn; the first round warms the disk and is not counted."""
    event = json.dumps(http_v2(Request("GET", path, "", [], b""))).encode()
    starts: dict[str, list[Start]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, config in ways.items():
            start = once(config, event)
            if i:
                starts[name].append(start)
    return starts


def once(config: FunctionConfig, event: bytes) -> Start:
    lines: list[str] = []
    environment = Environment(config, "on-demand", lines.append)
    try:
        failed = environment.start()
        assert failed is None, (failed, lines)
        assert environment.init_ms is not None
        cpu = cpu_ms(environment.pid)
        began = time.perf_counter()
        outcome = environment.invoke("first", event)
        took = (time.perf_counter() - began) * 1e3
        assert outcome.error is None, outcome
        assert json.loads(outcome.payload)["statusCode"] == 200, outcome
        return Start(environment.init_ms, cpu, took, environment.peak_bytes())
    finally:
        environment.close()


def cpu_ms(pid: int) -> float:
    """User and system time of the process so far (proc(5): fields 14 and 15 of stat, in clock ticks)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


def stages(settings: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each import and stage, in a fresh process."""
    environ = {**settings, "PYTHONPATH": str(ROOT), "BENCH_BEGUN": str(time.time())}
    command = [sys.executable, "-m", "benchmarks.functions.stages"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, timeout=120, check=True)
    spent: dict[str, float] = json.loads(done.stdout)
    return spent


def show(report: Report, starts: Mapping[str, Sequence[Start]], spans: Sequence[Mapping[str, float]], ref: str) -> None:
    bare = [start.init for start in starts["bare"]]
    bare_cpu = median(start.cpu for start in starts["bare"])
    rows = []
    for name, seen in starts.items():
        inits = [start.init for start in seen]
        low, high = np.quantile(inits, (0.25, 0.75))
        ratio = median(init / beside for init, beside in zip(inits, bare, strict=True))
        cpu = median(start.cpu for start in seen)
        peak = median(start.peak for start in seen) / 2**20
        rows.append([
            name, f"{median(inits):.0f}", f"{ratio:.2f}", f"{(high - low) / median(inits):.0%}",
            f"{cpu:.0f}", f"{cpu / bare_cpu:.2f}", f"{median(start.first for start in seen):.1f}", f"{peak:.0f}",
        ])  # fmt: skip
    title = f"Cold start of {ref}, {len(bare)} interleaved rounds, medians"
    report.table(
        title, ["handler", "init ms", "ratio to bare", "spread", "CPU ms", "ratio", "first request ms", "peak RSS MB"], rows
    )
    steps = [[name, f"{median(span[name] for span in spans) * 1e3:.1f}"] for name in spans[0]]
    report.table(f"What a start is made of, {len(spans)} fresh processes, medians", ["import or stage", "ms"], steps)


def draw(path: Path, spans: Sequence[Mapping[str, float]]) -> None:
    names = list(spans[0])
    labels = [name.replace("boot: ", "").replace(", ", ",\n") for name in names]
    plot.bars(path, "A cold start", labels, {"median": [median(s[n] for s in spans) * 1e3 for n in names]}, "ms")


if __name__ == "__main__":
    main()
