"""Where the time of one part goes: the stages that `ScoredPart.seconds` tells, and samples of the threads' stacks.

The samples are taken every 2 ms and counted by the innermost function of our own, with what it was calling: C++ code that a
function calls counts as that function's. A thread that waits for another is told as waiting.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

from benchmarks.datasets import DataSet
from benchmarks.report import Report
from triform.predictor import Predictor
from triform.runs import inputs
from triform.runs.plan import Pinned, make_plan
from triform.scoring import Layout, Part, ScoredPart, score_part
from triform.sources import Sources

ROUNDS = 5
EVERY = 0.002  # seconds
TOP = 14
WAITS = {"wait", "get", "put", "join", "_wait_for_tstate_lock"}


def run(data: DataSet, report: Report) -> None:
    files = [file for file, _ in inputs.read_files([str(data.files[0])], Sources())]
    layout = Layout(key=data.key, keep=data.keep)
    manifest = data.package.manifest
    plan = make_plan(files, layout, model=manifest.ref, pinned=Pinned(manifest.ref, manifest.digest), repository="")
    part = plan.parts[0]
    predictor = Predictor.load(data.package)
    score(part, predictor, layout)  # imports and caches
    runs = [score(part, predictor, layout) for _ in range(ROUNDS)]
    tell_stages(data, part, runs, report)
    with Sampler() as sampler:
        for _ in range(ROUNDS):
            score(part, predictor, layout)
    rows = [[thread, where, f"{share:.0%}"] for (thread, where), share in sampler.shares()[:TOP]]
    report.table(f"{data.name}: where the threads are found, of the wall time", ["thread", "in", "share"], rows)


def score(part: Part, predictor: Predictor, layout: Layout) -> ScoredPart:
    with tempfile.TemporaryDirectory() as folder:
        return score_part(part, predictor, layout, data=Path(folder) / "data.parquet", dead_letters=Path(folder) / "dead.parquet")


def tell_stages(data: DataSet, part: Part, runs: list[ScoredPart], report: Report) -> None:
    elapsed = statistics.median(run.elapsed for run in runs)
    rows = [["elapsed", f"{elapsed * 1e3:.0f}", f"{elapsed / part.rows * 1e6:.2f}", ""]]
    for stage in runs[0].seconds:
        seconds = statistics.median(run.seconds[stage] for run in runs)
        rows.append([stage, f"{seconds * 1e3:.0f}", f"{seconds / part.rows * 1e6:.2f}", f"{seconds / elapsed:.0%}"])
    report.table(f"{data.name}: one part of {part.rows:,} rows by stage", ["stage", "ms", "s / M rows", "of elapsed"], rows)


class Sampler:
    """Looks at the stack of every thread of this process, until it is left."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.looks = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def shares(self) -> list[tuple[tuple[str, str], float]]:
        return [(key, count / max(1, self.looks)) for key, count in self.counts.most_common()]

    def _look_on(self) -> None:
        while not self._over.wait(EVERY):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            self.looks += 1
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "")
                if name == "MainThread" or name.startswith("triform"):
                    self.counts[name, _where(frame)] += 1


def _where(frame: FrameType | None) -> str:
    """The innermost function of ours, and the line's function of a library below it."""
    below = ""
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if function in WAITS and module in ("threading", "queue"):
            return "waiting for another thread"
        if module.startswith(("triform", "benchmarks")):
            own = f"{module}.{function}:{frame.f_lineno}"
            return f"{own} ({below})" if below else own
        below = f"{module.split('.')[0]}.{function}"
        frame = frame.f_back
    return "elsewhere"
