"""The models that a host serves, and the one way a request goes through them: online forms share it, whatever their protocol.

    protocol decodes -> Exchange.infer(arrays) -> Execute -> Predictor.run -> arrays -> protocol encodes
                        Exchange ends, well or not -> exactly one InferenceRecord

`Execute` is the one step that may wait: `run_here` does not, and runs the model in the thread that asks; `batching.py` has one
that waits for a slot and runs in other threads.

A host fills `Models` (packages of a layer, an image, a repository); a model that is not loaded yet is loaded by the first request
that wants it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from triform.deadlines import check
from triform.errors import AliasNotFound, InvalidRequest, ModelNotFound, ResourceExhausted, TriformError, VersionNotFound
from triform.features import Features
from triform.package import Manifest
from triform.predictor import Predictor
from triform.signature import Array, Signature, rows_of
from triform.telemetry import FREED, UNKNOWN, Form, InferenceRecord, LoadRecord, Silent, Telemetry

CANCELLED: Final = "cancelled"  # a record's code where the caller, or the process, gave the request up


class Served(NamedTuple):
    """A loaded version, ready to answer."""

    predictor: Predictor
    features: Features
    variant: str = "stable"

    @property
    def manifest(self) -> Manifest:
        return self.predictor.manifest

    @property
    def signature(self) -> Signature:
        return self.predictor.signature


class Ran(NamedTuple):
    """What came of a run. `batch_rows` ran together, 0 where another request of the run tells it; it was `queued` seconds."""

    outputs: dict[str, Array]
    batch_rows: int
    queued: float = 0.0


Execute = Callable[[Served, Mapping[str, Array], float | None], Awaitable[Ran]]
T = TypeVar("T")
# Bytes of JSON. To read so many takes about the 5 ms for which one thread of Python keeps the others waiting anyway.
LARGE: Final = 512 << 10


class Aside(Protocol):
    """Does `work` on so many bytes in a thread, so that the event loop goes on meanwhile; `urgent`: it ends a request.

    Raises `Overloaded`, `DeadlineExceeded` when it comes, and what `work` raises.
    """

    def __call__(self, work: Callable[[], T], size: int, deadline: float | None, *, urgent: bool = False) -> Awaitable[T]: ...


async def run_here(served: Served, inputs: Mapping[str, Array], deadline: float | None) -> Ran:
    """Runs the model in this thread; never waits."""
    return Ran(served.predictor.run(inputs, deadline=deadline), rows_of(inputs))


class _Slot:
    """One version: loaded once, by whoever wants it first. A load that fails is tried again by the next.

    `served`: what was loaded. `ready`: whether a request can be expected to be answered; not so after a load that failed.
    """

    def __init__(self, load: Callable[[], Predictor], variant: str, loaded: Callable[[Served], None]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._loaded = loaded
        self.variant = variant
        self.ready = True
        self.served: Served | None = None

    def get(self) -> Served:
        if self.served is not None:
            return self.served
        with self._lock:
            if self.served is None:
                self.served = self._open()
        return self.served

    def _open(self) -> Served:
        try:
            predictor = self._load()
            served = Served(predictor, Features(predictor.signature, predictor.manifest.config), self.variant)
        except BaseException:
            self.ready = False
            raise
        self.ready = True
        self._loaded(served)
        return served


class _Versions(NamedTuple):
    """Of one model. Replaced whole, never changed: who reads takes no lock."""

    slots: Mapping[int, _Slot] = {}
    aliases: Mapping[str, int] = {}


class Models:
    """Versions by model, and what their aliases mean. Thread-safe: a version may be added while requests are answered.

    `default`: the model of requests that name none; without it the only one. `leaving`: set where the host is about to end: it
    is not ready any more, so that no new callers come, and answers those who do.
    """

    def __init__(self, *, form: Form, default: str | None = None, telemetry: Telemetry | None = None) -> None:
        self.form = form
        self.default = default
        self.leaving = False
        self.telemetry = telemetry or Silent()
        self._adding = threading.Lock()
        self._models: Mapping[str, _Versions] = {}

    def add(
        self, model: str, version: int, load: Callable[[], Predictor], *, aliases: tuple[str, ...] = ("stable",), now: bool = True
    ) -> None:
        """Adds a version; `load` opens it, at once or (`now=False`) for its first request. Raises what `load` raises."""
        slot = _Slot(load, aliases[0] if aliases else "stable", self._told)
        if now:
            slot.get()
        with self._adding:
            before = self._models.get(model, _Versions())
            after = _Versions({**before.slots, version: slot}, {**before.aliases, **dict.fromkeys(aliases, version)})
            self._models = {**self._models, model: after}

    def replace(self, model: str, predictors: Mapping[int, Predictor], aliases: Mapping[str, int]) -> None:
        """Makes these the model's versions, and what its aliases mean, all at once in place of what it had.

        Who was given a version keeps it until he is done. The first alias that means a version is its variant. What is new is
        told of before it is served, so that no request waits for that.
        """
        with self._adding:
            before = self._models.get(model, _Versions()).slots
            slots = {version: self._slot_of(predictor, version, aliases, before) for version, predictor in predictors.items()}
            for slot in slots.values():
                slot.get()
            self._models = {**self._models, model: _Versions(slots, dict(aliases))}
        here = {(version, slot.variant) for version, slot in slots.items()}
        for version, slot in before.items():
            if slot.served is not None and (version, slot.variant) not in here:
                self._told(slot.served, code=FREED)

    def _slot_of(self, predictor: Predictor, version: int, aliases: Mapping[str, int], before: Mapping[int, _Slot]) -> _Slot:
        """That which holds it as this variant already, else a new one."""
        variant = next((alias for alias, meant in aliases.items() if meant == version), "stable")
        had = before.get(version)
        if had is not None and had.variant == variant and had.served is not None and had.served.predictor is predictor:
            return had
        return _Slot(lambda: predictor, variant, self._told)

    def _told(self, served: Served, code: str = "ok") -> None:
        """Of every load once, and of the end of what no other took the place of."""
        predictor = served.predictor
        load = LoadRecord.of(
            predictor.manifest, predictor.provider, predictor.load_seconds, form=self.form, variant=served.variant, code=code
        )
        self.telemetry.loaded(load)

    def predictors(self) -> list[Predictor]:
        """All that are loaded."""
        slots = (slot for versions in self._models.values() for slot in versions.slots.values())
        return [slot.served.predictor for slot in slots if slot.served is not None]

    def names(self) -> list[str]:
        return sorted(self._models)

    def versions(self, model: str) -> list[int]:
        """The versions at hand, rising. Raises `ModelNotFound`."""
        return sorted(self._versions(model).slots)

    def states(self, model: str, *, version: int | None = None, alias: str | None = None) -> dict[int, bool]:
        """Whether each version at hand, or the one that was asked for, is ready; all of one moment. Raises as `get`."""
        if version is not None or alias is not None:
            number, slot = self._find(model, version, alias)
            return {number: slot.ready}
        return {number: slot.ready for number, slot in sorted(self._versions(model).slots.items())}

    def get(self, model: str, *, version: int | None = None, alias: str | None = None) -> Served:
        """The version that was asked for, loaded if it must be. Raises `ModelNotFound`, `VersionNotFound`, `AliasNotFound`."""
        return self._slot(model, version, alias).get()

    def is_ready(self, model: str, version: int | None = None) -> bool:
        """Whether the version can answer: it is loaded, or will be by its first request. Raises as `get`."""
        return self._slot(model, version, None).ready

    def all_ready(self) -> bool:
        """Whether callers may come: each model's stable version can answer, and will be able to."""
        return not self.leaving and all(self.is_ready(name) for name in self._models)

    def default_name(self) -> str | None:
        """The model of a request that names none, if there is one."""
        return next(iter(self._models)) if self.default is None and len(self._models) == 1 else self.default

    def the_default(self) -> str:
        """The same. Raises `InvalidRequest` where there is none."""
        if (default := self.default_name()) is not None:
            return default
        names = ", ".join(self.names()[:10]) or "none"
        raise InvalidRequest(f"the request names no model and TRIFORM_DEFAULT_MODEL is not set; models here: {names}")

    def _slot(self, model: str, version: int | None, alias: str | None) -> _Slot:
        return self._find(model, version, alias)[1]

    def _find(self, model: str, version: int | None, alias: str | None) -> tuple[int, _Slot]:
        slots, aliases = self._versions(model)
        if version is None and alias is not None and alias not in aliases:
            raise AliasNotFound(f"'{model}' has no alias {alias[:100]!r} here (it has: {', '.join(sorted(aliases)) or 'none'})")
        number = version if version is not None else aliases.get(alias or "stable", max(slots))
        if number not in slots:
            raise VersionNotFound(f"'{model}' has no version {number} here (it has: {', '.join(map(str, sorted(slots)))})")
        return number, slots[number]

    def _versions(self, model: str) -> _Versions:
        if model not in self._models:
            raise ModelNotFound(f"no model {model[:100]!r} is served here (there is: {', '.join(self.names()[:10]) or 'none'})")
        return self._models[model]


