"""A canary in the process that answers: which version answers what, and when the canary has clearly failed.

    header, or request id ──► TrafficSplit.choose ──► one version ──► decode, run, encode: as without a canary
    records' key column   ──► TrafficSplit.split ───► each version its rows ──► reassemble ──► one answer, which names both

    canary fails, stable answers the same request ──► three in a row ──► its share is 0 here, until the next revision

A request that names a version or an alias knows nothing of this, and neither does one for a model without a canary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from triform.errors import DeadlineExceeded, InvalidRequest, Overloaded, TriformError
from triform.headers import values
from triform.releases import Release
from triform.splitting import KeyRule, TrafficSplit, reassemble
from triform.telemetry import Form, SplitRecord, Telemetry

if TYPE_CHECKING:  # service.py has the splits of its models
    import numpy.typing as npt

    from triform.protocols.bodies import Call, Encoded
    from triform.service import Exchange, Served
    from triform.signature import Array

log = logging.getLogger(__name__)

IN_A_ROW: Final = 3  # failures of the canary alone, none of its answers between them

Decode = Callable[["Served"], "Call"]


class Way(Protocol):
    """What `HttpSurface.answer` asks of an exchange."""

    deadline: float | None

    def stage(self, name: str) -> AbstractContextManager[None]: ...

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]: ...

    async def infer_checked(self, inputs: Any) -> dict[str, Array]: ...


Answer = Callable[[Way, Callable[[], "Call"], int], Awaitable["Encoded"]]


class Split:
    """Of a model's keys between its stable version and its canary, as one revision says. Belongs to who answers requests.

    `load`: the versions by number; `cut`: takes the split away, saying why.
    """

    def __init__(self, release: Release, load: Callable[[int], Served], cut: Callable[[Split, str], None]) -> None:
        self.release = release
        self.traffic = TrafficSplit.of(release)
        self.failures = 0  # in a row
        self._load = load
        self._cut = cut

    def cut(self, why: str) -> None:
        """Stable answers all keys from now on, until there is another revision."""
        self._cut(self, why)

    def served(self, version: int) -> Served:
        """The version, loaded if it must be, with the key column of this rollout. A canary that cannot be loaded is cut off."""
        try:
            served, column = self._load(version), self.rule.column
        except TriformError as error:
            if version == self.traffic.canary:
                self.cut(f"it cannot be loaded: {error.code}")
            raise
        return served if column in (None, served.key) else served._replace(key=column)

    @property
    def rule(self) -> KeyRule:
        """The rollout's, else the stable version's own."""
        canary = self.release.canary
        return canary.key if canary and canary.key else self._load(self.traffic.stable).manifest.config.key

    async def answer(self, answer: Answer, exchange: Exchange, headers: Any, decode: Decode, size: int) -> Encoded:
        """The answer of the version that the request's key means, or of both. Raises as `HttpSurface.answer`.

        The canary's error is the caller's answer; whether it is the canary's fault, too, is found out before he gets it.
        """
        try:
            encoded = await self._answer(answer, exchange, headers, decode, size)
        except Exception as error:
            if self._at_work(exchange) and await self._is_the_canarys(error, answer, exchange, decode, size):
                self.failed(error)
            raise
        if self._at_work(exchange):
            self.failures = 0
        return encoded

    async def _answer(self, answer: Answer, exchange: Exchange, headers: Any, decode: Decode, size: int) -> Encoded:
        rule = self.rule
        named = _named(rule, headers)
        if named or rule.column is None:
            (key,) = rule.keys(named, {}, exchange.request_id)
            exchange.served = None  # nobody's, if it cannot be loaded
            exchange.served = self.served(self.traffic.choose(key))
            return await answer(exchange, partial(decode, exchange.served), size)
        exchange.served = self.served(self.traffic.stable)
        return await answer(_ByRecord(self, rule, exchange, decode), partial(decode, exchange.served), size)

    def _at_work(self, exchange: Exchange) -> bool:
        """Whether the canary is what has answered, or failed, last."""
        return exchange.served is not None and exchange.served.manifest.version == self.traffic.canary

    async def _is_the_canarys(self, error: Exception, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> bool:
        """Whether stable answers what the canary has run and failed; there is no time to ask where it ran out of time.

        What was refused before it ran is the caller's fault, or the queue's.
        """
        if "execute" not in exchange.stages or isinstance(error, Overloaded):
            return False
        if isinstance(error, DeadlineExceeded):
            return True
        again = exchange.again(self.served(self.traffic.stable))
        try:
            await answer(again, partial(decode, again.chosen), size)
        except Exception:  # noqa: BLE001 - of whatever kind, stable is no better
            return False
        return True

    def failed(self, error: Exception) -> None:
        """Counts a failure of the canary's own."""
        self.failures += 1
        if self.failures >= IN_A_ROW:
            code = error.code if isinstance(error, TriformError) else TriformError.code
            self.cut(f"it has failed {self.failures} requests in a row that stable could answer, the last with {code}")


