"""Requests pass Serve's own steps by where they can, and Serve knows of them all the same.

Which way one took shows in its answer: Serve adds the request's id after all other headers, the application before the length.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import orjson
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve._private.utils import Semaphore
from ray.serve.config import HTTPOptions
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ray_apps.grpc import OpenInference
from ray_apps.places import REPLICAS, Handlers, no_place, refusing
from ray_apps.spared import Spared
from ray_apps.straight import Straight
from tests.ray_apps.hosts import RunningApp, metrics_port, running, served
from tests.ray_apps.load import until
from tests.ray_apps.ports import SERVE_PORTS
from triform.routes import EVERYBODYS
from triform.testing import RecordingTelemetry

PREFIX = "/below"
PREDICT = "/v1/models/linear:predict"
BODY = b'{"instances": [[1, 2, 3]]}'
LIMIT = {"x-request-timeout-seconds": "30"}


@pytest.fixture(scope="module")
def address(ray_cluster: Any, online_models: Path) -> Iterator[tuple[str, int]]:
    """Of an application below a prefix that answers two requests at a time, and lets one wait."""
    with served(online_models, PREFIX, "straight", max_ongoing_requests=2, max_queued_requests=1) as address:
        deadline = time.monotonic() + 60
        while not went_straight(ask(address, PREFIX + PREDICT)[1]):  # while HAProxy does not know the replica yet
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield address


ASKED: list[str] = []  # the paths of all requests to it but probes, in this module
REFUSED: list[str] = []  # the protocol of each that found no place


def ask(
    address: tuple[str, int], path: str, headers: dict[str, str] | None = None, body: bytes = BODY, method: str = "POST"
) -> tuple[int, list[str], bytes]:
    """Status, the names of the answer's headers in their order, and its body."""
    if method == "POST":
        ASKED.append(path)
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, [name.lower() for name, _ in answer.getheaders()], answer.read()
    finally:
        connection.close()


def went_straight(headers: list[str]) -> bool:
    assert headers.count("x-request-id") == 1
    return headers.index("x-request-id") < headers.index("content-length")


def test_either_way_leads_to_the_same_answer(address: tuple[str, int]) -> None:
    short, long = ask(address, PREFIX + PREDICT), ask(address, PREFIX + PREDICT, LIMIT)
    assert (went_straight(short[1]), went_straight(long[1])) == (True, False)
    assert (short[0], short[2]) == (long[0], long[2]) == (200, b'{"predictions":[[14.0]]}')


def test_a_caller_s_id_is_in_the_answer_once_and_only_if_it_may_be(address: tuple[str, int]) -> None:
    for headers in {}, LIMIT:
        connection = http.client.HTTPConnection(*address, timeout=60)
        for given, told in ("mine-1", "mine-1"), ("no, {this}", None):
            ASKED.append(PREFIX + PREDICT)
            connection.request("POST", PREFIX + PREDICT, BODY, {"x-request-id": given, **headers})
            answer = connection.getresponse()
            answer.read()
            ids = [value for name, value in answer.getheaders() if name.lower() == "x-request-id"]
            assert len(ids) == 1
            assert ids[0] == told or (told is None and re.fullmatch("[0-9a-f]{32}", ids[0]))
        connection.close()


def test_serve_answers_its_own_paths(address: tuple[str, int]) -> None:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/-/routes", timeout=30) as page:
        assert b"straight" in page.read()


@contextmanager
def no_place_free(address: tuple[str, int]) -> Iterator[None]:
    """Two who have not sent all of their bodies have them; they are answered afterwards."""
    slow = [http.client.HTTPConnection(*address, timeout=60) for _ in range(2)]
    for connection in slow:
        ASKED.append(PREFIX + PREDICT)
        connection.putrequest("POST", PREFIX + PREDICT)
        connection.putheader("content-length", str(len(BODY)))
        connection.endheaders(BODY[:1])
    time.sleep(1.0)  # until both are there
    yield
    for connection in slow:
        connection.send(BODY[1:])
        assert connection.getresponse().read() == b'{"predictions":[[14.0]]}'
        connection.close()


@contextmanager
def no_room_to_wait(address: tuple[str, int]) -> Iterator[None]:
    """The same, and a third waits for them."""
    third = threading.Thread(target=ask, args=(address, PREFIX + PREDICT))
    with no_place_free(address):
        third.start()
        time.sleep(1.0)  # until it is there, too
        yield
    third.join(60)


