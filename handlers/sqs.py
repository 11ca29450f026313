"""The function that answers messages of SQS queues, standard and FIFO, with partial batch failures.

    event -> messages -> claim -> decode -> rows of messages for one version stacked -> one run -> results, message by message
                                            a run that fails is tried again alone, message by message
          <- {"batchItemFailures": the ids of those that were not answered}

A body is that of a direct invocation: {"model": ..., "instances": [...]}, or `inputs`, with `version` or `alias` where wanted. A
message that cannot be answered fails alone, and the queue's redrive policy takes it to its dead-letter queue. Of a FIFO queue
nothing is answered after the first message that failed, so that the order is kept. The event source mapping needs
`FunctionResponseTypes: [ReportBatchItemFailures]`.

IAM: sqs:ReceiveMessage, DeleteMessage, GetQueueAttributes on the queue; what _results.py and _idempotency.py say of theirs.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from handlers._boot import Booted, boot
from handlers._idempotency import Claims, open_claims
from handlers._results import Results, open_results
from handlers._snapshots import register
from handlers._telemetry import Context
from triform.errors import DeadlineExceeded, InvalidRequest, LeaseHeld, ResourceExhausted, RunFailed, TriformError
from triform.protocols import tfs
from triform.protocols.bodies import Call, convert, read_json, write_json
from triform.service import Served
from triform.signature import Array, rows_of

log = logging.getLogger("triform.handlers")
_ID: Final = re.compile(r"[A-Za-z0-9-]{1,100}")
_CHOICE: Final = frozenset({"model", "version", "alias", "request_id"})
_BODY: Final = frozenset({"instances", "inputs", "signature_name"})


class Message(msgspec.Struct, frozen=True, rename="camel"):
    """One of an event's records."""

    message_id: str
    body: str
    event_source_a_r_n: str = msgspec.field(name="eventSourceARN", default="")
    attributes: dict[str, str] = {}

    @property
    def fifo(self) -> bool:
        return self.event_source_a_r_n.endswith(".fifo")


class Event(msgspec.Struct, frozen=True):
    records: list[Message] = msgspec.field(name="Records")


class Choice(msgspec.Struct, frozen=True):
    """Which model a body asks."""

    model: str | None = None
    version: int | None = None
    alias: str | None = None
    request_id: str | None = None