class Splits:
    """The splits of a host, by model: `live` has those of canaries that get keys. Thread-safe."""

    def __init__(self, form: Form, telemetry: Telemetry) -> None:
        self.live: Mapping[str, Split] = {}  # replaced whole, never changed: who reads takes no lock
        self._all: dict[str, Split] = {}  # those that were cut off, too
        self._form = form
        self._telemetry = telemetry
        self._sharing = threading.Lock()

    def of(self, served: Served) -> Split | None:
        """What shares out the keys of a request that would be this version's otherwise."""
        return self.live.get(served.manifest.name)

    def share(self, model: str, release: Release | None, load: Callable[[int], Served]) -> None:
        """Shares the model's keys anew as the release says; None, or one without a canary: stable has them all."""
        with self._sharing:
            before = self._all.pop(model, None)
            others = {name: split for name, split in self.live.items() if name != model}
            if release is not None and release.canary is not None and release.canary.weight > 0:
                split = self._all[model] = Split(release, load, partial(self._cut, model))
                self._tell(model, split, release.canary.weight)
                others[model] = split
            elif before is not None:
                self._tell(model, before, 0.0, stable=release.stable if release is not None else None)
            self.live = others

    def covers(self, model: str, version: int, why: str) -> bool:
        """Whether stable can answer what this version would, as it is a canary: then it does from now on, because of `why`."""
        split = self._all.get(model)
        if split is None or split.traffic.canary != version:
            return False
        split.cut(why)
        return True

    def _cut(self, model: str, split: Split, why: str) -> None:
        with self._sharing:
            if self.live.get(model) is not split:
                return
            self.live = {name: other for name, other in self.live.items() if name != model}
        told = {"model": model, "version": split.traffic.canary, "revision": split.release.revision}
        log.warning("the canary %s/%d gets no more keys here: %s", model, split.traffic.canary, why, extra=told)
        self._tell(model, split, 0.0, cut=True)

    def _tell(self, model: str, split: Split, weight: float, *, stable: int | None = None, cut: bool = False) -> None:
        versions = {"stable": stable or split.traffic.stable, "canary": split.traffic.canary}
        self._telemetry.shared(SplitRecord(form=self._form, model=model, weight=weight, cut=cut, **versions))


class _ByRecord:
    """An exchange whose records have keys: each version answers its rows."""

    def __init__(self, split: Split, rule: KeyRule, exchange: Exchange, decode: Decode) -> None:
        self.deadline = exchange.deadline
        self.stage = exchange.stage
        self._split = split
        self._rule = rule
        self._exchange = exchange
        self._decode = decode
        self._calls: dict[int, Call] = {}
        self._rows: dict[int, npt.NDArray[np.intp]] = {}

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]:
        """The call and its inputs; where both versions answer, the inputs of each. `decode` is stable's."""
        exchange, traffic = self._exchange, self._split.traffic
        call, inputs = exchange.read(decode)
        given = {} if call.keys is None else {str(self._rule.column): _flat(call.keys)}
        keys = self._rule.keys({}, given, exchange.request_id)
        rows = traffic.split(keys) if len(keys) > 1 else {traffic.choose(keys[0]): np.arange(0)}
        if rows.keys() == {traffic.stable}:
            return call, inputs
        stable, exchange.served = exchange.chosen, self._split.served(traffic.canary)
        other, its = exchange.read(partial(self._decode, exchange.served))
        if rows.keys() == {traffic.canary}:
            return other, its
        exchange.served = stable
        self._rows, self._calls = rows, {traffic.stable: call, traffic.canary: other}
        version = ",".join(map(str, sorted(rows)))
        say = partial(call.say, version=version) if call.says_version else call.say
        return call._replace(say=say, columns=None), {traffic.stable: inputs, traffic.canary: its}

    async def infer_checked(self, inputs: Any) -> dict[str, Array]:
        """Stable runs first: what goes wrong from then on is the canary's, or that the two do not go together."""
        if not self._rows:
            return await self._exchange.infer_checked(inputs)
        columns: dict[int, Mapping[str, Array]] = {}
        for version in self._split.traffic.stable, self._split.traffic.canary:
            if columns:
                self._exchange.turn_to(self._split.served(version))
            at = self._rows[version]
            outputs = await self._exchange.infer_checked({name: array[at] for name, array in inputs[version].items()})
            named = self._calls[version].columns
            columns[version] = outputs if named is None else named(outputs)
        return reassemble(self._rows, columns)


def _named(rule: KeyRule, headers: Any) -> dict[str, str]:
    """The header of the rule, if the request has it. Raises `InvalidRequest` where it stands twice."""
    if rule.header is None:
        return {}
    name = rule.header.lower()
    given = values(headers, name)
    if len(given) > 1:
        raise InvalidRequest(f"the header {name} is given twice")
    return {name: given[0]} if given and given[0] else {}


def _flat(keys: Any) -> Any:
    return keys.reshape(-1) if isinstance(keys, np.ndarray) else keys