def test_who_finds_no_place_waits_as_serve_has_it(address: tuple[str, int]) -> None:
    """Two who send no body hold the places; the third waits in Serve, until they have gone."""
    answers: list[tuple[int, list[str], bytes]] = []
    third = threading.Thread(target=lambda: answers.append(ask(address, PREFIX + PREDICT)))
    with no_place_free(address):
        third.start()
        third.join(1.0)
        assert answers == [], "it waits"
    third.join(60)
    assert (answers[0][0], went_straight(answers[0][1])) == (200, False)
    assert went_straight(ask(address, PREFIX + PREDICT)[1]), "places are free again"


COUNTS = (
    "ray_serve_deployment_request_counter_total{",
    "ray_serve_deployment_processing_latency_ms_count{",
    'ray_serve_deployment_processing_latency_ms_bucket{le="+Inf"',
    "ray_serve_num_http_requests_total{",
    "ray_serve_http_request_latency_ms_count{",
    'ray_serve_http_request_latency_ms_bucket{le="+Inf"',
)


def counted(port: int) -> dict[str, float]:
    """What Serve says it has answered of this application's predictions, in all its replicas."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    assert "# TYPE ray_serve_http_request_latency_ms_bucket gauge" in lines
    found = dict.fromkeys(COUNTS, 0.0)
    for line in lines:
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        if labels.get("application") != "straight" or labels.get("method", "POST") != "POST":
            continue
        for name in COUNTS:
            metric, _, le = name.partition("{")
            if line.startswith(metric + "{") and (not le or labels["le"] == "+Inf"):
                found[name] += float(line.rpartition(" ")[2])
    return found


def test_serve_counts_them(address: tuple[str, int], ray_cluster: Any) -> None:
    """Each once, whichever way it took."""
    for headers in [None] * 20 + [LIMIT] * 3:
        assert ask(address, PREFIX + PREDICT, headers)[0] == 200
    port, deadline = metrics_port(ray_cluster), time.monotonic() + 90
    time.sleep(6.0)  # gauges are told every five seconds
    while (now := counted(port)) != dict.fromkeys(COUNTS, float(len(ASKED))):
        assert time.monotonic() < deadline, f"{now} of {len(ASKED)}"
        time.sleep(0.5)


def test_probes_are_answered_though_no_place_is_free(address: tuple[str, int]) -> None:
    """Who is busy is not ill. After the test above, whose counts have no probes."""
    with no_place_free(address):
        for path in EVERYBODYS:
            for limit in {}, LIMIT:
                status, headers, _ = ask(address, PREFIX + path, limit, b"", "GET")
                assert (status, went_straight(headers)) == (200, True), path
    assert went_straight(ask(address, PREFIX + PREDICT)[1]), "places are free again"


def test_who_may_not_even_wait_is_told_so_in_our_words(address: tuple[str, int]) -> None:
    with no_room_to_wait(address):
        for body, given in (BODY, {}), (b" " * 200_000 + BODY, {}), (BODY, LIMIT):
            status, headers, said = ask(address, PREFIX + PREDICT, given, body=body)
            assert (status, orjson.loads(said)["code"], went_straight(headers)) == (429, "overloaded", True)
            assert "retry-after" in headers
            REFUSED.append("HTTP")
    assert ask(address, PREFIX + PREDICT)[0] == 200, "places are free again"


def test_over_grpc_as_well(address: tuple[str, int], ray_cluster: Any) -> None:
    """The status, a stream's too, and the count; probes are answered meanwhile."""
    to = [("application", "straight")]
    x = {"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": {"fp32_contents": [1, 2, 3]}}
    request = service_pb2.ModelInferRequest(model_name="linear", inputs=[x])
    with grpc.insecure_channel(f"127.0.0.1:{SERVE_PORTS.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with no_room_to_wait(address):
            for calls in stub.ModelInfer, lambda one, **more: list(stub.ModelStreamInfer(iter([one]), **more)):
                with pytest.raises(grpc.RpcError) as refusal:
                    calls(request, metadata=to, timeout=60)
                assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert refusal.value.details() == str(no_place())
                assert "request_id" in dict(refusal.value.trailing_metadata())
                REFUSED.append("gRPC")
            with pytest.raises(grpc.RpcError) as refusal:
                stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=[("application", "another")], timeout=10)
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
            assert stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=to, timeout=10).live
            assert stub.ServerReady(service_pb2.ServerReadyRequest(), metadata=to, timeout=10).ready
        assert stub.ModelInfer(request, metadata=to, timeout=60).outputs[0].contents.fp32_contents == [14.0]
    until(lambda: overloaded(ray_cluster) == len(REFUSED))


