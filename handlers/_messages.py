"""The messages of an SQS event, and what each asks: a body is that of a direct invocation.

event -> messages_of -> [Work, ...]          decode(work) -> Question: the version that is asked, arrays by input
"""

from __future__ import annotations

import re
import time
from typing import Any, Final, NamedTuple

import msgspec

from triform.errors import InvalidRequest, TriformError
from triform.models import Models, Served
from triform.protocols import tfs
from triform.protocols.bodies import Call, convert, read_json, write_json
from triform.signature import Array

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


class _Event(msgspec.Struct, frozen=True):
    records: list[Message] = msgspec.field(name="Records")


class _Choice(msgspec.Struct, frozen=True):
    """Which model a body asks."""

    model: str | None = None
    version: int | None = None
    alias: str | None = None
    request_id: str | None = None


class Work:
    """A message on its way, and what has become of it. `place`: where in the event it stands."""

    def __init__(self, message: Message, place: int) -> None:
        self.message = message
        self.place = place
        self.started = time.perf_counter()
        self.served: Served | None = None
        self.stages: dict[str, float] = {}
        self.error: TriformError | None = None
        self.mine = False  # claimed, so to be given back where it is not answered
        self.answered = False  # now or before
        self.batch_rows = 0  # of the run, told once: by the first message in it
        self.recorded = False  # as a request, well or not


class Question(NamedTuple):
    """A message that was read: `inputs` fit the signature of the version that is to answer."""

    work: Work
    served: Served
    call: Call
    inputs: dict[str, Array]


def messages_of(event: Any) -> list[Work]:
    """The event's messages; the same one twice is one. Raises `InvalidRequest` for what is no event of a queue."""
    try:
        messages = msgspec.convert(event, _Event).records
    except ValueError as error:  # msgspec's, or half a surrogate pair in a key
        raise InvalidRequest(f"this is no event of an SQS queue: {error}") from None
    return list({message.message_id: Work(message, place) for place, message in enumerate(messages)}.values())


def decode(work: Work, models: Models) -> Question:
    """Raises `InvalidRequest` and its kinds, and what loading the model raises."""
    if not _ID.fullmatch(work.message.message_id):
        raise InvalidRequest("the message's id is none of SQS's")
    body = read_json(work.message.body.encode(errors="surrogatepass"))
    if not isinstance(body, dict):
        raise InvalidRequest("the message is no JSON object")
    if unknown := sorted(set(body) - _CHOICE - _BODY):
        raise InvalidRequest(f"unknown field(s) {', '.join(name[:40] for name in unknown[:5])}")
    choice = convert(body, _Choice)
    if choice.version is not None and choice.alias is not None:
        raise InvalidRequest("expected version or alias, not both")
    work.served = models.get(choice.model or models.the_default(), version=choice.version, alias=choice.alias)
    started = time.perf_counter()
    call = tfs.decode(write_json({name: body[name] for name in _BODY & body.keys()}), work.served)
    inputs = work.served.signature.validate(call.inputs)
    work.stages["decode"] = time.perf_counter() - started
    return Question(work, work.served, call, inputs)
