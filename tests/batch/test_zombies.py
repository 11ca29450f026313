"""An attempt that was given up but goes on: whatever happened meanwhile, there is one set of rows and one answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batch.actor import PartScorer
from batch.attempts import Attempt, OneProcess
from tests.batch.workbench import Workbench, assert_each_row_once, visible
from triform.errors import JobError
from triform.runs.commit import commit
from triform.runtime import RuntimeOptions


class GivenUp(OneProcess):
    """In the middle of its part, after the first rows were read, something happens."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = [meanwhile]

    def rows(self, part: int, attempt: Attempt, rows: int) -> None:
        super().rows(part, attempt, rows)
        if self._meanwhile:
            self._meanwhile.pop()()


@pytest.mark.parametrize("meanwhile", ["scored", "committed"])
def test_a_zombie_adds_nothing_to_what_another_has_done(workbench: Workbench, meanwhile: str) -> None:
    """The part is placed by another attempt; or the whole run is committed and its attempts' files are swept away."""
    workbench.write_some(2)
    folder, _ = workbench.begin()
    work = {"scored": lambda: workbench.score(0), "committed": workbench.score_and_run}[meanwhile]
    zombie = PartScorer(str(workbench.output), folder.run, RuntimeOptions(), 1000, GivenUp(work))
    outcome = zombie.score(0)
    assert outcome.scored is not None, outcome.error
    if meanwhile == "scored":
        assert visible(workbench.output) == []
    summary = workbench.score_and_run() if meanwhile == "scored" else workbench.run()
    assert_each_row_once(summary.folder, 200)
    assert outcome.scored.data == summary.manifest.parts[0].data
    assert not list(Path(summary.folder).glob("**/*.*data*"))


def test_an_input_that_changes_while_it_is_scored_fails_before_the_commit(workbench: Workbench) -> None:
    """The part may be scored to its end, from the file that was opened; the change is found before anybody sees a row."""
    workbench.write_some(2)
    folder, plan = workbench.begin()
    changed = GivenUp(lambda: workbench.write("0.parquet", 500))
    scorer = PartScorer(str(workbench.output), folder.run, RuntimeOptions(), 1000, changed)
    scorer.score(0)
    assert scorer.score(1).scored
    with pytest.raises(JobError, match=r"0\.parquet|part 0"):
        commit(folder, plan, max_dead_letters=0.5, if_exists="fail")
    assert visible(workbench.output) == []