def overloaded(ray_cluster: Any) -> int:
    """How many requests this application's replica has counted that found no place."""
    port = metrics_port(ray_cluster)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    workers = {worker for line in lines if 'application="straight"' in line for worker in re.findall(r'WorkerId="(\w+)"', line)}
    refused = [line for line in lines if re.match(r'ray_triform_requests_total\{.*code="overloaded"', line)]
    return int(sum(float(line.rpartition(" ")[2]) for line in refused if any(worker in line for worker in workers)))


class Counts:
    """What counts in a replica, as far as requests that go straight are concerned."""

    def __init__(self) -> None:
        self.ongoing = 0
        self._failed = False
        self.requests: list[tuple[str, str, bool]] = []  # route, status, whether it failed

    def inc_num_ongoing_requests(self, _: Any) -> None:
        self.ongoing += 1

    def dec_num_ongoing_requests(self, _: Any) -> None:
        self.ongoing -= 1

    def record_request_metrics(self, *, is_error: bool, **_: Any) -> None:
        self._failed = is_error

    def record_ingress_request_metrics(self, *, route: str, status_code: str, **_: Any) -> None:
        self.requests.append((route, status_code, self._failed))


class Replica:
    """Ray's, as far as that; its semaphore is Ray's own."""

    def __init__(self, app: Any, places: int = 2) -> None:
        self._user_callable_asgi_app = app
        self._semaphore = Semaphore(lambda: places)
        self._num_queued_requests = 0
        self.max_queued_requests = 5
        self._metrics_manager: Any = Counts()
        self._http_options = HTTPOptions()
        self._route_prefix = "/"
        self._deployment_id = DeploymentID(name="predict", app_name="straight")
        self._user_callable_wrapper: Any = SimpleNamespace(_run_user_code_in_separate_thread=False)
        self.left_to_serve = 0

    async def asgi(self, *_: Any) -> None:
        self.left_to_serve += 1

    @property
    def below(self) -> Any:
        """As a middleware finds it."""
        return SimpleNamespace(_app=self.asgi)


@pytest.fixture(scope="module")
def app(online_models: Path) -> Iterator[RunningApp]:
    with running(online_models) as app:
        yield app


def call(app: RunningApp, replica: Replica, path: str = PREDICT, receive: Any = None, **scope: Any) -> int | None:
    """The status that the middleware before the replica answers; None where Serve is to answer."""
    sent: list[Any] = []
    left = [BODY]

    async def body() -> Any:
        return {"type": "http.request", "body": left.pop()} if left else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "headers": [(b"host", b"localhost")],
        **scope,
    }

    async def below(scope: Any, receive: Any, send: Any) -> None:
        await replica.asgi(scope, receive, send)

    below._app = replica.asgi  # type: ignore[attr-defined]
    asyncio.run_coroutine_threadsafe(Spared(below)(whole, receive or body, send), app.loop).result(60)
    return sent[0]["status"] if sent else None


@pytest.mark.parametrize("path", [PREDICT, "/v1/models/nobody:predict"])
def test_places_and_counts_are_as_before(app: RunningApp, path: str) -> None:
    replica = Replica(app.app)
    status = call(app, replica, path)
    assert replica._metrics_manager.requests == [("/", str(status), False)]
    assert (replica._metrics_manager.ongoing, replica._semaphore._value) == (0, 0)


