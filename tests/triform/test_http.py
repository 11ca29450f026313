"""What a host cannot show of `http.py`: sizes at their limits, deadlines, faults of ours, the log. See tests/conformance."""

from __future__ import annotations

import gzip
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conformance.models import surface
from triform import testing
from triform.errors import StoreError
from triform.http import HttpRequest, HttpResponse, HttpSurface, Limits
from triform.models import Models
from triform.predictor import Predictor
from triform.repository import ModelRepository
from triform.routes import ROUTES
from triform.service import InferenceService

PREDICT = "/v1/models/linear:predict"
GOOD = b'{"instances": [[1, 2, 3]]}'


def post(to: HttpSurface, body: bytes, *headers: tuple[str, str], path: str = PREDICT, **options: Any) -> HttpResponse:
    return to.handle(HttpRequest("POST", path, headers, body), **options)


def code(answer: HttpResponse) -> str:
    return str(orjson.loads(answer.body)["code"])


@pytest.fixture(scope="module")
def small(online_models: Path) -> HttpSurface:
    return surface(online_models, limits=Limits(request=100, unpacked=200, response=120))


def test_a_body_at_the_limit_is_answered_one_byte_more_is_not(small: HttpSurface) -> None:
    assert post(small, GOOD.ljust(100)).status == 200
    answer = post(small, GOOD.ljust(101))
    assert (answer.status, code(answer)) == (413, "payload_too_large")
    assert "more than the 100 bytes" in orjson.loads(answer.body)["error"]


def test_so_is_one_that_unpacks_to_the_limit(small: HttpSurface) -> None:
    packed = ("content-encoding", "gzip")
    assert post(small, gzip.compress(GOOD.ljust(200)), packed).status == 200
    answer = post(small, gzip.compress(GOOD.ljust(201)), packed)
    assert (answer.status, code(answer)) == (413, "payload_too_large")


def test_an_answer_beyond_the_limit_is_an_error_and_never_cut(small: HttpSurface) -> None:
    rows = b'{"instances":[' + b",".join([b"[9,9,9]"] * 10) + b"]}"
    assert post(small, rows).status == 200
    much = b'{"inputs":[' + b",".join([b"[9,9,9]"] * 20) + b"]}"
    answer = post(small, gzip.compress(much), ("content-encoding", "gzip"))
    assert (answer.status, code(answer)) == (413, "answer_too_large")


@pytest.mark.parametrize("name", ["content-type", "content-encoding", "inference-header-content-length"])
@pytest.mark.parametrize("second", ["the same", "another"])
def test_a_header_that_decides_may_not_stand_twice(small: HttpSurface, name: str, second: str) -> None:
    value = {"content-type": "application/json", "content-encoding": "identity", "inference-header-content-length": "20"}[name]
    other = value if second == "the same" else {"content-type": "text/csv", "content-encoding": "gzip"}.get(name, "21")
    answer = post(small, GOOD, (name, value), (name.title(), other), path="/v2/models/linear/infer")
    assert (answer.status, code(answer)) == (400, "invalid_request")
    assert name in orjson.loads(answer.body)["error"]


def test_a_deadline_that_has_passed_is_a_504(online_models: Path) -> None:
    answer = post(surface(online_models), GOOD, deadline=time.monotonic() - 1)
    assert (answer.status, code(answer), answer.headers["retry-after"]) == (504, "deadline_exceeded", "1")


def test_a_run_is_ended_at_its_deadline(tmp_path: Path, repository: Callable[..., ModelRepository]) -> None:
    made = repository(slow=testing.slow(tmp_path / "slow.onnx"))
    models = Models(form="serve")
    models.add("slow", 1, lambda: Predictor.load(made.package("slow", 1)))
    body = orjson.dumps({"instances": [[0.5] * 256] * 4000})
    started = time.monotonic()
    answer = post(HttpSurface(InferenceService(models)), body, path="/v1/models/slow:predict", deadline=started + 0.4)
    assert (answer.status, code(answer)) == (504, "deadline_exceeded")


