"""The benchmarks' load: what wrk says, arrivals that do not wait, and that answers which are none are not counted."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.load import Ask, LoadFailed, closed_loop, one_by_one, open_loop, poisson, told_by_wrk
from tests.conformance.models import surface
from tests.conformance.server import serve

GOOD = Ask("/v1/models/linear:predict", {"content-type": "application/json"}, b'{"instances": [[1, 2, 3]]}')
BAD = GOOD._replace(path="/v1/models/nobody:predict")


@pytest.fixture(scope="module")
def address(online_models: Path) -> Iterator[tuple[str, int]]:
    with serve(surface(online_models)) as text:
        host, _, port = text.partition(":")
        yield host, int(port)


@contextmanager
def slow_server(seconds: float) -> Iterator[tuple[str, int]]:
    """Answers one request after another, `seconds` each, on one connection; each answer comes in two pieces."""
    answer = [b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 2\r\n\r\n{}"]

    def talk() -> None:
        connection, _ = listening.accept()
        with connection:
            while connection.recv(65536):
                time.sleep(seconds)
                for piece in answer:
                    connection.sendall(piece)
                    time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        yield listening.getsockname()[:2]
        thread.join(10)


def test_wrk_counts_requests_and_their_times(address: tuple[str, int], tmp_path: Path) -> None:
    load = closed_loop(address, GOOD, clients=2, seconds=1, work=tmp_path)
    assert load.requests > 0
    assert 0.9 < load.seconds < 30
    assert 0 < load.p50 <= load.p99
    assert load.rate == load.requests / load.seconds


def test_answers_that_are_none_are_not_counted(address: tuple[str, int], tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="were refused"):
        closed_loop(address, BAD, clients=1, seconds=1, work=tmp_path)
    with pytest.raises(LoadFailed, match="model_not_found"):
        open_loop(address, BAD, [0.0])


@pytest.mark.parametrize(
    ("requests", "refused", "broken", "told"),
    [(10, 1, 0, "1 were refused"), (10, 0, 2, "2 not answered"), (0, 0, 0, "no request was answered")],
)
def test_what_wrk_says_of_faults(requests: int, refused: int, broken: int, told: str) -> None:
    numbers = f'"requests":{requests},"duration":1000000,"p50":1.0,"p99":2.0,"max":3.0,"refused":{refused},"broken":{broken}'
    with pytest.raises(LoadFailed, match=told):
        told_by_wrk("Running 1s test\n  1 threads\n{" + numbers + "}\n")


def test_latencies_count_from_the_moment_that_a_request_was_due() -> None:
    """Three are due at once and there is one connection: the second waits for the first, the third for both."""
    with slow_server(0.1) as address:
        load = open_loop(address, GOOD, [0.0, 0.0, 0.0], connections=1)
    assert load.requests == 3
    assert load.p99 > 0.29
    assert load.p50 > 0.19


def test_a_request_is_not_sent_before_it_is_due(address: tuple[str, int]) -> None:
    began = time.perf_counter()
    assert open_loop(address, GOOD, [0.1, 0.3]).requests == 2
    assert time.perf_counter() - began > 0.3


def test_a_client_waits_for_its_answer() -> None:
    load = one_by_one(lambda: time.sleep(0.05), 0.15)
    assert load.requests <= 3
    assert load.p50 > 0.05


def test_arrivals_are_as_many_as_asked_for_and_bunch_as_chance_has_it() -> None:
    due = poisson(1000, 20.0)
    assert due == poisson(1000, 20.0) != poisson(1000, 20.0, seed=1)
    assert due == sorted(due)
    assert due[-1] < 20.0
    assert len(due) == pytest.approx(20_000, rel=0.03)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    short = sum(gap < 0.0001 for gap in gaps) / len(gaps)
    assert short == pytest.approx(1 - 2.71828**-0.1, rel=0.1)  # of exponential gaps this share is below a tenth of their mean
