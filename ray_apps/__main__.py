"""`python -m ray_apps --repository models`: a Ray of its own on this machine, and on it the application, until SIGTERM or Ctrl-C.

environment -> Ray -> Serve with HAProxy -> build_app -> wait -> unready, what is in flight is answered, end
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from ray_apps.arguments import Arguments
from ray_apps.environment import serve_environment
from triform.errors import TriformError

APP: Final = "triform"
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
) -> None:
    """Serves the models of a repository on this machine."""
    given = _given(args)
    if repository is not None:
        given["repository"] = repository
    if model:
        given["models"] = model
    if allow_anonymous:
        given["allow_anonymous"] = True
    Arguments.of(given).settings(os.environ)
    at = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="triform-serve-"))
    ports = (replica_ports, replica_ports + 1000)
    for name, value in serve_environment(at, metrics_port=metrics_port, stats_port=stats_port, replica_ports=ports).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _run(given, {"host": host, "port": port}, grpc_port, cpus)


def _given(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    given = orjson.loads(Path(path).read_bytes())
    if not isinstance(given, dict):
        raise typer.BadParameter("--args: expected a JSON object")
    return given


def _run(given: dict[str, Any], http_options: dict[str, Any], grpc_port: int, cpus: int | None) -> None:
    import ray  # what stands in the environment by now is what Serve reads
    from ray import serve

    from ray_apps.predict import GRPC, build_app

    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, logging_level="WARNING")
    ended = threading.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda *_: ended.set())
    try:
        grpc_options = {"port": grpc_port, "grpc_servicer_functions": [GRPC], "enable_reflection": False}
        serve.start(http_options=http_options, grpc_options=grpc_options)
        serve.run(build_app(given), name=APP, route_prefix="/")
        sys.stderr.write(f"ready: http://{http_options['host']}:{http_options['port']}, gRPC on port {grpc_port}\n")
        sys.stderr.flush()
        while not ended.wait(1.0):  # a wait without an end would keep the signal from its handler on some systems
            pass
        serve.delete(APP)  # answers what is in flight, while HAProxy still stands; a shutdown would take both at once
        serve.shutdown()
    finally:
        ray.shutdown()


def main() -> None:
    try:
        app()
    except TriformError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