def test_so_they_are_after_who_has_gone_and_after_a_failure_which_is_logged(
    app: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def fails() -> Any:
        raise ZeroDivisionError("so it is")

    replica = Replica(app.app)
    assert call(app, replica, receive=gone) == 499
    with pytest.raises(ZeroDivisionError):
        call(app, replica, receive=fails)
    assert "so it is" in caplog.text
    assert replica._metrics_manager.requests == [("/", "499", False), ("/", "500", True)]
    assert (replica._metrics_manager.ongoing, replica._semaphore._value) == (0, 0)


def test_the_prefix_may_change(app: RunningApp) -> None:
    replica = Replica(app.app)
    straight = Straight.of(replica.below)
    assert straight is not None
    for prefix in "/", "/below", "/":
        replica._route_prefix = prefix
        path = prefix.rstrip("/") + PREDICT
        assert call(app, replica, path) == 200
        assert straight.takes({"path": path, "headers": []})
    replica._route_prefix = "/below"
    assert not straight.takes({"path": PREDICT, "headers": []}), "which is Serve's to refuse"


def test_what_serve_acts_on_is_left_to_it(app: RunningApp) -> None:
    replica = Replica(app.app, places=0)
    assert call(app, replica) is None, "there is no place"
    replica = Replica(app.app)
    assert call(app, replica, "/-/healthz") is None
    assert call(app, replica, headers=[(name.encode(), value.encode()) for name, value in LIMIT.items()]) is None
    assert call(app, replica, type="websocket") is None
    assert (replica.left_to_serve, replica._metrics_manager.requests) == (3, [])


def test_who_may_not_even_wait_is_refused_and_counted(online_models: Path) -> None:
    """As by any of our refusals, and in Serve's own counts; unless any number may wait, which Serve sees to."""
    telemetry = RecordingTelemetry()
    with running(online_models, telemetry) as app:
        replica = Replica(app.app, places=0)
        replica._num_queued_requests = 5
        assert call(app, replica) == 429
        assert call(app, replica, headers=[(b"x-request-timeout-seconds", b"30")]) == 429
        assert call(app, replica, "/v2/health/live", method="GET") == 200
        replica.max_queued_requests = -1
        assert call(app, replica) is None
    assert [(record.model, record.code) for record in telemetry.records] == [("unknown", "overloaded")] * 2
    assert replica._metrics_manager.requests == [("/", "429", False), ("/", "429", False), ("/", "200", False)]
    assert (replica._metrics_manager.ongoing, replica._semaphore._value) == (0, 0)


def test_there_is_no_short_way_where_serve_acts_on_all(app: RunningApp) -> None:
    limited, threaded = Replica(app.app), Replica(app.app)
    limited._http_options = HTTPOptions(request_timeout_s=1.0)
    threaded._user_callable_wrapper._run_user_code_in_separate_thread = True
    for replica in limited, threaded:
        assert call(app, replica) is None
        assert replica.left_to_serve == 1


def test_there_is_no_short_way_to_what_is_none_of_ours(app: RunningApp) -> None:
    async def another(scope: Any, receive: Any, send: Any) -> None: ...

    for below in another, SimpleNamespace(_app=another), Replica(another).below:
        assert Straight.of(below) is None


def test_where_serve_has_changed_requests_go_its_own_way(app: RunningApp, caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica(app.app)
    replica._metrics_manager = object()
    assert call(app, replica) is None
    assert replica.left_to_serve == 1
    assert "its long way" in caplog.text


class Server:
    """Serve's for gRPC, as far as its factory of handlers is concerned."""

    def __init__(self, factory: Any) -> None:
        self.service_handler_factory = factory


def test_what_makes_handlers_is_put_back_and_only_in_replicas_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    class Owner:
        """Another application's replica, Serve's proxy in Python, or what a later Ray has."""

        def __init__(self, application: Any) -> None:
            self._user_callable_wrapper = SimpleNamespace(_callable=application, _run_user_code_in_separate_thread=False)

        def make(self, **_: Any) -> str:
            return "Serve's"

    ours, others = Owner(OpenInference()), Owner("another's")
    ours.__dict__ |= {name: getattr(Replica(None), name) for name in REPLICAS}
    for owner, is_ours in (ours, True), (others, False), (Owner(OpenInference()), False):
        assert caplog.text == ""
        server = Server(owner.make)
        with refusing(server):
            assert isinstance(server.service_handler_factory, Handlers) is is_ours
        assert server.service_handler_factory == owner.make
    assert "another than 2.60 (no _semaphore): it refuses gRPC calls itself" in caplog.text
    with refusing(object()):
        """A server of grpc's own has no factory."""