class Work:
    """A message on its way."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.started = time.perf_counter()
        self.served: Served | None = None
        self.call: Call | None = None
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] | None = None
        self.error: TriformError | None = None
        self.mine = False  # claimed, so to be given back where it is not answered
        self.answered = False  # now or before
        self.stages: dict[str, float] = {}
        self.batch_rows = 0  # of the run, told once: by the first message in it

    @property
    def waiting(self) -> bool:
        """Whether it is still to be run."""
        return self.mine and self.error is None and self.outputs is None


class Function:
    """One environment's function."""

    def __init__(self, booted: Booted, results: Results, claims: Claims) -> None:
        self.booted = booted
        self.results = results
        self.claims = claims

    def __call__(self, event: Any, context: Context) -> dict[str, list[dict[str, str]]]:
        """The messages that were not answered. Raises `InvalidRequest` for what is no event of a queue."""
        with self.booted.telemetry.invocation(context):
            try:
                messages = msgspec.convert(event, Event).records
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"this is no event of an SQS queue: {error}") from None
            left = context.get_remaining_time_in_millis() / 1000 - self.booted.settings.deadline_margin
            deadline = time.monotonic() + left
            works = {message.message_id: Work(message) for message in messages}  # the same message twice is one
            self._take(works.values(), context)
            for group in _alike(works.values()):
                self._run(group, deadline)
            failed = self._deliver(list(works.values()), deadline)
            return {"batchItemFailures": [{"itemIdentifier": work.message.message_id} for work in failed]}

    def _take(self, works: Iterable[Work], context: Context) -> None:
        """Claims the messages and decodes them."""
        for work in works:
            try:
                work.mine = self.claims.claim(work.message.message_id, context)
                work.answered = not work.mine
                if work.mine:
                    self._decode(work)
            except TriformError as error:
                work.error = error
            except Exception as error:  # noqa: BLE001 - logged in _fault
                work.error = _fault(error)

    def _decode(self, work: Work) -> None:
        if not _ID.fullmatch(work.message.message_id):
            raise InvalidRequest("the message's id is none of SQS's")
        body = read_json(work.message.body.encode(errors="surrogatepass"))
        if not isinstance(body, dict):
            raise InvalidRequest("the message is no JSON object")
        if unknown := sorted(set(body) - _CHOICE - _BODY):
            raise InvalidRequest(f"unknown field(s) {', '.join(name[:40] for name in unknown[:5])}")
        choice, models = convert(body, Choice), self.booted.service.models
        if choice.version is not None and choice.alias is not None:
            raise InvalidRequest("expected version or alias, not both")
        work.served = models.get(choice.model or models.the_default(), version=choice.version, alias=choice.alias)
        started = time.perf_counter()
        work.call = tfs.decode(write_json({name: body[name] for name in _BODY & body.keys()}), work.served)
        work.inputs = work.served.signature.validate(work.call.inputs)
        work.stages["decode"] = time.perf_counter() - started

    def _run(self, group: Sequence[Work], deadline: float) -> None:
        """One run for all; where that fails each by itself, so that only the culprit has the error."""
        assert group[0].served is not None, "decoded"  # noqa: S101 - for the type checker
        predictor, started = group[0].served.predictor, time.perf_counter()
        names = group[0].inputs
        stacked = {name: np.concatenate([work.inputs[name] for work in group]) for name in names} if len(group) > 1 else names
        try:
            outputs = predictor.run(stacked, deadline=deadline)
        except (RunFailed, ResourceExhausted) as error:
            if len(group) == 1:
                group[0].error = error
                return
            for work in group:
                self._run([work], deadline)
            return
        except TriformError as error:
            for work in group:
                work.error = error
            return
        seconds, start = time.perf_counter() - started, 0
        group[0].batch_rows = rows_of(stacked)
        for work in group:
            stop = start + rows_of(work.inputs)
            work.outputs = {name: array[start:stop] for name, array in outputs.items()}
            work.stages["execute"] = seconds
            start = stop

    def _deliver(self, works: Sequence[Work], deadline: float) -> list[Work]:
        """The results, in the order of the messages; returns those that were not answered."""
        failed: list[Work] = []
        for work in works:
            if failed and work.message.fifo:  # what came later must not overtake
                work.error = work.error or LeaseHeld("an earlier message of the queue was not answered")
            elif work.error is None and not work.answered:
                self._answer(work, deadline)
            else:
                self._count(work)
            if not work.answered:
                self._fail(work)
                failed.append(work)
        return failed

    def _answer(self, work: Work, deadline: float) -> None:
        message = work.message
        try:
            with self.booted.service.exchange(message.message_id, started=work.started) as exchange:
                exchange.served, exchange.stages = work.served, work.stages
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("no time was left to deliver the answer")
                assert work.call is not None and work.outputs is not None and work.served is not None  # noqa: S101, PT018
                with exchange.stage("encode"):
                    said = work.call.encode(work.outputs).body
                    head = write_json({"message_id": message.message_id, "model": work.served.manifest.ref})
                    body = head[:-1] + b"," + said[1:]
                self.results.put(message.message_id, body, group=message.attributes.get("MessageGroupId"))
                exchange.rows, exchange.batch_rows = rows_of(work.inputs), work.batch_rows
            work.answered = True
            self.claims.done(message.message_id)
        except TriformError as error:
            work.error = error
        except Exception as error:  # noqa: BLE001 - logged in _fault
            work.error = _fault(error)

    def _count(self, work: Work) -> None:
        """A message that failed before it could be delivered is a request that failed."""
        if work.error is None:
            return
        try:
            with self.booted.service.exchange(work.message.message_id, started=work.started) as exchange:
                exchange.served, exchange.stages = work.served, work.stages
                raise work.error
        except TriformError:
            return

    def _fail(self, work: Work) -> None:
        error = work.error
        log.warning("message %s was not answered: %s", work.message.message_id, error.code if error else "")
        if work.mine:
            try:
                self.claims.give_back(work.message.message_id)
            except TriformError as trouble:  # it runs out by itself
                log.warning("message %s keeps its claim: %s", work.message.message_id, trouble)


def _fault(error: Exception) -> TriformError:
    """A fault of ours with one message is no reason to fail the others."""
    log.exception("a message could not be handled", exc_info=error)
    return TriformError("the function failed; its log knows why")


def _alike(works: Iterable[Work]) -> list[list[Work]]:
    """The messages whose rows can be one run: of one version, and of one shape."""
    groups: dict[Any, list[Work]] = {}
    for work in works:
        if work.waiting and work.served is not None:
            shapes = tuple((name, array.shape[1:], array.dtype.kind) for name, array in work.inputs.items())
            groups.setdefault((work.served.manifest.ref, shapes), []).append(work)
    return list(groups.values())


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
