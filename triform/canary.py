"""A canary in the process that answers: which version answers what, and when the canary has clearly failed.

    header, or request id ──► TrafficSplit.choose ──► one version ──► decode, run, encode: as without a canary
    records' key column   ──► TrafficSplit.split ───► each version its rows ──► reassemble ──► one answer, which names both

    canary fails, stable answers the same request ──► three in a row ──► its share is 0 here, until the next revision
                  which is the caller's answer where the canary runs elsewhere, isolated
    what became of each   ──► tally.py ──► a window of both sides, for whoever judges the rollout

    no canary but a shadow: stable answers ──► some of it is asked of the shadow afterwards (shadow.py) ──► tally.py

A request that names a version or an alias knows nothing of this, and neither does one for a model without a canary or shadow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from triform.errors import DeadlineExceeded, InvalidRequest, NotReady, Overloaded, TriformError
from triform.headers import Named
from triform.releases import Release
from triform.splitting import BASIS_POINTS, KeyRule, TrafficSplit, reassemble

if TYPE_CHECKING:  # models.py has the splits
    import numpy.typing as npt

    from triform.models import Served
    from triform.protocols.bodies import Call, Encoded
    from triform.service import Exchange
    from triform.shadow import Shadowing
    from triform.signature import Array
    from triform.tally import Side, Tally

log = logging.getLogger(__name__)

MOST_USERS: Final = 10_000  # whose version is remembered, each by so many characters at most
LONGEST_USER: Final = 200
IN_A_ROW: Final = 3  # failures of the canary alone, none of its answers between them

Decode = Callable[["Served"], "Call"]


class Way(Protocol):
    """What `HttpSurface.answer` asks of an exchange."""

    deadline: float | None

    def begin(self, stage: str) -> float: ...

    def end(self, stage: str, began: float) -> None: ...

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]: ...

    async def infer_checked(self, inputs: Any) -> dict[str, Array]: ...


Answer = Callable[[Way, Callable[[], "Call"], int], Awaitable["Encoded"]]


class Split:
    """Of a model's keys between its stable version and its canary, or a shadow in its place that gets none, as one revision says.
    Belongs to who answers requests.

    `load`: the versions by number; `cut`: takes the split away, saying why; `edges`: of the bins of scores, as in `Tally`.
    """

    def __init__(
        self,
        release: Release,
        load: Callable[[int], Served],
        cut: Callable[[Split, str], None],
        edges: Sequence[float] | None = None,
    ) -> None:
        self.release = release
        self.traffic = TrafficSplit.of(release)
        self.shadow: Shadowing | None = None
        self._failures = 0  # in a row, after so many answers of the canary's:
        self._answers = 0
        self._timeout = 0  # how many of stable's there were at the canary's latest time-out
        self.cut_off: str | None = None  # why, where it is
        self.tally = _tally(self.traffic.canary, edges)
        self._load = load
        self._loaded: dict[int, Served] = {}
        self._rule: KeyRule | None = None
        self._header = ""  # the rule's, in lower case
        self._cut = cut
        self._users: dict[str, Served] = {}  # by the header as it came
        if not shares_keys(release) and release.shadow is not None:  # on the canary's side, and of no key
            self.traffic = TrafficSplit(release.stable, release.shadow.version, 0, release.salt.encode())
            self.shadow = _shadowing(self, release.shadow.sample)

    def cut(self, why: str) -> None:
        """Stable answers all keys from now on, until there is another revision."""
        self.cut_off = self.cut_off or why
        self._cut(self, why)

    def served(self, version: int) -> Served:
        """The version, loaded if it must be, with the key column of this rollout. A canary that cannot be loaded is cut off."""
        if (found := self._loaded.get(version)) is not None:
            return found
        try:
            served, column = self._load(version), self.rule.column
        except TriformError as error:
            if version == self.traffic.canary:
                self.cut(f"it cannot be loaded: {error.code}")
            raise
        self._loaded[version] = served if column is None else served._replace(key=column)
        self.tally.expect(version, served.signature.row_bytes)
        return self._loaded[version]

    @property
    def rule(self) -> KeyRule:
        """The rollout's, else the stable version's own."""
        if self._rule is None:
            canary = self.release.canary
            self._rule = canary.key if canary and canary.key else self._load(self.traffic.stable).manifest.config.key
            self._header = (self._rule.header or "").strip().lower()
        return self._rule

    def gives(self, exchange: Exchange, headers: Named) -> Served | None:
        """Gives the exchange the version that answers all of the request, if its key says which. A user who comes again is known.

        Raises `InvalidRequest`, and what loading the version raises.
        """
        if self.shadow is not None:
            return None
        if self._header:
            given = headers.get(self._header, ())
            if len(given) == 1 and (known := self._users.get(given[0])) is not None:
                exchange.served, exchange.tally = known, self.tally
                return known
        key = self._key(headers, exchange.request_id)
        if key is None:
            return None
        exchange.served = None  # nobody's, if it cannot be loaded
        exchange.served = served = self.served(self.traffic.choose(key))
        exchange.tally = self.tally
        if self._header:
            self._remember(headers, served)
        return served

    def _remember(self, headers: Named, served: Served) -> None:
        """Whose header is blank is nobody: his key is the request's id."""
        given = headers.get(self._header, ())
        if given and len(given[0]) <= LONGEST_USER and (self._rule or self.rule).of_request(headers) is not None:
            if len(self._users) >= MOST_USERS:
                self._users.clear()
            self._users[given[0]] = served

    async def answer(self, answer: Answer, exchange: Exchange, headers: Named, decode: Decode, size: int) -> Encoded:
        """The answer of the version that the request's key means, or of both. Raises as `HttpSurface.answer`.

        The canary's error is the caller's answer; whether it is the canary's fault, too, is found out before he gets it. What one
        that runs elsewhere does not answer stable does.
        """
        if (served := self.gives(exchange, headers)) is None:
            return await self.otherwise(answer, exchange, decode, size)
        encoding = answer(exchange, partial(decode, served), size)
        return await self._or_instead(encoding, answer, exchange, decode, size)

    async def otherwise(self, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> Encoded:
        """The same where `gives` has none to give: a shadow is to be asked, too, or each record has a key of its own."""
        if self.shadow is not None:
            return await self.shadow.answer(answer, exchange, decode, size)
        exchange.served = self.served(self.traffic.stable)
        encoding = self._by_record(answer, exchange, decode, size)
        return await self._or_instead(encoding, answer, exchange, decode, size)

    async def _or_instead(
        self, encoding: Awaitable[Encoded], answer: Answer, exchange: Exchange, decode: Decode, size: int
    ) -> Encoded:
        try:
            return await encoding
        except BaseException as error:
            if (instead := await self.instead(error, answer, exchange, decode, size)) is None:
                raise
            return instead

    def _key(self, headers: Named, request_id: str) -> bytes | None:
        """The whole request's; None: each of its records may have one. Raises `InvalidRequest` where the header stands twice."""
        rule = self._rule or self.rule
        if len(headers.get(self._header, ())) > 1:
            raise InvalidRequest(f"the header {self._header} is given twice")
        key = rule.of_request(headers)
        return key if key is not None or rule.column is not None else request_id.encode()

    async def _by_record(self, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> Encoded:
        """The same where each record has its key, in a column. The exchange is stable's."""
        way = _ByRecord(self, exchange, decode)
        encoded = await answer(way, partial(decode, exchange.chosen), size)
        side, seconds = way.side, time.perf_counter() - exchange.started
        self.tally.request(side, seconds)
        if exchange.before:  # stable has answered its rows
            self.tally.request("stable", seconds)
        if exchange.before or side == "stable":
            self.tally.stable_answered()
        if side == "canary":
            self._failures = 0
        return encoded

    async def instead(
        self, error: BaseException, answer: Answer, exchange: Exchange, decode: Decode, size: int
    ) -> Encoded | None:
        """What stable answers in the place of a canary that runs elsewhere. None: the error is the caller's answer, and it is
        counted whose it is. What has run counts though its caller has gone."""
        if exchange.tally is not None:  # else what has run is counted already
            exchange.tally = None
            self.count_run(exchange)
        if not isinstance(error, Exception):
            return None
        seconds = time.perf_counter() - exchange.started
        if exchange.chosen.elsewhere:
            return await self._in_its_place(error, seconds, answer, exchange, decode, size)
        side, ran = self.side(exchange), "execute" in exchange.stages
        failed = ran and not isinstance(error, Overloaded)  # else it is the caller's, or the queue's
        if side == "canary" and not ran and isinstance(error, InvalidRequest):
            failed = await self._stable_reads(exchange.chosen, answer, exchange, decode, size)
        self.tally.request(side, seconds, failed=failed)
        if failed and side == "canary" and (not ran or await self._stable_answers(error, answer, exchange, decode, size)):
            self.failed(error)
        return None

    def count_run(self, exchange: Exchange) -> None:
        """Of what has run, if it has, whatever becomes of the request."""
        if not exchange.outputs:
            return
        side = self.side(exchange)
        if exchange.batch_rows:  # else another request of the run tells of it
            self.tally.ran(side, exchange.batch_rows, exchange.stages["execute"])
        self.tally.scored(side, exchange.outputs)

    def side(self, exchange: Exchange) -> Side:
        """Whose turn it is, or was when it ended."""
        return "canary" if exchange.chosen.manifest.version == self.traffic.canary else "stable"

    async def _in_its_place(
        self, error: Exception, seconds: float, answer: Answer, exchange: Exchange, decode: Decode, size: int
    ) -> Encoded:
        """Stable's answer to what the canary has failed in so many seconds. What neither answers ends with stable's error.

        A canary that is still to come has failed nothing: then nothing is counted.
        """
        counts, failed = not isinstance(error, NotReady), "execute" in exchange.stages and not isinstance(error, Overloaded)
        exchange.fall_back(self.served(self.traffic.stable))
        try:
            encoded = await answer(exchange, partial(decode, exchange.chosen), size)
            failed = True
        finally:
            if counts:
                self.tally.request("canary", seconds, failed=failed)
        if counts:
            told = {"request_id": exchange.request_id, "version": self.traffic.canary}
            log.warning("the canary failed a request, which %s answered", exchange.refs, exc_info=error, extra=told)
            exchange.instead_of = self.traffic.canary, _code(error)
            self.failed(error)
        return encoded

    async def _stable_reads(self, canary: Served, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> bool:
        """Whether stable takes what the canary refuses to: it is read as stable would, and not run."""
        again = exchange.again(self.served(self.traffic.stable))
        if _alike(canary, again.chosen):  # or callers could make a host work twice for nothing
            return False
        try:
            await answer(_Reads(again), partial(decode, again.chosen), size)
        except _Read:
            return True
        except Exception:  # noqa: BLE001 - of whatever kind, stable is no better
            return False
        return False

    async def _stable_answers(self, error: Exception, answer: Answer, exchange: Exchange, decode: Decode, size: int) -> bool:
        """Whether stable answers what the canary has failed. There is no time to ask where it ran out of time: then whether
        stable has answered anybody since the last time, for what holds both up is not the canary's."""
        if isinstance(error, DeadlineExceeded):
            before, self._timeout = self._timeout, self.tally.answers_of_stable
            return self._timeout > before or self.traffic.points >= BASIS_POINTS  # then nobody asks it
        again = exchange.again(self.served(self.traffic.stable))
        try:
            await answer(again, partial(decode, again.chosen), size)
        except Exception:  # noqa: BLE001 - of whatever kind, stable is no better
            return False
        return True

    @property
    def failures(self) -> int:
        """Of the canary alone, since it has last answered."""
        if (answers := self.tally.answers_of_canary) != self._answers:
            self._answers, self._failures = answers, 0
        return self._failures

    def failed(self, error: Exception) -> None:
        """Counts a failure of the canary's own."""
        self._failures = failures = self.failures + 1
        if failures >= IN_A_ROW:
            self.cut(f"it has failed {failures} requests in a row that stable could answer, the last with {_code(error)}")


class _Read(Exception):
    """The request was read, and is not to be run."""


class _Reads:
    """An exchange that ends before its run."""

    def __init__(self, exchange: Exchange) -> None:
        self.deadline = exchange.deadline
        self.begin, self.end, self.read = exchange.begin, exchange.end, exchange.read

    async def infer_checked(self, inputs: Any) -> dict[str, Array]:  # noqa: ARG002
        raise _Read


class _ByKey:
    """An exchange whose runs are counted. `side`: whose turn it is, or was when it ended."""

    def __init__(self, split: Split, exchange: Exchange) -> None:
        self.deadline = exchange.deadline
        self.begin, self.end = exchange.begin, exchange.end
        self.side = split.side(exchange)
        self.inputs: Mapping[str, Array] = {}
        self.outputs: Mapping[str, Array] = {}
        self._split = split
        self._exchange = exchange

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]:
        return self._exchange.read(decode)

    async def infer_checked(self, inputs: Any) -> dict[str, Array]:
        """The outputs of the version whose turn it is."""
        outputs = await self._exchange.infer_checked(inputs)
        self.inputs, self.outputs = inputs, outputs
        self._split.count_run(self._exchange)
        return outputs


class _ByRecord(_ByKey):
    """An exchange whose records have keys, in a column: each version answers its rows."""

    def __init__(self, split: Split, exchange: Exchange, decode: Decode) -> None:
        super().__init__(split, exchange)
        self._decode = decode
        self._calls: dict[int, Call] = {}
        self._rows: dict[int, npt.NDArray[np.intp]] = {}

    def read(self, decode: Callable[[], Call]) -> tuple[Call, Any]:
        """The call and its inputs; where both versions answer, the inputs of each. `decode` is stable's."""
        exchange, traffic = self._exchange, self._split.traffic
        call, inputs = exchange.read(decode)
        keys = KeyRule.of_rows([None] if call.keys is None else _flat(call.keys), exchange.request_id)
        rows = traffic.split(keys)
        if rows.keys() == {traffic.stable}:
            return call, inputs
        stable, exchange.served = exchange.chosen, self._split.served(traffic.canary)
        other, its = exchange.read(partial(self._decode, exchange.served))
        if rows.keys() == {traffic.canary}:
            self.side = "canary"
            return other, its
        exchange.served = stable
        self._rows, self._calls = rows, {traffic.stable: call, traffic.canary: other}
        version = ",".join(map(str, sorted(rows)))
        say = partial(call.say, version=version) if call.says_version else call.say
        return call._replace(say=say, columns=None), {traffic.stable: inputs, traffic.canary: its}

    async def infer_checked(self, inputs: Any) -> dict[str, Array]:
        """Stable runs first: what goes wrong from then on is the canary's, or that the two do not go together."""
        if not self._rows:
            return await super().infer_checked(inputs)
        columns: dict[int, Mapping[str, Array]] = {}
        for version in self._split.traffic.stable, self._split.traffic.canary:
            if columns:
                self._exchange.turn_to(self._split.served(version))
                self.side = "canary"
            at = self._rows[version]
            outputs = await super().infer_checked({name: array[at] for name, array in inputs[version].items()})
            named = self._calls[version].columns
            columns[version] = outputs if named is None else named(outputs)
        return reassemble(self._rows, columns)


def _alike(one: Served, other: Served) -> bool:
    """Whether both read requests, and say answers, in the same way."""
    first, second = one.manifest, other.manifest
    same = (first.config.inputs, first.config.outputs) == (second.config.inputs, second.config.outputs)
    return same and first.signature == second.signature


def shares_keys(release: Release) -> bool:
    """Whether some keys are the canary's."""
    return release.canary is not None and release.canary.weight > 0


def _shadowing(split: Split, sample: float) -> Shadowing:
    from triform.shadow import Shadowing  # as for `_tally`

    return Shadowing(split, partial(_ByKey, split), sample)


def _tally(canary: int, edges: Sequence[float] | None) -> Tally:
    from triform.rollout.policy import PROBABILITY_BINS  # a function that starts without a canary does not wait for these
    from triform.tally import Tally

    return Tally(PROBABILITY_BINS if edges is None else edges, canary)


def _code(error: Exception) -> str:
    return error.code if isinstance(error, TriformError) else TriformError.code


def _flat(keys: Any) -> Any:
    return keys.reshape(-1) if isinstance(keys, np.ndarray) else keys
