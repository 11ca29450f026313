"""Drives the parts through a pool of Ray actors with Ray Data. Only part numbers and outcomes pass through Ray.

    part numbers -> ray.data.from_items -> map_batches(PartScorer or PartComparer, an actor pool) -> outcomes as they come

The hang that a pool as large as the cluster's CPUs causes comes from read tasks that then never get one. Here the actors read
by themselves and no other stage exists, so the pool may take every CPU; it is still cut to what the cluster has, because actors
that never start would wait for ever. Ray starts actors that died again, and gives them their part again, without end (its
default); `attempts.py` sees to it that no part goes on killing them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from batch import shipping
from batch.actor import Outcome, PartScorer
from batch.registry import RemoteAttempts, Watch, start_registry
from batch.spec import JobSpec, actor_range
from triform.errors import ConfigurationError, JobError

REACHABLE_SECONDS = 10.0
STARTS = 2
TOO_LATE = "timed out during startup"  # what Ray 2.60 says when its processes take more than 30 s, as on a machine that is busy
CALLS = 2  # of an actor at a time: one scores, the other places what it has scored


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


def size_pool(
    actors: str | int | None, *, parts: int, cpus: float, gpus: float, cluster: Sequence[Resources], may_grow: bool = False
) -> Pool:
    """The pool for a job: as many actors as asked (None: as fit), never more than there are parts, nor than fit now.

    A cluster that `may_grow` keeps the MAX of "MIN:MAX": its autoscaler sees the actors that wait, and work goes on with those
    that run. Raises `ConfigurationError` where not even one actor fits now, or not MIN of a cluster that may grow.
    """
    fit = sum(_fit(node, cpus, gpus) for node in cluster)
    smallest, largest = actor_range(actors) or (fit, fit)
    keep_largest = may_grow and smallest < largest
    if fit < (needed := min(smallest, parts) if keep_largest else 1):
        has = ", ".join(f"{node.cpus:g} and {node.gpus:g}" for node in cluster[:8]) or "none"
        raise ConfigurationError(
            f"{'no actor fits' if fit < 1 else f'{needed} actors do not fit'} the cluster as it is: each needs {cpus:g} CPU(s) "
            f"and {gpus:g} GPU(s), and its nodes have {has}"
        )
    note = ""
    if largest > fit and not keep_largest:
        note = f"{largest} actors asked for, the cluster has room for {fit}: going on with {fit}"
        largest = fit
    largest = min(largest, parts)
    return Pool(min(smallest, largest), largest, cpus, gpus, note)


def fitting_pool(spec: JobSpec, cluster: Cluster, *, parts: int, threads: int, console: Console) -> Pool:
    """`size_pool` for a job whose models run on so many threads; says where it is not what was asked."""
    pool = size_pool(
        spec.actors,
        parts=parts,
        cpus=spec.cpus or float(threads),
        gpus=spec.gpus,
        cluster=cluster.nodes(),
        may_grow=cluster.may_grow,
    )
    if pool.note:
        console.print(pool.note, highlight=False, soft_wrap=True)
    return pool


def _fit(node: Resources, cpus: float, gpus: float) -> int:
    """How many actors one node has room for: an actor does not span nodes."""
    fit = int(node.cpus / cpus + 1e-9)  # 0.3 / 0.1 is less than 3
    return min(fit, int(node.gpus / gpus + 1e-9)) if gpus else fit


class Cluster:
    """A Ray cluster: the one this process is in already, the one at `address` (or RAY_ADDRESS), or one started here and stopped
    again. To one that was not started here the code of this process is shipped."""

    def __init__(self, address: str | None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._started = False

    @property
    def may_grow(self) -> bool:
        """Whether it may get nodes while a job runs: not if it was started here."""
        return self.address != "local"

    def __enter__(self) -> Cluster:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side writes into the progress; errors are raised
        import ray

        if not ray.is_initialized():
            self._connect()
            self._started = True
        return self

    def _connect(self) -> None:
        import ray

        if self.address == "local":
            _start(include_dashboard=False, object_store_memory=200 << 20)
            return
        _check_reachable(self.address)
        try:
            _init(self.address, runtime_env=shipping.of_driver())
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigurationError(f"address: the cluster at {self.address} cannot be used: {_reason(error)}") from error

    def __exit__(self, *_: object) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def nodes(self) -> list[Resources]:
        import ray

        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Resources(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in alive]


def _init(address: str, **options: Any) -> None:
    import ray

    with _without_stderr():
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)


def _start(**options: Any) -> None:
    """A Ray on this machine, tried again where it was too busy: Ray gives its own processes 30 s. Raises `JobError`.

    What is left of the first ends with this process.
    """
    for _ in range(STARTS):
        try:
            _init("local", **options)
            return
        except Exception as error:  # it has no class of its own
            if TOO_LATE not in str(error):
                raise
    raise JobError(f"Ray did not start, {STARTS} times: this machine is too busy for it; run the same command again later")


def _check_reachable(address: str) -> None:
    """Raises `ConfigurationError` where nobody listens at host:port or ray://host:port: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto", or something that Ray knows or names
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"address: the cluster at {address} cannot be reached: {error}") from error


def _reason(error: Exception) -> str:
    """Ray's first line; a missing token it tells only in the depths of the cause."""
    if "InvalidAuthToken" in f"{error} {error.__cause__}":
        return "it asks for another authentication token: give RAY_AUTH_TOKEN, or the cluster's token in ~/.ray/auth_token"
    return first_line(error)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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


def work_parts(
    pool: Pool, parts: Sequence[int], *, worker: type[PartScorer], args: Sequence[Any], watch: Watch
) -> Iterator[Outcome]:
    """The outcomes of the parts, in the order in which they are done. `worker`: the actors' class, which gets `args` and the
    registry of attempts; `watch` learns how far the other parts are."""
    import ray.data

    _configure(ray.data)
    registry = start_registry()
    watch.follow(registry)
    numbers = ray.data.from_items([{"part": number} for number in parts], override_num_blocks=len(parts))
    fixed = pool.smallest == pool.largest
    outcomes = numbers.map_batches(
        worker,
        fn_constructor_args=(*args, RemoteAttempts(registry)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            **({"size": pool.largest} if fixed else {"min_size": pool.smallest, "max_size": pool.largest}),
            max_tasks_in_flight_per_actor=CALLS,
            max_concurrent_calls_per_actor=CALLS,
            enable_true_multi_threading=True,
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
        raise JobError(
            f"Ray gave up: {first_line(error)} Finished parts are kept, and the same command goes on from here; if it fails "
            "again, look for what kills the worker (memory?) in Ray's log"
        ) from error


def _configure(data: Any) -> None:
    """The job shows its own progress: Ray Data's bars and plan would stand between. A pool grows while all its actors have all
    they take at a time, which is more than 0.9 of it, and shrinks below a quarter: Ray's own bounds are for more parts in flight
    than run at once.
    """
    context = data.DataContext.get_current()
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.9
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.25
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
