"""Every server that is measured: how it is installed and started, and what it is asked, in which encodings."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import orjson

from benchmarks.environments import ROOT, environment
from benchmarks.load import Ask
from benchmarks.servers.ray_fastapi import CPUS
from benchmarks.servers.running import Encoding, Running, ServerFailed, check_answer, running
from ray_apps.ports import Ports, free_ports

MODEL = "perceptron"
JSON = {"content-type": "application/json"}
HEADER_LENGTH = "inference-header-content-length"


class Place(NamedTuple):
    """Where servers find and leave things. `model`: the ONNX file; `repository`: the same, packaged; `work`: a short path."""

    model: Path
    repository: Path
    work: Path
    args: Mapping[str, Any] = {}  # of Triform's application


class Way(NamedTuple):
    """`command` gets the environment's Python, the place and the ports; `lock`: of an environment of its own.

    `logs`: whether it writes a line for each request, which it does where nobody turns that off.
    """

    title: str
    command: Callable[[str, Place, Ports], list[str]]
    encodings: Mapping[str, Encoding]
    lock: str | None = None
    logs: bool = False
    environ: Callable[[Place, Ports], Mapping[str, str]] = lambda *_: {}

    def python(self, root: Path) -> str:
        """That of its environment, made if it is not there. Raises `subprocess.CalledProcessError` where it does not install."""
        if self.lock is None:
            return sys.executable
        return environment(root.absolute() / f"bench/{self.lock}-venv", ROOT / f"requirements/peers/{self.lock}.txt")

    @contextmanager
    def started(self, python: str, place: Place, x: Any, y: Any) -> Iterator[Running]:
        """The server, once it answers the rows `x` with `y` in each of its encodings. Raises `ServerFailed` if it fails twice."""
        with ExitStack() as stack:
            try:
                server = stack.enter_context(self._running(python, place, x, y))
            except ServerFailed as error:
                print(f"{self.title}: {error}; once more", flush=True)
                server = stack.enter_context(self._running(python, place, x, y))
            yield server

    def _running(self, python: str, place: Place, x: Any, y: Any) -> AbstractContextManager[Running]:
        ports = Ports(*free_ports(4))
        environ = {"BENCH_MODEL": str(place.model), "PYTHONPATH": str(ROOT), "BENTOML_DO_NOT_TRACK": "True"}
        environ |= {"RAY_USAGE_STATS_ENABLED": "0", **self.environ(place, ports)}

        def check(server: Running) -> None:
            for encoding in self.encodings.values():
                check_answer(server, encoding, x, y)

        command, log = self.command(python, place, ports), place.work / "server.log"
        return running(command, (ports.http, ports.grpc), environ=environ, check=check, log=log)


def installed(names: Sequence[str], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each server, and the reasons of those that do not install."""
    pythons, failed = {}, {}
    for name in names:
        try:
            pythons[name] = WAYS[name].python(root)
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:]
            failed[name] = f"does not install: {last[0] if last else error}"
            print(f"{name}: {failed[name]}", flush=True)
    return pythons, failed


