"""The nightly job of the example, as the demo, the load tests and the tests run it: all flights that were built in a folder."""

from __future__ import annotations

from pathlib import Path

from batch.spec import JobSpec

MODEL = "flight-delay@stable"


def spec(root: Path) -> JobSpec:
    """The job that scores what `build` made in `root`; one that is run again after the example changed takes the new run."""
    return JobSpec(
        repository=str(root / "repository"),
        model=MODEL,
        input=(str(root / "input"),),
        output=str(root / "scored"),
        key=("id",),
        keep=("carrier", "origin", "dest"),
        if_exists="replace",
    )