class _Stage:
    """A context manager of its own: one made of a generator takes twice as long, and a request has three."""

    __slots__ = ("_exchange", "_name", "_started")

    def __init__(self, exchange: Exchange, name: str) -> None:
        self._exchange = exchange
        self._name = name

    def __enter__(self) -> None:
        check(self._exchange.deadline, f"the stage '{self._name}'")
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        stages = self._exchange.stages
        stages[self._name] = stages.get(self._name, 0.0) + time.perf_counter() - self._started


class Exchange:
    """One request on its way. What it came to is recorded when `InferenceService.exchange` is left."""

    def __init__(self, models: Models, execute: Execute, request_id: str, deadline: float | None, caller: str = "") -> None:
        self.models = models
        self._execute = execute
        self.request_id = request_id
        self.caller = caller
        self.deadline = deadline
        self.served: Served | None = None
        self.rows = 0
        self.batch_rows = 0  # of the run, others' rows too; 0 where another request of the run tells it
        self.dead_letters: Mapping[str, int] = {}  # rows by error code, of a request that may refuse some
        self.stages: dict[str, float] = {}

    def choose(self, model: str | None, *, version: int | None = None, alias: str | None = None) -> Served:
        """The version that is to answer."""
        self.served = self.models.get(model or self.models.the_default(), version=version, alias=alias)
        return self.served

    def stage(self, name: str) -> _Stage:
        """Counts the time until the block is left as that of the stage: decode, execute or encode.

        Raises `DeadlineExceeded` where there is no time left to begin it.
        """
        return _Stage(self, name)

    async def infer(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The chosen version's answer; arrays of shape [rows, ...] by name.

        Raises as `Predictor.predict`, `Overloaded`, and `DeadlineExceeded`.
        """
        assert self.served is not None, "choose comes first"  # noqa: S101 - a fault of ours
        with self.stage("decode"):
            checked = self.served.signature.validate(inputs)
        return await self.infer_checked(checked)

    async def infer_checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The same for arrays that fit the chosen version's signature."""
        assert self.served is not None, "choose comes first"  # noqa: S101 - a fault of ours
        with self.stage("execute"):
            ran = await self._execute(self.served, inputs, self.deadline)
        if ran.queued:
            self.stages["queue"] = ran.queued
            self.stages["execute"] -= ran.queued
        self.rows, self.batch_rows = rows_of(inputs), ran.batch_rows
        return ran.outputs


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

    @contextmanager
    def exchange(
        self, request_id: str, *, deadline: float | None = None, started: float | None = None, caller: str = ""
    ) -> Iterator[Exchange]:
        """One inference request, from `started` (`time.perf_counter()`; now) to the end of the block.

        `deadline`: a `time.monotonic()` after which the run is ended; `caller`: who asks, for the log. An error that is raised
        inside is recorded and goes on.
        """
        started = time.perf_counter() if started is None else started
        exchange, code = Exchange(self.models, self.execute, request_id, deadline, caller), "ok"
        try:
            yield exchange
        except TriformError as error:
            code = error.code
            raise
        except MemoryError as error:
            code = ResourceExhausted.code
            raise ResourceExhausted("memory ran out while the request was answered; send fewer rows at a time") from error
        except RecursionError:
            code = InvalidRequest.code
            raise InvalidRequest("the body is nested too deeply") from None
        except Exception:
            code = TriformError.code
            raise
        except BaseException:
            code = CANCELLED
            raise
        finally:
            self.models.telemetry.record(_record(exchange, code, time.perf_counter() - started))

    def refused(self, request_id: str, error: TriformError, started: float) -> None:
        """Records a request that was not let in, and so has no exchange."""
        exchange = Exchange(self.models, self.execute, request_id, None)
        self.models.telemetry.record(_record(exchange, error.code, time.perf_counter() - started))


def _record(exchange: Exchange, code: str, seconds: float) -> InferenceRecord:
    """Only a model that is served here is named: what callers make up would grow the metrics without end."""
    served, ok = exchange.served, code == "ok"
    return InferenceRecord(
        form=exchange.models.form,
        model=UNKNOWN if served is None else served.manifest.name,
        version=None if served is None else served.manifest.version,
        variant="stable" if served is None else served.variant,
        code=code,
        rows=exchange.rows if ok else 0,
        batch_rows=exchange.batch_rows if ok else 0,
        seconds=seconds,
        stages=exchange.stages,
        dead_letters=exchange.dead_letters,
        request_id=exchange.request_id,
        caller=exchange.caller,
    )