def inference_protocol(path: str, **asked: Any) -> dict[str, Encoding]:
    """The Open Inference Protocol in JSON and with binary tensors; `asked`: what a binary request has beside its inputs."""

    def tensor(x: Any) -> dict[str, Any]:
        return {"name": "x", "shape": list(x.shape), "datatype": "FP32"}

    def as_json(x: Any) -> Ask:
        inputs = [{**tensor(x), "data": np.ravel(x)}]
        return Ask(path, JSON, orjson.dumps({"inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY))

    def as_binary(x: Any) -> Ask:
        head = orjson.dumps({"inputs": [{**tensor(x), "parameters": {"binary_data_size": x.nbytes}}], **asked})
        headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
        return Ask(path, headers, head + x.tobytes())

    return {
        "JSON": Encoding(as_json, lambda body, _: orjson.loads(body)["outputs"][0]["data"]),
        "binary": Encoding(as_binary, lambda body, headers: np.frombuffer(body, np.float32, offset=int(headers[HEADER_LENGTH]))),
    }


def plain_json(path: str, read: Callable[[Any], Any]) -> dict[str, Encoding]:
    """Rows as nested lists, for servers that leave the shape of a request to the application."""

    def as_json(x: Any) -> Ask:
        return Ask(path, JSON, orjson.dumps({"x": x}, option=orjson.OPT_SERIALIZE_NUMPY))

    return {"JSON": Encoding(as_json, lambda body, _: read(orjson.loads(body)))}


def message_pack(path: str) -> dict[str, Encoding]:
    def as_binary(x: Any) -> Ask:
        return Ask(path, {"content-type": "application/msgpack"}, msgpack.packb({"x": x.tobytes(), "shape": list(x.shape)}))

    return {"binary": Encoding(as_binary, lambda body, _: np.frombuffer(msgpack.unpackb(body)["y"], np.float32))}


INFER = f"/v2/models/{MODEL}/infer"
OIP = inference_protocol(INFER, parameters={"binary_data_output": True})


def _triform(python: str, place: Place, ports: Ports) -> list[str]:
    args = place.work / "args.json"
    args.write_text(json.dumps(place.args))
    options = {"--repository": place.repository, "--args": args, "--port": ports.http, "--grpc-port": ports.grpc}
    options |= {"--cpus": CPUS, "--grace": 0}
    return [python, "-m", "ray_apps", "--allow-anonymous", *(str(part) for option in options.items() for part in option)]


def _module(name: str) -> Callable[[str, Place, Ports], list[str]]:
    return lambda python, _, ports: [python, "-m", f"benchmarks.servers.{name}", str(ports.http)]


def _fast_serve(place: Place, ports: Ports) -> Mapping[str, str]:
    """The settings that `python -m ray_apps` makes, on ports that nobody else has."""
    return ports.environment(place.work)


def _uvicorn(python: str, _: Place, ports: Ports) -> list[str]:
    app = "benchmarks.servers.raw_asgi:app"
    return [python, "-m", "uvicorn", "--factory", app, "--port", str(ports.http), "--log-level", "warning", "--no-access-log"]


def _bentoml(python: str, _: Place, ports: Ports) -> list[str]:
    program = str(Path(python).with_name("bentoml"))
    where = ["--host", "127.0.0.1", "--port", str(ports.http), "--working-dir", str(ROOT)]
    return [program, "serve", "benchmarks.servers.bentoml_app:Perceptron", *where]


def _mlserver(python: str, place: Place, ports: Ports) -> list[str]:
    """`parallel_workers` 0 keeps the model in the server's own process ("Parallel Inference", user-guide/parallel-inference);
    with its default, a process beside it, it answered 0.6 times as many requests."""
    folder = place.work / MODEL
    folder.mkdir(exist_ok=True)
    settings = {"host": "127.0.0.1", "http_port": ports.http, "grpc_port": ports.grpc, "metrics_port": ports.metrics}
    (folder / "settings.json").write_text(json.dumps({**settings, "debug": False, "parallel_workers": 0}))
    model = {"name": MODEL, "implementation": "benchmarks.servers.mlserver_app.Perceptron"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(Path(python).with_name("mlserver")), "start", str(folder)]


def _mosec(python: str, _: Place, ports: Ports) -> list[str]:
    return [python, "-m", "benchmarks.servers.mosec_app", "--address", "127.0.0.1", "--port", str(ports.http)]


def _triton(python: str, _: Place, ports: Ports) -> list[str]:
    return [python, "-m", "benchmarks.servers.triton_app", str(ports.http), str(ports.grpc), str(ports.metrics)]


def _same_python(*_: object) -> Mapping[str, str]:
    """Triton's Python backend is linked with libpython: it must find that of the interpreter whose library it uses."""
    return {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or ""}


WAYS: Mapping[str, Way] = {
    "triform": Way("Triform on Ray Serve", _triform, OIP, environ=_fast_serve),
    "ray-asgi": Way("raw ASGI on Ray Serve, HAProxy", _module("ray_asgi"), OIP, environ=_fast_serve),
    "uvicorn": Way("raw ASGI on uvicorn", _uvicorn, OIP),
    "ray-fastapi": Way(
        "Ray Serve, the usual way (FastAPI)", _module("ray_fastapi"), plain_json("/predict", lambda told: told), logs=True
    ),
    "litserve": Way("LitServe", _module("litserve_app"), plain_json("/predict", lambda told: told["y"]), "litserve"),
    "bentoml": Way("BentoML", _bentoml, plain_json("/predict", lambda told: told), "bentoml", logs=True),
    "mlserver": Way("MLServer", _mlserver, {"JSON": OIP["JSON"]}, "mlserver"),
    "mosec": Way("mosec", _mosec, plain_json("/inference", lambda told: told["y"]) | message_pack("/binary"), "mosec"),
    "triton": Way("Triton, Python backend", _triton, OIP, "triton", environ=_same_python),
}
