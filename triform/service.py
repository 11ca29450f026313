"""The one way a request goes through the models that a host serves (models.py): online forms share it, whatever their protocol.

    protocol decodes -> Exchange.infer(arrays) -> Execute -> Predictor.run -> arrays -> protocol encodes
                        Exchange ends, well or not -> exactly one InferenceRecord (of each version that answers)

`Execute` is the one step that may wait: `run_here` does not, and runs the model in the thread that asks; `batching.py` has one
that waits for a slot and runs in other threads.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

import msgspec

from triform.deadlines import check
from triform.errors import InvalidRequest, ResourceExhausted, TriformError
from triform.models import Models, Served
from triform.signature import Array, rows_of
from triform.telemetry import UNKNOWN, InferenceRecord

if TYPE_CHECKING:  # which know what is served
    from triform.protocols.bodies import Call
    from triform.tally import Tally

CANCELLED: Final = "cancelled"  # a record's code where the caller, or the process, gave the request up


class Ran(NamedTuple):
    """What came of a run. `outputs` are the request's own, of shape [rows, ...]; `batch_rows` ran together, and one of them is
    `first`. Times in seconds: it was `queued`, and on its way to another process and back (`hop`), where it ran there."""

    outputs: dict[str, Array]
    batch_rows: int
    queued: float = 0.0
    hop: float = 0.0
    first: bool = True


Execute = Callable[[Served, Mapping[str, Array], float | None], Awaitable[Ran]]
T = TypeVar("T")
# Bytes of JSON with long numbers (of other, by `bodies.effort`): to read them takes about 5 ms, for which one thread of Python
# keeps the others waiting unless told otherwise.
LARGE: Final = 512 << 10


class Aside(Protocol):
    """Does `work` on so many bytes in a thread, so that the event loop goes on meanwhile; `urgent`: it ends a request.

    Raises `Overloaded`, `DeadlineExceeded` when it comes, and what `work` raises.
    """

    def __call__(self, work: Callable[[], T], size: int, deadline: float | None, *, urgent: bool = False) -> Awaitable[T]: ...


async def run_here(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
    """Runs the model in this thread; never waits."""
    return Ran(served.predictor.run(inputs, deadline=deadline), rows_of(inputs))


class Exchange:
    """One request on its way, for the block that it is entered for: what it came to is recorded when that is left. `started`: a
    `time.perf_counter()`."""

    before: tuple[InferenceRecord, ...] = ()  # of the versions that have answered their rows already, where several do
    served: Served | None = None
    rows = 0
    batch_rows = 0  # of the run, others' rows too; 0 where another request of the run tells it
    outputs: Mapping[str, Array] = MappingProxyType({})  # of the latest run
    dead_letters: Mapping[str, int] = MappingProxyType({})  # rows by error code, of a request that may refuse some
    tally: Tally | None = None  # that counts it, too, if it ends well
    instead_of: tuple[int, str] | None = None  # the version that failed the request before, and the error's code

    def __init__(
        self,
        models: Models,
        execute: Execute,
        request_id: str,
        deadline: float | None,
        caller: str = "",
        started: float = 0.0,
    ) -> None:
        self.models = models
        self.started = started
        self._execute = execute
        self.request_id = request_id
        self.caller = caller
        self.deadline = deadline
        self.stages: dict[str, float] = {}

    def choose(self, model: str | None, *, version: int | None = None, alias: str | None = None) -> Served:
        """The version that is to answer."""
        self.served = self.models.get(model or self.models.the_default(), version=version, alias=alias)
        return self.served

    @property
    def chosen(self) -> Served:
        assert self.served is not None, "choose comes first"  # noqa: S101 - a fault of ours
        return self.served

    @property
    def refs(self) -> str:
        """The exact versions that answer: name/1, or name/1, name/2 where each has rows of its own."""
        ref = "" if self.served is None else self.served.manifest.ref
        return ", ".join([*(f"{r.model}/{r.version}" for r in self.before), ref]) if self.before else ref

    def turn_to(self, served: Served) -> None:
        """The next version that answers rows of the request: the one before has answered its own."""
        self.before = (*self.before, _record(self, "ok", 0.0))
        self.served, self.rows, self.batch_rows, self.stages, self.outputs = served, 0, 0, {}, {}

    def fall_back(self, served: Served) -> None:
        """That version answers all of the request: what others made of it is forgotten."""
        self.before = ()
        self.served, self.rows, self.batch_rows, self.stages, self.outputs = served, 0, 0, {}, {}

    def again(self, served: Served) -> Exchange:
        """The same request, to be tried with that version. Nothing records it, unless `ended` is called."""
        exchange = Exchange(self.models, self._execute, self.request_id, self.deadline, self.caller)
        exchange.served = served
        return exchange

    def ended(self, code: str, seconds: float) -> None:
        """Records what it came to: "ok" or an error's code."""
        record = _record(self, code, seconds)
        self.models.telemetry.record(record)
        if self.tally is not None and code == "ok":
            self.tally.answered(record, self.outputs)

    def read(self, decode: Callable[[], Call]) -> tuple[Call, dict[str, Array]]:
        """The call, and its inputs as the chosen version takes them."""
        assert self.served is not None, "choose comes first"  # noqa: S101 - a fault of ours
        call = decode()
        return call, self.served.signature.validate(call.inputs)

    def begin(self, stage: str) -> float:
        """The `time.perf_counter()` at which the stage begins: decode, execute or encode.

        Raises `DeadlineExceeded` where there is no time left to begin it.
        """
        if self.deadline is not None and time.monotonic() >= self.deadline:
            check(self.deadline, f"the stage '{stage}'")
        return time.perf_counter()

    def end(self, stage: str, began: float) -> None:
        """Counts the time since then as the stage's."""
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - began

    async def infer(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The chosen version's answer; arrays of shape [rows, ...] by name.

        Raises as `Predictor.predict`, `Overloaded`, and `DeadlineExceeded`.
        """
        began = self.begin("decode")
        try:
            checked = self.chosen.signature.validate(inputs)
        finally:
            self.end("decode", began)
        return await self.infer_checked(checked)

    async def infer_checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The same for arrays that fit the chosen version's signature."""
        assert self.served is not None, "choose comes first"  # noqa: S101 - a fault of ours
        began = self.begin("execute")
        try:
            ran = await self._execute(self.served, inputs, self.deadline)
        finally:
            self.end("execute", began)
        if ran.queued:
            self.stages["queue"] = ran.queued
        if ran.hop:
            self.stages["hop"] = ran.hop
        self.stages["execute"] -= ran.queued + ran.hop
        self.rows, self.batch_rows = rows_of(inputs), ran.batch_rows if ran.first else 0
        self.outputs = ran.outputs
        return ran.outputs

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        told, seconds = error, time.perf_counter() - self.started
        code = "ok"
        if error is not None:
            told = _told(error)
            code = _code(told)
        if self.before and code == "ok":  # one that failed is recorded for the version that failed it
            for record in self.before:
                self.models.telemetry.record(msgspec.structs.replace(record, seconds=seconds))
        self.ended(code, seconds)
        if told is not error and told is not None:
            try:
                raise told from (error if isinstance(error, MemoryError) else None)  # not from a stack a thousand frames deep
            finally:
                del told, error  # else it holds this frame, and this frame it, and so the memory that ran out


def _told(error: BaseException) -> BaseException:
    """What the caller is told instead of what Python raises for a request that is too much for it."""
    if isinstance(error, TriformError):
        return error
    if isinstance(error, MemoryError):
        return ResourceExhausted("memory ran out while the request was answered; send fewer rows at a time")
    return InvalidRequest("the body is nested too deeply") if isinstance(error, RecursionError) else error


def _code(error: BaseException) -> str:
    if isinstance(error, TriformError):
        return error.code
    return TriformError.code if isinstance(error, Exception) else CANCELLED


class InferenceService:
    """What a host runs: its models, how they are run, and a record of each request.

    `aside`: for a host with an event loop (`aside.OneByOne`).
    """

    def __init__(self, models: Models, execute: Execute = run_here, aside: Aside | None = None) -> None:
        self.models = models
        self.execute = execute
        self.aside = aside

    async def do(self, work: Callable[[], T], size: int, deadline: float | None, *, urgent: bool = False) -> T:
        """What `work` on so many bytes returns; on many it is done aside. Raises as `Aside`."""
        if self.aside is None or size < LARGE:
            return work()
        return await self.aside(work, size, deadline, urgent=urgent)

    def is_small(self, size: int) -> bool:
        """Whether to `do` work on so many bytes is to do it here and now."""
        return self.aside is None or size < LARGE

    def exchange(
        self, request_id: str, *, deadline: float | None = None, started: float | None = None, caller: str = ""
    ) -> Exchange:
        """One inference request, from `started` (`time.perf_counter()`; now) to the end of the block.

        `deadline`: a `time.monotonic()` after which the run is ended; `caller`: who asks, for the log. An error that is raised
        inside is recorded and goes on.
        """
        began = time.perf_counter() if started is None else started
        return Exchange(self.models, self.execute, request_id, deadline, caller, began)

    def refused(self, request_id: str, error: TriformError, started: float) -> None:
        """Records a request that was not let in, and so has no exchange."""
        Exchange(self.models, self.execute, request_id, None).ended(error.code, time.perf_counter() - started)


def _record(exchange: Exchange, code: str, seconds: float) -> InferenceRecord:
    """Only a model that is served here is named: what callers make up would grow the metrics without end."""
    served, ok = exchange.served, code == "ok"
    manifest = None if served is None else served.manifest
    return InferenceRecord(
        form=exchange.models.form,
        model=UNKNOWN if manifest is None else manifest.name,
        version=None if manifest is None else manifest.version,
        variant="stable" if served is None else served.variant,
        code=code,
        rows=exchange.rows if ok else 0,
        batch_rows=exchange.batch_rows if ok else 0,
        seconds=seconds,
        stages=exchange.stages,
        dead_letters=exchange.dead_letters,
        instead_of=exchange.instead_of,
        request_id=exchange.request_id,
        caller=exchange.caller,
    )
