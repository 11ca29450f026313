"""`python -m ray_apps --repository models`: a Ray of its own on this machine, and on it the application, until SIGTERM or Ctrl-C.

environment -> build_app -> Ray -> Serve with HAProxy -> wait -> not ready, and answering -> what is in flight is answered -> end
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from ray_apps.arguments import Arguments
from ray_apps.environment import DRAINING, GRPC_MESSAGE, least_of_grpc, serve_environment
from ray_apps.failures import told
from triform.errors import ConfigurationError, TriformError

APP: Final = "triform"
LONGEST_FOLDER: Final = 97 - len("/metrics.sock")  # HAProxy leaves ten bytes of a socket's path for a name of its own at first

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    repository: Annotated[str | None, typer.Option(help="The model repository; else TRIFORM_REPOSITORY")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model to serve, several times for several; else all")] = None,
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="Let in who has no credentials")] = False,
    args: Annotated[str | None, typer.Option(help="A JSON file with further arguments of build_app")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on for HTTP")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port for HTTP", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="The port for gRPC", min=1, max=65535)] = 9000,
    metrics_port: Annotated[int, typer.Option(help="The port of HAProxy's metrics", min=1, max=65535)] = 9101,
    stats_port: Annotated[int, typer.Option(help="The port of HAProxy's own page", min=1, max=65535)] = 8404,
    replica_ports: Annotated[int, typer.Option(help="Where the 2,000 ports of the replicas begin", min=1, max=63000)] = 30000,
    folder: Annotated[str | None, typer.Option(help="For HAProxy's configuration and sockets; else a new one")] = None,
    cpus: Annotated[int | None, typer.Option(help="Logical CPUs of this Ray; else as many as the machine has", min=1)] = None,
    grace: Annotated[float, typer.Option(help="Seconds to answer on while not ready, before the end", min=0)] = 5.0,
) -> None:
    """Serves the models of a repository on this machine."""
    given = _given(args)
    if repository is not None:
        given["repository"] = repository
    if model:
        given["models"] = model
    if allow_anonymous:
        given["allow_anonymous"] = True
    arguments = Arguments.of(given)
    arguments.settings(os.environ)
    listening = {"--port": (host, port), "--grpc-port": (host, grpc_port), "--metrics-port": ("", metrics_port)}
    for option, address in {**listening, "--stats-port": ("", stats_port)}.items():
        _check_free(option, *address)
    at = _folder(folder)
    ports = (replica_ports, replica_ports + 1000)
    os.environ.setdefault(GRPC_MESSAGE, str(least_of_grpc(arguments)))
    for name, value in serve_environment(at, metrics_port=metrics_port, stats_port=stats_port, replica_ports=ports).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(DRAINING, "1")  # one HAProxy, which hears at once
    _run(given, {"host": host, "port": port}, grpc_port, cpus, grace)


def _given(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        given = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigurationError(f"--args: {path} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigurationError(f"--args: {path} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"--args: {path}: expected a JSON object")
    return given


def _check_free(option: str, host: str, port: int) -> None:
    """HAProxy would say so in a log that nobody reads, and Serve try again until it gives up."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigurationError(
            f"{option}: cannot listen on {host or 'every address'}, port {port}: {error.strerror}"
        ) from error


def _folder(given: str | None) -> Path:
    """For HAProxy, which would say what it cannot take in a log that nobody reads."""
    at = Path(given) if given is not None else Path(tempfile.gettempdir(), "triform-serve-????????")
    if (size := len(os.fsencode(at))) > LONGEST_FOLDER:
        raise ConfigurationError(
            f"--folder: {at} has {size} bytes, and HAProxy's sockets take {LONGEST_FOLDER}: name a folder with a shorter path"
        )
    return at if given is not None else Path(tempfile.mkdtemp(prefix="triform-serve-"))


def _run(given: dict[str, Any], http_options: dict[str, Any], grpc_port: int, cpus: int | None, grace: float) -> None:
    import ray  # what stands in the environment by now is what Serve reads
    from ray import serve

    from ray_apps.predict import GRPC, build_app

    made, end = build_app(given), End()
    try:
        with told(APP), end.breaks_off():
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, logging_level="WARNING")
            end.hear()  # Ray has put a handler of its own in place of ours
            grpc_options = {"port": grpc_port, "grpc_servicer_functions": [GRPC], "enable_reflection": False}
            serve.start(http_options=http_options, grpc_options=grpc_options)
            handle = serve.run(made, name=APP, route_prefix="/")
        sys.stderr.write(f"ready: http://{http_options['host']}:{http_options['port']}, gRPC on port {grpc_port}\n")
        sys.stderr.flush()
        end.wait()
        _leave(handle, grace)
        serve.delete(APP)  # answers what is in flight, while HAProxy still stands; a shutdown would take both at once
    finally:
        if ray.is_initialized():  # else it would start one
            serve.shutdown()  # ends HAProxy, which would outlive Ray and keep the ports
        ray.shutdown()


class End:
    """SIGTERM or Ctrl-C. What starts is broken off by it, for Serve waits as long as it takes for replicas that find no room."""

    def __init__(self) -> None:
        self._number = 0
        self._starting = False

    def hear(self) -> None:
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: object) -> None:
        self._number = number
        if self._starting:
            raise KeyboardInterrupt  # the one that Ray lets through

    @contextmanager
    def breaks_off(self) -> Iterator[None]:
        self._starting = True
        self.hear()
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(128 + self._number) from None  # as a shell says it
        finally:
            self._starting = False

    def wait(self) -> None:
        while not self._number:  # no Event: the signal might find its lock taken by the very thread that it interrupts
            time.sleep(0.2)


def _leave(handle: Any, grace: float) -> None:
    """Load balancers are told that we are not ready, and get the time to hear it; whoever comes meanwhile is answered."""
    began = time.monotonic()
    try:
        loop = asyncio.new_event_loop()  # handles of a Serve made for throughput have none; it is needed until Serve is down
        threading.Thread(target=loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(_tell_all(handle), loop).result(grace)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being told, the end comes
        sys.stderr.write(f"not every replica could be told of the end: {error}\n")
    time.sleep(max(0.0, began + grace - time.monotonic()))


async def _tell_all(handle: Any) -> None:
    await handle.broadcast("leave").results_async()


def main() -> None:
    try:
        app()
    except TriformError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
