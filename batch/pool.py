"""Drives the parts through a pool of Ray actors with Ray Data. Only part numbers and outcomes pass through Ray.

    part numbers -> ray.data.from_items -> map_batches(PartScorer, an actor pool) -> outcomes as they come

The hang that a pool as large as the cluster's CPUs causes comes from read tasks that then never get one. Here the actors read
by themselves and no other stage exists, so the pool may take every CPU; it is still cut to what the cluster has, because actors
that never start would wait for ever. Ray starts actors that died again, and gives them their part again, without end (its
default); `attempts.py` sees to it that no part goes on killing them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batch.actor import Outcome, PartScorer
from batch.registry import RemoteAttempts, Watch, start_registry
from batch.spec import actor_range
from triform.errors import ConfigurationError, JobError
from triform.runtime import RuntimeOptions


class Resources(NamedTuple):
    """What a node has, in Ray's units."""

    cpus: float
    gpus: float


class Pool(NamedTuple):
    """How many actors, and what each asks Ray for. `note` says where this is not what was asked."""

    smallest: int
    largest: int
    cpus: float
    gpus: float
    note: str = ""


def size_pool(actors: str | int | None, *, parts: int, threads: int, gpus: float, cluster: Sequence[Resources]) -> Pool:
    """The pool for a job: as many actors as asked (None: as fit), never more than fit or than there are parts.

    Raises `ConfigurationError` where not even one fits.
    """
    fit = sum(_fit(node, threads, gpus) for node in cluster)
    if fit < 1:
        raise ConfigurationError(
            f"no actor fits the cluster: each needs {threads} CPU(s) and {gpus:g} GPU(s), "
            f"and its nodes have {', '.join(f'{node.cpus:g} and {node.gpus:g}' for node in cluster[:8])}"
        )
    smallest, largest = actor_range(actors) or (fit, fit)
    note = ""
    if largest > fit:
        note = f"{largest} actors asked for, the cluster has room for {fit}: going on with {fit}"
    largest = max(1, min(largest, fit, parts))
    return Pool(min(smallest, largest), largest, float(threads), gpus, note)


def _fit(node: Resources, threads: int, gpus: float) -> int:
    """How many actors one node has room for: an actor does not span nodes."""
    fit = int(node.cpus // threads)
    return min(fit, int(node.gpus / gpus + 1e-9)) if gpus else fit


class Cluster:
    """A Ray cluster: the one at `address`, the one this process is in already, or one started here and stopped again."""

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._started = False

    def __enter__(self) -> Cluster:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side writes into the progress; errors are raised
        import ray

        if not ray.is_initialized():
            local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 200 << 20} if self.address is None else {}
            with _without_stderr():
                ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False, **local)
            self._started = True
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def nodes(self) -> list[Resources]:
        import ray

        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Resources(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in alive]


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's C++ side announces there that it was told to be quiet; what goes wrong is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def score_parts(
    pool: Pool, parts: Sequence[int], *, output: str, run: str, options: RuntimeOptions, max_dead: int, watch: Watch
) -> Iterator[Outcome]:
    """The outcomes of the parts, in the order in which they are done. `watch` learns how far the others are."""
    import ray.data

    _quiet(ray.data)
    registry = start_registry()
    watch.follow(registry)
    numbers = ray.data.from_items([{"part": number} for number in parts], override_num_blocks=len(parts))
    fixed = pool.smallest == pool.largest
    outcomes = numbers.map_batches(
        PartScorer,
        fn_constructor_args=(output, run, options, max_dead, RemoteAttempts(registry)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            **({"size": pool.largest} if fixed else {"min_size": pool.smallest, "max_size": pool.largest}),
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    try:
        for row in outcomes.iter_rows():
            outcome = msgspec.json.decode(row["outcome"], type=Outcome)
            watch.finished(outcome.part)
            yield outcome
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise JobError(
            f"Ray gave up: {reason} Finished parts are kept, and the same command goes on from here; if it fails again, look for "
            "what kills the worker (memory?) in Ray's log"
        ) from error


def _quiet(data: Any) -> None:
    """The job shows its own progress: Ray Data's bars and plan would stand between."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
