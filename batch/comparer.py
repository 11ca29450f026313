"""What a Ray actor does for `run --compare`: loads both versions once, then compares committed parts, one after another.

part -> attempts.begin -> 0 or 1 deaths: compare_part    2: recorded as crashed, and never tried again
                                     -> Comparison.add -> Outcome
"""

from __future__ import annotations

from batch.actor import Outcome, PartScorer, pinned_predictor, told
from batch.attempts import IN_ACTOR, Registry
from batch.excerpts import part_table
from triform.comparing import compare_part
from triform.disagreement import ComparedPart, crashed
from triform.errors import NotReconciled
from triform.predictor import Predictor
from triform.rollout.policy import Policy
from triform.runs.comparison import Comparison
from triform.runs.plan import Pinned
from triform.runtime import RuntimeOptions


class PartComparer(PartScorer):
    """The callable class of `map_batches`, as `PartScorer` is. A candidate that kills two processes over a part is not asked for
    it again."""

    def __init__(
        self, output: str, run: str, options: RuntimeOptions, candidate: Pinned, policy: Policy, attempts: Registry | None = None
    ) -> None:
        self.candidate = candidate
        super().__init__(output, run, options, 0, attempts)
        self.comparison = Comparison(self.folder, candidate, policy)

    def _open(self) -> Predictor:
        """The run's own version; the candidate beside it."""
        self.beside = pinned_predictor(self.plan.repository, self.candidate, self.options)
        return super()._open()

    def score(self, number: int) -> Outcome:
        compared, deaths = None, 0
        try:
            with self._turn:
                deaths = self.attempts.begin(number, self.me)
                self._check_ready()
                compared = self.comparison.record(number) or self.comparison.add(self._compared(number, deaths))
        except Exception as error:  # noqa: BLE001 - told as data, as `PartScorer` does
            return Outcome(number, None, *told(error), attempts=deaths + 1)
        finally:
            self.attempts.end(number, self.me, scored=compared is not None)
        return Outcome(number, attempts=deaths + 1, compared=compared)

    def _compared(self, number: int, deaths: int) -> ComparedPart:
        record, part = self.folder.record(number), self.plan.parts[number]
        if record is None:
            raise NotReconciled(f"part {number} of {self.folder.location} has no record: only committed runs are compared")
        if deaths >= IN_ACTOR:
            return crashed(number, record.rows_out, f"{part.label}: {deaths} processes died while {self.candidate.ref} was asked")
        predictor = self.predictor or self._load()
        with part_table(self.folder, self.folder.data(committed=True), number) as answers:
            return compare_part(
                part,
                predictor,
                self.beside,
                answers=answers,
                refused=self._refused(number) if record.dead else {},
                edges=self.comparison.edges,
                sources=self.sources,
                on_rows=lambda rows: self.attempts.rows(number, self.me, rows),
            )

    def _refused(self, number: int) -> dict[int, str]:
        with part_table(self.folder, self.folder.dead_letters(committed=True), number) as letters:
            table = letters.read(["row_number", "code"], use_threads=False)
        return dict(zip(table["row_number"].to_pylist(), table["code"].to_pylist(), strict=True))
