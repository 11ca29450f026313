"""Locust's users. `Arrivals`, one in each process, sends requests when they are due, whatever became of those before; `Caller`,
many, asks again once it is answered.

    Work.run -> Choice.draw -> client.ask -> Recorder + Locust's own request event

In the open loop a latency counts from when its request was due, in the closed one from when it was sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.clients import GrpcClient, HttpClient, Outcome
from loadtests.credentials import Sign
from loadtests.order import Order
from loadtests.payloads import Choice, Payload, Payloads
from loadtests.records import OK, UNSENT, Recorder
from loadtests.shapes import arrivals, level

GRACE: Final = 5.0  # seconds after the end in which what was due is still sent
NAP: Final = 0.05  # seconds between two looks of a caller who is not needed at whether he is


class Failed(Exception):
    """What Locust's statistics are told of a request that did not go well."""


class Work:
    """What one process does of an order: share number `index` of `order.workers`. `ended`: set once every answer is in."""

    def __init__(self, order: Order, payloads: Payloads, sign: Sign, environment: Environment, index: int) -> None:
        self.recorder = Recorder([*{p.protocol: None for p in payloads.payloads}])
        self.stopping = False
        self.ended = Event()
        self._order = order
        self._environment = environment
        self._index = index
        self._chance = random.Random(f"{order.seed}/{index}")  # noqa: S311 - for load, not for secrets
        self._choice = Choice(payloads.payloads, self._chance)
        self._http = HttpClient(order, payloads, sign)
        self._grpc = GrpcClient(order, payloads, sign) if order.grpc else None
        self._began: tuple[float, float] | None = None
        self._callers = 0
        self._left = 0

    @property
    def began(self) -> float:
        """When the first user of this process began, in Unix time; 0 before."""
        return self._began[0] if self._began is not None else 0.0

    def now(self) -> float:
        """Seconds since then."""
        if self._began is None:
            self._began = time.time(), time.perf_counter()
        return time.perf_counter() - self._began[1]

    def arrive(self) -> None:
        """All arrivals of this process, until the last one is answered."""
        pool = Pool(self._order.connections)
        order = self._order
        for due in arrivals(order.stages, order.rate / order.workers, self._chance):
            while (pause := due - self.now()) > 0 and not self.stopping:
                gevent.sleep(min(pause, 0.5))
            if self.stopping:
                break
            payload = self._choice.draw()
            if pool.full():
                pool.wait_available(max(0.0, order.seconds + GRACE - self.now()))
            if pool.full():
                self._record(payload, due, self.now(), Outcome(UNSENT, "all connections were busy until after the end"))
            else:
                pool.spawn(self.ask, payload, due)
        while not self.stopping and self.now() < order.seconds:
            gevent.sleep(NAP)
        pool.join()
        self.close()

    def call(self) -> None:
        """One caller, for as long as the shape lasts. The number of those who ask follows the shape."""
        number, order = self._callers * self._order.workers + self._index, self._order
        self._callers += 1
        self._left += 1
        while not self.stopping and self.now() < order.seconds:
            if number < round(level(order.stages, self.now()) * order.users):
                self.ask(self._choice.draw(), self.now())
            else:
                gevent.sleep(NAP)
        self._left -= 1
        if not self._left:
            self.close()

    def ask(self, payload: Payload, due: float) -> None:
        sent = self.now()
        client = self._grpc if payload.protocol == "oip-grpc" and self._grpc is not None else self._http
        self._record(payload, due, sent, client.ask(payload))

    def _record(self, payload: Payload, due: float, sent: float, outcome: Outcome) -> None:
        waited = self.now() - due
        self.recorder.add(self.began + due, sent - due, waited, payload.protocol, outcome.kind, payload.rows, outcome.told)
        self._environment.events.request.fire(  # type: ignore[no-untyped-call]  # Locust's
            request_type=payload.protocol,
            name=f"{payload.rows} rows",
            response_time=waited * 1e3,
            response_length=outcome.bytes,
            exception=None if outcome.kind == OK else Failed(outcome.kind),
            context={},
        )

    def close(self) -> None:
        self._http.close()
        if self._grpc is not None:
            self._grpc.close()
        self.ended.set()


def user_classes(order: Order, working: Sequence[Work]) -> list[type[User]]:
    """The order's kind of users. `working`: holds this process's work by the time that they begin."""

    class Arrivals(User):
        @task
        def arrive(self) -> None:
            working[0].arrive()
            raise StopUser

    class Caller(User):
        @task
        def call(self) -> None:
            working[0].call()
            raise StopUser

    chosen: Any = Arrivals if order.loop == "open" else Caller
    return [chosen]
