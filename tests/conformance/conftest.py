"""`send` of each host, and the shapes that most requests have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conformance.hosts import HOSTS, SLOW, Answer, Send

# What a host's own server does before the surface is asked, by the beginning of the tests' names.
EXCEPTIONS = {
    "test_a_header_length_that_is_sent_twice[lambda-alb]": "a load balancer passes on the last one alone",
    r"test_another_request_id_is_replaced[serve-\x1b": "HAProxy answers 400 to control characters in a header, in HTML",
    r"test_what_nobody_here_reads[serve-\x1b": "HAProxy answers 400 to control characters in a header, in HTML",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in EXCEPTIONS.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HOSTS])
def send(request: pytest.FixtureRequest, online_models: Path) -> Iterator[Send]:
    if request.param == "serve":
        request.getfixturevalue("serve_address")
    with HOSTS[request.param](online_models) as sender:
        yield sender


@pytest.fixture
def post(send: Send) -> Callable[..., Any]:
    """`post(path, {...})`: the value in the JSON answer to a JSON body; it must be a 200."""

    def post(path: str, value: Any) -> Any:
        answer = send("POST", path, {"content-type": "application/json"}, orjson.dumps(value))
        assert answer.status == 200, answer
        return orjson.loads(answer.body)

    return post


@pytest.fixture
def refused(send: Send) -> Callable[..., str]:
    """`refused(answer, status, code)`: the message of the error, which has the form's shape; and the next request is answered."""

    def refused(answer: Answer, status: int, code: str) -> str:
        told = orjson.loads(answer.body)
        assert (answer.status, told.get("code")) == (status, code), told
        assert set(told) == {"error", "code"}
        assert answer.headers["content-type"] == "application/json"
        assert not any(trace in told["error"] for trace in ("Traceback", ".py", "/tmp/"))
        good = send("POST", "/v1/models/linear:predict", {}, b'{"instances": [[1, 2, 3]]}')
        assert (good.status, good.body) == (200, b'{"predictions":[[14.0]]}')
        return str(told["error"])

    return refused
