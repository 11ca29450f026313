"""What load tests ask for: examples/flights, built and scored where it is not yet -> Flights -> payloads (wording.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich.console import Console

from batch import job
from examples.flights import build, online, scoring
from examples.flights.steps import ForeignFiles
from loadtests.order import Protocol
from loadtests.payloads import Payloads
from loadtests.wording import build as word
from triform.errors import ConfigurationError

POOL: Final = 4_000  # flights that payloads are drawn from


def scored(root: Path, console: Console) -> Path:
    """The folder with the batch job's output, built below `root` as `make demo` does, unless it stands. A Ray that is needed is
    this process's, else one for the time being. Raises `ConfigurationError` for a folder with something else in it."""
    try:
        build.build(root)
    except ForeignFiles as error:
        raise ConfigurationError(f"--example: {error}") from error
    return Path(job.run(scoring.spec(root), console).data)


def payloads(root: Path, data: Path, protocols: tuple[Protocol, ...], seed: int) -> Payloads:
    """Requests for flights of the year, evenly chosen, with what the batch job answered in `data`."""
    return word(online.choose(root, data, POOL), protocols, seed)
