"""One Ray cluster a session; tiny models and repositories for every test."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings

from infra.local.processes import background
from tests.conformance.models import build
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.ray_apps.ports import SERVE_PORTS
from triform import golden, testing
from triform.repository import ModelRepository

if TYPE_CHECKING:
    from batch.job import Summary

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers starve beside another process of tests
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # each start has four workers otherwise, which few tests need
os.environ.update(SERVE_PORTS.environment(Path(tempfile.mkdtemp(prefix="serve-"))))  # before Ray Serve is imported anywhere


ROOT = Path(__file__).parent.parent

# How long an example takes, to make or to try, says more of the machine than of the code.
settings.register_profile("triform", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("triform")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the Ray cluster runs in one process, so that a session has one cluster however many processes it has.

    So does what needs the year of flights, which is built once; and what needs a rendered template, in another one.
    """
    for item in items:
        params = getattr(item, "callspec", None)
        fixtures = getattr(item, "fixturenames", ())
        if {"ray_cluster", "flights"} & set(fixtures) or (params and params.params.get("send") == "serve"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif {"rendered", "guarded"} & set(fixtures):
            item.add_marker(pytest.mark.xdist_group("osls"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8: half a surrogate that a test logged is written as text."""
    report = yield
    report.sections = [(name, said.encode(errors="backslashreplace").decode()) for name, said in report.sections]
    return report


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TRIFORM_* of the developer's shell reaches a test."""
    for key in [k for k in os.environ if k.startswith("TRIFORM_")]:
        monkeypatch.delenv(key)


TRIES = ("test_golden", "test_package", "test_packaging", "test_local")  # tests whose subject is what is tried, and how


@pytest.fixture(scope="session", autouse=True)
def _tried_once() -> Iterator[None]:
    """The same small files are tried in a child process once by each process of tests: half of its time went there, as the same
    few models are packaged again and again. What is refused is tried each time, and so is all that `TRIES` have."""
    in_child, tried = golden._in_child, set[bytes]()

    def once(path: Path, seconds: float, memory_bytes: int) -> None:
        folder = path if path.is_dir() else path.parent
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        test = Path(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]).name
        if test.startswith(TRIES) or sum(file.stat().st_size for file in files) > 1 << 20:
            in_child(path, seconds, memory_bytes)
            return
        told = [(str(file.relative_to(folder)), file.read_bytes()) for file in files]
        if (content := hashlib.sha256(repr((path.is_dir(), told)).encode()).digest()) not in tried:
            in_child(path, seconds, memory_bytes)
            tried.add(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "_in_child", once)
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The session's cluster: 4 logical CPUs, whatever the machine has; with the dashboard, which is where the job API lives."""
    import ray

    options = {"object_store_memory": 150_000_000, "logging_level": "ERROR", "log_to_driver": False}
    with pytest.MonkeyPatch.context() as patch:  # `ray start` can choose the port of the job API's agent, `ray.init` cannot
        anywhere = partial(ray._private.parameter.RayParams, dashboard_agent_listen_port=0)
        patch.setattr(ray._private.parameter, "RayParams", anywhere)
        ray.init("local", num_cpus=4, include_dashboard=True, **options)
    yield ray
    ray.shutdown()


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., ModelRepository]:
    """`repository(linear=path, ...)`: a fresh repository with each ONNX file as version 1."""

    def make(config: dict[str, str] | None = None, **models: Path) -> ModelRepository:
        return testing.repository(tmp_path / "models", models, config=config)

    return make


@pytest.fixture(scope="session")
def online_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the models of tests/conformance/models.py; not to be changed."""
    return build(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="session")
def serve_address(ray_cluster: Any, online_models: Path) -> Iterator[tuple[str, int]]:
    """Host and port of the Serve application with those models; its gRPC is on `SERVE_PORTS.grpc`."""
    from tests.ray_apps.hosts import served

    with served(online_models) as address:
        yield address


@pytest.fixture(scope="session")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flights example, built."""
    from examples.flights import build

    root = tmp_path_factory.mktemp("flights")
    build.build(root)
    return root


@pytest.fixture(scope="session")
def scored(flights: Path, ray_cluster: Any) -> Summary:
    """The batch job's run over all of it."""
    from rich.console import Console

    from batch import job
    from examples.flights import scoring

    return job.run(msgspec.structs.replace(scoring.spec(flights), actors=2), Console(quiet=True))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 over HTTP on loopback: the address of a moto server.

    S3 answers one of several conditional writes that come at once; moto looks, and then writes, and may answer two. So here they
    come to it one by one.
    """
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    for name in "put_object", "_key_response_post":  # the latter completes uploads in parts
        setattr(S3Response, name, _one_by_one(getattr(S3Response, name)))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


_TURN = threading.RLock()


def _one_by_one(act: Callable[..., Any]) -> Callable[..., Any]:
    def locked(*given: Any, **named: Any) -> Any:
        with _TURN:  # the body has been read by then
            return act(*given, **named)

    return locked


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket; the environment leads boto3 to it."""
    import boto3

    settings = {
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test-secret",
        "DEFAULT_REGION": "us-east-1",
        "ENDPOINT_URL": s3_server,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    """A proxy before that server which fails as it is told to."""
    with faulty_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def token_secret(ray_cluster: Any, s3_bucket: str) -> dict[str, str]:
    """The setting that names the secret with the cluster's token, as the SDK sends it; none where Ray asks for none."""
    import boto3
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers = {name.lower(): value for name, value in get_auth_headers_if_auth_enabled({}).items()}
    if not headers:
        return {}
    token = headers["authorization"].removeprefix("Bearer ")
    boto3.client("secretsmanager").create_secret(Name=f"ray-{s3_bucket}", SecretString=token)
    return {"ray_token_secret": f"ray-{s3_bucket}"}


@pytest.fixture(scope="session")
def debian() -> Callable[..., Path]:
    """`debian("promtool", package="prometheus")`: a program of a Debian package; fetched once, see infra/debian.sh."""

    def program(name: str, *, package: str) -> Path:
        done = subprocess.run([ROOT / "infra/debian.sh", package], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip()) / name

    return program


@pytest.fixture
def pushgateway(debian: Callable[..., Path], tmp_path: Path) -> Iterator[str]:
    """A Pushgateway of its own on loopback: its address."""
    program = debian("prometheus-pushgateway", package="prometheus-pushgateway")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]
    with background(command, tmp_path / "pushgateway.log") as process:
        _await(f"http://127.0.0.1:{port}/-/ready", process)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def redis_server(debian: Callable[..., Path]) -> Iterator[str]:
    """A Redis of its own on a socket: its address."""
    for package in "libjemalloc2", "liblzf1", "redis-tools":
        debian("", package=package)
    program = debian("redis-server", package="redis-server")
    libraries = ":".join(map(str, (program.parent.parent / "lib").glob("*-linux-gnu")))
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # a socket's path has some hundred characters at most
        at = Path(folder) / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", at, "--save", "", "--dir", folder]
        with background(command, Path(folder) / "log", {**os.environ, "LD_LIBRARY_PATH": libraries}) as process:
            _await_socket(at, process)
            yield f"unix://{at}"


def _await_socket(at: Path, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(at))
            except OSError:
                assert process.poll() is None, f"it ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{at} does not answer"
                time.sleep(0.02)
            else:
                return


def _await(url: str, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - loopback
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, f"it ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)