@pytest.mark.parametrize(("given", "kept"), [("host-1", True), ("bad\r\nid", False), ("", False), (None, False)])
def test_the_hosts_request_id_stands_in_for_the_callers(small: HttpSurface, given: str | None, kept: bool) -> None:
    assert (post(small, GOOD, request_id=given).headers["x-request-id"] == given) == kept
    assert post(small, GOOD, ("x-request-id", "callers"), request_id=given).headers["x-request-id"] == "callers"


def test_each_route_has_its_method_and_no_other_path_finds_it(small: HttpSurface) -> None:
    for route in ROUTES:
        path = route.template.format(model="linear", version="1", alias="stable") if "{" in route.template else route.template
        assert post(small, b"", path=path).status != 405 or route.method == "GET"
        assert code(small.handle(HttpRequest("PURGE", path))) == "method_not_allowed"
        assert code(small.handle(HttpRequest(route.method, path + "/x"))) == "route_not_found"


class Broken:
    """A predictor's place that is never filled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self) -> Predictor:
        raise self.error


def broken(error: BaseException) -> HttpSurface:
    models = Models(form="serve")
    models.add("linear", 1, Broken(error), now=False)
    return HttpSurface(InferenceService(models))


def test_a_fault_of_ours_tells_the_log_and_not_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    answer = post(broken(ZeroDivisionError("at /srv/secret/path")), GOOD, request_id="req-1")
    assert (answer.status, code(answer)) == (500, "internal")
    assert b"secret" not in answer.body
    assert "secret" in caplog.text
    assert "req-1" in caplog.text


def test_memory_that_runs_out_is_a_503(caplog: pytest.LogCaptureFixture) -> None:
    answer = post(broken(MemoryError()), GOOD)
    assert (answer.status, code(answer), answer.headers["retry-after"]) == (503, "resource_exhausted", "1")


def test_a_store_that_fails_is_a_503_and_the_next_request_tries_again(online_models: Path) -> None:
    errors = [StoreError("the repository does not answer")]

    def load() -> Predictor:
        if errors:
            raise errors.pop()
        return Predictor.load(testing.open_repository(online_models).package("linear", 1))

    models = Models(form="serve")
    models.add("linear", 1, load, now=False)
    to = HttpSurface(InferenceService(models))
    assert to.handle(HttpRequest("GET", "/v2/health/ready")).status == 200, "a model that loads with its first request can answer"
    first = post(to, GOOD)
    assert (first.status, code(first)) == (503, "store_unavailable")
    for path in ("/v2/health/ready", "/v2/models/linear/ready", "/ping"):
        assert to.handle(HttpRequest("GET", path)).status == 503
    status = orjson.loads(to.handle(HttpRequest("GET", "/v1/models/linear")).body)["model_version_status"]
    assert [(s["state"], s["status"]["error_code"]) for s in status] == [("END", "UNAVAILABLE")]
    assert post(to, GOOD).status == 200
    assert to.handle(HttpRequest("GET", "/v2/health/ready")).status == 200


def test_a_callers_mistake_is_not_logged(small: HttpSurface, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    post(small, b'{"instances": "secret"}', ("x-request-id", "a\r\nb"))
    assert caplog.records == []


def test_what_no_python_text_should_hold_is_answered_all_the_same(small: HttpSurface) -> None:
    for path in ("/v2/models/\udcff/infer", "/v2/models/%ed%a0%80/infer", "/\udcff"):
        assert post(small, GOOD, ("x-request-id", "\udcff"), path=path).status == 404
    assert small.handle(HttpRequest("\udcff", PREDICT)).status == 405
    assert post(small, GOOD, ("content-type", "\udcff")).status == 415


def test_models_are_named_to_whom_names_none(online_models: Path) -> None:
    """Without a default and with several models, /invocations says which there are."""
    to = surface(online_models)
    to.service.models.default = None
    answer = post(to, GOOD, path="/invocations")
    assert (answer.status, code(answer)) == (400, "invalid_request")
    assert "flights" in orjson.loads(answer.body)["error"]
    assert "TRIFORM_DEFAULT_MODEL" in orjson.loads(answer.body)["error"]
