"""A model that is slow beside one that is not, in one replica behind HAProxy: nobody waits for it who did not ask for it."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import orjson
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.ray_apps.hosts import counted, served
from tests.ray_apps.load import load, until
from tests.ray_apps.ports import SERVE_PORTS
from triform import testing

PLACES, CLIENTS = 4, 8
ROWS, MANY = 64, 2048  # a tenth of a second or two, and some seconds
QUICK = service_pb2.ModelInferRequest(
    model_name="linear", inputs=[{"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": {"fp32_contents": [1, 2, 3]}}]
)


class Application(NamedTuple):
    """`slow`: the name that its slow model has, and so has it."""

    address: tuple[str, int]
    slow: str
    stub: Any

    def infer(self, request: Any, timeout: float = 60.0) -> Any:
        """A call that is under way."""
        return self.stub.ModelInfer.future(request, timeout=timeout, metadata=[("application", self.slow)])

    def slowly(self, rows: int = ROWS, timeout: float = 60.0) -> Any:
        x = {"name": "x", "datatype": "FP32", "shape": [rows, 256]}
        raw = [bytes(4 * 256 * rows)]
        return self.infer(service_pb2.ModelInferRequest(model_name=self.slow, inputs=[x], raw_input_contents=raw), timeout)


@pytest.fixture(scope="module")
def application(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder, slow = tmp_path_factory.mktemp("models"), f"slow-{uuid.uuid4().hex[:8]}"
    models = {"linear": testing.linear(folder / "linear.onnx"), slow: testing.slow(folder / "slow.onnx", layers=2000)}
    testing.repository(folder / "models", models)
    with (
        served(folder / "models", f"/{slow}", slow, default_model="linear", max_ongoing_requests=PLACES, timeout_s=60) as address,
        grpc.insecure_channel(f"127.0.0.1:{SERVE_PORTS.grpc}") as channel,
    ):
        yield Application(address, slow, service_pb2_grpc.GRPCInferenceServiceStub(channel))


def test_it_takes_half_of_the_places(application: Application) -> None:
    """Eight ask for it again and again; what is beyond its half is refused, and the other model is there for others."""
    path, headers = f"/{application.slow}/v2/models/{application.slow}/infer", {"inference-header-content-length": "0"}
    with load(application.address, path, bytes(4 * 256 * ROWS), CLIENTS, headers=headers) as asking:
        asking.until(lambda seen: {s.status for s in seen} == {200, 429})
        began = time.monotonic()
        for _ in range(20):
            assert application.infer(QUICK).result().outputs[0].contents.fp32_contents == [14.0]
        lasted = time.monotonic() - began
        asking.until(lambda seen: sum(s.status == 200 for s in seen) >= 4)
        calls = [application.slowly() for _ in range(3 * PLACES)]
        codes = {call.code() for call in calls}
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    told = Counter(s.status for s in asking.seen)
    assert set(told) == {200, 429}, told
    refusals = [orjson.loads(s.body) for s in asking.seen if s.status == 429]
    assert {refusal["code"] for refusal in refusals} == {"overloaded"}
    assert all("2 requests wait or run already, 2 may" in refusal["error"] for refusal in refusals), refusals[0]
    slow = sorted(s.seconds for s in asking.seen if s.status == 200)
    print(f"{told}; {lasted / 20:.3f} s a quick one, {slow[len(slow) // 2]:.3f} s a slow one")


def test_who_does_not_wait_for_it_is_told_in_time_and_makes_nobody_wait(application: Application, ray_cluster: Any) -> None:
    """By a deadline, and by hanging up, over gRPC; both callers' requests are in the counts as given up."""
    before = counted(ray_cluster, application.slow)
    assert len(application.slowly().result().raw_output_contents[0]) == 4 * 256 * ROWS
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as late:
        application.slowly(MANY, timeout=1.0).result()
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gone = application.slowly(MANY)
    time.sleep(1.0)  # it is there by now
    assert gone.cancel()
    assert application.infer(QUICK).result().outputs[0].contents.fp32_contents == [14.0]
    until(lambda: (counted(ray_cluster, application.slow) - before)["cancelled"] == 2)
    both = [application.slowly() for _ in range(PLACES // 2)]
    assert [len(call.result().raw_output_contents[0]) for call in both] == [4 * 256 * ROWS] * 2, "its places are free again"
    print(f"{time.monotonic() - began:.1f} s, {counted(ray_cluster, application.slow) - before}")
