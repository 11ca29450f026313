"""Renders the Lambda form's template without AWS: `python -m infra.serverless package --stage prod`.

    infra/lambda/package-lock.json -> npm ci -> build/osls
    serverless.yml -> osls package, asking a moto server on this machine in AWS's stead -> build/serverless/<stage>/*.json

With layers osls asks CloudFormation what is deployed already; nothing is, and nobody outside this machine is asked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from infra.layers.build import BUILT
from infra.rollout import check_actuators
from triform.cli.output import make_table, run_app
from triform.errors import ConfigurationError, InvalidRequest, JobError

ROOT: Final = Path(__file__).parent.parent
NPM: Final = ROOT / "infra/lambda"
OSLS: Final = ROOT / "build/osls"
STAGES: Final = ("dev", "staging", "prod")
REGION: Final = "us-east-1"
TEMPLATE: Final = "cloudformation-template-update-stack.json"
NPM_SECONDS: Final = 300.0
PACKAGE_SECONDS: Final = 300.0

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def root() -> None:
    """The Lambda form's template."""


@app.command()
def package(
    stage: Annotated[str, typer.Option(help="dev, staging or prod")] = "prod",
    layers: Annotated[Path, typer.Option(help="where `python -m infra.layers build` has built")] = Path("build/layers"),
    out: Annotated[Path, typer.Option(help="gets <stage>/ with the template")] = Path("build/serverless"),
    param: Annotated[list[str] | None, typer.Option(help="key=value, one of serverless.yml's params; may be given again")] = None,
) -> None:
    """Render the CloudFormation template of a stage and print what is in it."""
    pairs = [text.partition("=") for text in param or ()]
    if odd := [key for key, mark, _ in pairs if not (key and mark)]:
        raise InvalidRequest(f"param: expected key=value, got {odd[0][:80]!r}")
    template = render(stage, layers.resolve(), out.resolve() / stage, {key: value for key, _, value in pairs})
    counts: dict[str, int] = {}
    for resource in json.loads(template.read_text())["Resources"].values():
        counts[resource["Type"]] = counts.get(resource["Type"], 0) + 1
    Console().print(make_table("resource", "number", rows=sorted(counts.items()), title=str(template)))


def render(stage: str, layers: Path, out: Path, params: Mapping[str, str] | None = None) -> Path:
    """The template's file, in `out`, which is made anew. Raises `InvalidRequest`, `ConfigurationError`, `JobError`."""
    if stage not in STAGES:
        raise InvalidRequest(f"stage: {stage[:40]!r}: expected one of {', '.join(STAGES)}")
    if not (layers / "function.zip").is_file():
        raise ConfigurationError("layers: none are built there: run `python -m infra.layers build --model ... --each` first")
    given = {**(params or {}), "layers": os.path.relpath(layers, ROOT)}
    options = [f"--param={key}={value}" for key, value in given.items()]
    command = [_tool("node"), str(install_osls()), "package", "--stage", stage, "--package", str(out), *options]
    with _alone(), _nobody() as environ:  # osls has one folder in the project for what it is at
        _run(command, ROOT, environ, PACKAGE_SECONDS)
    template = json.loads((out / TEMPLATE).read_text())
    if (layers / BUILT).is_file():
        check_target(template, json.loads((layers / BUILT).read_text()))
    check_actuators(template, layers)
    return out / TEMPLATE


def check_target(template: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` where a function would get layers of another architecture or Python: its imports would fail."""
    made = f"{built['arch']}, python{built['python']}"
    for name, resource in template["Resources"].items():
        function = resource["Properties"] if resource["Type"] == "AWS::Lambda::Function" else {}
        wanted = f"{function.get('Architectures', ['x86_64'])[0]}, {function.get('Runtime')}"
        if function.get("Layers") and wanted != made:
            raise ConfigurationError(f"architecture: {name} runs on {wanted}, the layers are built for {made}")


def install_osls() -> Path:
    """osls' program, as the lock says; installed once for each lock, by one process at a time."""
    digest = hashlib.sha256((NPM / "package-lock.json").read_bytes()).hexdigest()
    stamp, program = OSLS / ".installed", OSLS / "node_modules/osls/bin/serverless.js"
    with _alone():
        if not (stamp.is_file() and stamp.read_text() == digest and program.is_file()):
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(NPM / name, OSLS / name)
            _run([_tool("npm"), "ci", "--no-audit", "--no-fund", "--ignore-scripts"], OSLS, dict(os.environ), NPM_SECONDS)
            stamp.write_text(digest)
    return program


@contextmanager
def _alone() -> Iterator[None]:
    """One process of this checkout at a time: whoever holds the lock ends within minutes."""
    OSLS.mkdir(parents=True, exist_ok=True)
    with (OSLS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _nobody() -> Iterator[dict[str, str]]:
    """An environment in which AWS is a moto server, and nobody's credentials or settings are found."""
    try:
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError:
        raise ConfigurationError("moto is not installed: run `make setup`") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which logs every request
    server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "SLS_", "SERVERLESS_"))}
        yield plain | {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nobody",
            "AWS_REGION": REGION,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
            "CI": "1",
        }
    finally:
        server.stop()


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigurationError(f"{name} is not on the PATH: the Lambda form is deployed by osls, a Node program")
    return found


def _run(command: list[str], folder: Path, environ: dict[str, str], seconds: float) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{Path(command[0]).name} {Path(command[1]).name} took longer than {seconds:g} s") from None
    if done.returncode:
        raise JobError(f"{Path(command[0]).name} {Path(command[1]).name}: {(done.stdout + done.stderr).strip()[-3000:]}")


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
