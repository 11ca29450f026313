"""One part in a process of its own: what becomes of a part over which two actors have died.

    actor: score_alone(Work) -> python -m batch.alone: limits, PartScorer in small batches -> Outcome, or how the process died

The child is the first that the kernel ends when memory runs out, may take half of what is free, and ends with its actor. So
whatever kills it kills nothing else, and what it died of can be told.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from triform.errors import PartCrashed
from triform.golden import child_env
from triform.runtime import RuntimeOptions

BATCH_ROWS: Final = 256
MEMORY_SHARE: Final = 0.5  # of the free memory: two actors of a node may each have such a child
LEAST_MEMORY: Final = 512 << 20  # a model must be loaded at all
CGROUP: Final = Path("/sys/fs/cgroup")


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told, on its standard input."""

    output: str
    run: str
    part: int
    options: RuntimeOptions
    max_dead: int


def score_alone(work: Work) -> bytes:
    """The child's `Outcome` as JSON. Raises `PartCrashed`, saying how, where the child died."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "batch.alone"], env=child_env(), **pipes) as child:
        assert child.stdin is not None  # noqa: S101 - for mypy: both are pipes
        assert child.stdout is not None  # noqa: S101
        try:
            with suppress(BrokenPipeError):  # it died before it read
                child.stdin.write(msgspec.json.encode(work) + b"\n")
                child.stdin.flush()  # and stays open: its end tells the child that this process is gone
            answer: bytes = child.stdout.read()
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
    if child.returncode:
        raise PartCrashed(how_it_died(child.returncode))
    return answer


def how_it_died(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, most likely because memory ran out" if -code == signal.SIGKILL else name


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """Bytes that this process may still take: of the machine and, if it has one, of its cgroup (v2). None: unknown."""
    free: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) << 10)
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        used = int((cgroup / "memory.current").read_text()) - _reclaimable(cgroup)
        free.append(int((cgroup / "memory.max").read_text()) - used)
    return max(0, min(free)) if free else None


def _reclaimable(cgroup: Path) -> int:
    """What the cgroup holds of files and could give back: reading Parquet fills it, and the kernel counts that as used."""
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(stat.get("inactive_file", 0)) + int(stat.get("slab_reclaimable", 0))
    return 0


def limit_this_process(provider: str) -> None:
    """The kernel ends it first; on a CPU, memory beyond its share is refused, which scoring answers with smaller batches."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    free = free_memory()
    if provider == "cpu" and free is not None:  # CUDA reserves far more than it uses
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = max(LEAST_MEMORY, int(free * MEMORY_SHARE))
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def end_with_parent() -> None:
    """Waits for the end of standard input in a thread: the parent, which holds its other side, is gone then."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="batch-parent", daemon=True).start()


def main() -> None:
    """The child. What a library prints goes to standard error, so that standard output holds the answer alone."""
    from batch.actor import PartScorer

    with os.fdopen(0, "rb", buffering=0, closefd=False) as orders:
        work = msgspec.json.decode(orders.readline(), type=Work)
    answers = os.dup(1)
    os.dup2(2, 1)
    end_with_parent()
    limit_this_process(work.options.provider)
    scorer = PartScorer(work.output, work.run, work.options, work.max_dead, most_rows=BATCH_ROWS)
    answer = msgspec.json.encode(scorer.score(work.part))
    file = os.fdopen(answers, "wb")
    file.write(answer)
    file.flush()  # closed, it would let the parent go, and then `end_with_parent` might be first
    os._exit(0)  # a library's clean-up has no say in whether the part was scored


if __name__ == "__main__":
    main()
