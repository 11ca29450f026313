"""Drives the parts where Ray Data can: in this process, or in an actor on the cluster where this process is a Ray Client.

    drive -> pool.work_parts -> outcomes                                    in the cluster
    drive -> Ray Client -> Foreman, an actor -> pool.work_parts -> outcomes  outside of it (ray://)

Ray Data does not run through Ray Client (Ray 2.60: its executor needs a core worker, and actors cannot stream to a client).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from batch.actor import Outcome
from batch.pool import Pool, first_line, work_parts
from batch.registry import Watch
from triform.errors import JobError, TriformError


def drive(pool: Pool, parts: Sequence[int], *, watch: Watch, **how: Any) -> Iterator[Outcome]:
    """`work_parts`, wherever this process is."""
    import ray.util.client

    if ray.util.client.ray.is_connected():
        return _through_client(pool, parts, watch, how)
    return work_parts(pool, parts, watch=watch, **how)


class Foreman:
    """The actor that runs `work_parts` on the cluster. Our errors are answers: raised, they would bring Ray's traceback."""

    def __init__(self, pool: Pool, parts: Sequence[int], how: dict[str, Any]) -> None:
        self._watch = Watch()
        self._outcomes = work_parts(pool, parts, watch=self._watch, **how)

    def next(self) -> Outcome | TriformError | None:
        """The next outcome, None after the last."""
        try:
            return next(self._outcomes, None)
        except TriformError as error:
            return error

    def under_way(self, known: list[int]) -> dict[int, int]:
        """The rows of unfinished parts, for the driver's `Watch`."""
        return self._watch.ask(known)


def _through_client(pool: Pool, parts: Sequence[int], watch: Watch, how: dict[str, Any]) -> Iterator[Outcome]:
    import ray

    foreman = ray.remote(num_cpus=0, max_concurrency=2)(Foreman).remote(pool, parts, how)
    watch.follow(foreman)
    try:
        while (outcome := ray.get(foreman.next.remote())) is not None:
            if isinstance(outcome, TriformError):
                raise outcome
            watch.finished(outcome.part)
            yield outcome
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise JobError(
            f"the cluster was lost: {first_line(error)} Finished parts are kept, and the same command goes on from here"
        ) from error
    finally:
        with suppress(Exception):  # where the cluster is gone, so is the foreman, and the error above is the one to tell
            ray.kill(foreman)
