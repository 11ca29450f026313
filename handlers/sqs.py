"""The function that answers messages of SQS queues, standard and FIFO, with partial batch failures.

    event -> _messages.py -> claim -> decode -> _stacking.py: rows of messages for one version -> one run -> results
                                                a run that fails is made again message by message
          <- {"batchItemFailures": the ids of those that were not answered}

A message that cannot be answered fails alone, and the queue's redrive policy takes it to its dead-letter queue. The answers of a
run are delivered before the next run is made, so that one without end takes no other's answer with it. Of a FIFO queue nothing is
answered after the first message that failed, so that the order is kept. The event source mapping needs
`FunctionResponseTypes: [ReportBatchItemFailures]`.

IAM: sqs:ReceiveMessage, DeleteMessage, GetQueueAttributes on the queue; what _results.py and _idempotency.py say of theirs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np

from handlers._boot import Booted, boot
from handlers._idempotency import Claims, open_claims
from handlers._messages import Question, Work, decode, messages_of
from handlers._results import Results, open_results
from handlers._snapshots import register
from handlers._stacking import Runs
from handlers._telemetry import Context
from triform.errors import DeadlineExceeded, LeaseHeld, TriformError
from triform.protocols.bodies import write_json
from triform.signature import Array, rows_of

log = logging.getLogger("triform.handlers")


class Function:
    """One environment's function."""

    def __init__(self, booted: Booted, results: Results, claims: Claims) -> None:
        self.booted = booted
        self.results = results
        self.claims = claims

    def __call__(self, event: Any, context: Context) -> dict[str, list[dict[str, str]]]:
        """The messages that were not answered. Raises `InvalidRequest` for what is no event of a queue."""
        with self.booted.telemetry.invocation(context):
            left = context.get_remaining_time_in_millis() / 1000 - self.booted.settings.deadline_margin
            deadline = time.monotonic() + left
            works = messages_of(event)
            fifo = any(work.message.fifo for work in works)
            self._answer(Runs(self._take(works, context, fifo=fifo), fifo=fifo), deadline)
            failed = [work for work in works if not work.answered]
            for work in failed:
                self._fail(work)
            return {"batchItemFailures": [{"itemIdentifier": work.message.message_id} for work in failed]}

    def _take(self, works: Sequence[Work], context: Context, *, fifo: bool) -> list[Question]:
        """Claims the messages and reads them."""
        questions = []
        for work in works:
            with _alone(work):
                work.mine = self.claims.claim(work.message.message_id, context)
                work.answered = not work.mine
                if work.mine:
                    questions.append(decode(work, self.booted.service.models))
            if fifo and work.error is not None:
                break
        return questions

    def _answer(self, runs: Runs, deadline: float) -> None:
        """A run for each group; one that fails is made again message by message, so that only the culprit has the error."""
        for group in runs:
            now = time.monotonic()
            try:
                answers = _run(group, now + runs.share(group, deadline - now))
            except (TriformError, ValueError, MemoryError) as error:
                if len(group) > 1:
                    runs.split(group)
                    continue
                group[0].work.error = _fault(error)
            else:
                self._deliver(group, answers, deadline)
            if runs.fifo and not group[-1].work.answered:
                return  # what came later must not overtake

    def _deliver(self, group: Sequence[Question], answers: Sequence[dict[str, Array]], deadline: float) -> None:
        for question, outputs in zip(group, answers, strict=True):
            with _alone(question.work):
                self._put(question, outputs, deadline)
            if question.work.message.fifo and not question.work.answered:
                return

    def _put(self, question: Question, outputs: dict[str, Array], deadline: float) -> None:
        work, message = question.work, question.work.message
        work.recorded = True
        with self.booted.service.exchange(message.message_id, started=work.started) as exchange:
            exchange.served, exchange.stages = work.served, work.stages
            if time.monotonic() > deadline:
                raise DeadlineExceeded("no time was left to deliver the answer")
            began = exchange.begin("encode")
            try:
                said = question.call.encode(outputs).body
                head = write_json({"message_id": message.message_id, "model": question.served.manifest.ref})
                body = head[:-1] + b"," + said[1:]
            finally:
                exchange.end("encode", began)
            self.results.put(message.message_id, body, group=message.attributes.get("MessageGroupId"))
            exchange.rows, exchange.batch_rows = rows_of(question.inputs), work.batch_rows
        work.answered = True
        self.claims.done(message.message_id)

    def _fail(self, work: Work) -> None:
        """It comes again. A message that got no answer is a request that failed."""
        error = work.error or LeaseHeld("an earlier message of the queue was not answered")
        log.warning("message %s was not answered: %s", work.message.message_id, error.code)
        if not work.recorded:
            with suppress(TriformError), self.booted.service.exchange(work.message.message_id, started=work.started) as exchange:
                exchange.served, exchange.stages = work.served, work.stages
                raise error
        if work.mine:
            try:
                self.claims.give_back(work.message.message_id)
            except TriformError as trouble:  # it runs out by itself
                log.warning("message %s keeps its claim: %s", work.message.message_id, trouble)


def _run(group: Sequence[Question], deadline: float) -> list[dict[str, Array]]:
    """One run for all: the outputs that are each message's. Raises as `Predictor.run`, and what cannot be stacked."""
    first, started = group[0], time.perf_counter()
    stacked = first.inputs
    if len(group) > 1:
        stacked = {name: np.concatenate([question.inputs[name] for question in group]) for name in stacked}
    outputs = first.served.predictor.run(stacked, deadline=deadline)
    seconds, answers, start = time.perf_counter() - started, [], 0
    first.work.batch_rows = rows_of(stacked)
    for question in group:
        stop = start + rows_of(question.inputs)
        answers.append({name: array[start:stop] for name, array in outputs.items()})
        question.work.stages["execute"] = seconds
        start = stop
    return answers


@contextmanager
def _alone(work: Work) -> Iterator[None]:
    """What is raised inside is this message's error, and no reason to fail the others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is logged in _fault
        work.error = _fault(error)


def _fault(error: Exception) -> TriformError:
    if isinstance(error, TriformError):
        return error
    log.exception("a message could not be handled", exc_info=error)
    return TriformError("the function failed; its log knows why")


def start(environ: Mapping[str, str]) -> Function:
    """The function of an environment. Raises what `boot` raises."""
    booted = boot(environ)
    settings = booted.settings
    claims = open_claims(settings.idempotency_table, settings.idempotency_seconds)
    return Function(booted, open_results(settings.results), claims)


function: Final = start(os.environ)
register(function.booted, lambda: None)


def handler(event: Any, context: Context) -> dict[str, list[dict[str, str]]]:
    """Lambda's entry point: `handlers.sqs.handler`."""
    return function(event, context)
