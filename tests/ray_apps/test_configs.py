"""The Serve configurations: as Ray's own schema and `build_app` read them, and one of them deployed by Ray's own command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_apps.arguments import Arguments
from ray_apps.ports import Ports, free_ports
from ray_apps.predict import build_app
from triform.errors import ConfigurationError
from triform.runtime import PROVIDERS, RuntimeOptions, provider_options

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "ray_apps").glob("*.yaml"))
GIB = 1 << 30


def args_of(path: Path) -> dict[str, Any]:
    (app,) = yaml.safe_load(path.read_text())["applications"]
    args: dict[str, Any] = app["args"]
    return args


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_ray_reads_it(path: Path) -> None:
    """Ray's schema passes over fields that it does not know, so what it made of the file must be all of it."""
    given = yaml.safe_load(path.read_text())
    read = ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True, mode="json")
    assert read == given
    assert read["grpc_options"]["grpc_servicer_functions"] == ["ray_apps.messages.add_to_server"]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_build_app_reads_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFORM_REPOSITORY", "models")
    with pytest.raises(ConfigurationError, match="credentials are required"):
        build_app(args_of(path))
    monkeypatch.setenv("TRIFORM_API_KEYS_FILE", "keys.json")
    app = build_app(args_of(path))
    options = app._bound_deployment.ray_actor_options
    assert options["num_gpus"] == args_of(path).get("num_gpus", 0)
    assert options["resources"] == args_of(path).get("resources", {})


def test_an_example_has_no_replica_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFORM_REPOSITORY", "models")
    monkeypatch.setenv("TRIFORM_API_KEYS_FILE", "keys.json")
    app = build_app(args_of(ROOT / "ray_apps/serve.zero.yaml"))
    scaling = app._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.downscale_to_zero_delay_s) == (0, 1, 900)


@pytest.mark.parametrize(("name", "memory", "weights"), [("serve.gpu.yaml", 24 * GIB, GIB // 2), ("serve.mig.yaml", 10 * GIB, 0)])
def test_two_versions_of_each_model_fit_in_a_replicas_share(name: str, memory: int, weights: int) -> None:
    """Each provider of a session may take what it is told: docs/gpu.md. `weights`: of a version, beside that."""
    args = Arguments.of(args_of(next(path for path in CONFIGS if path.name == name)))
    limit, provider = args.gpu_mem_limit, args.provider
    assert limit is not None
    assert provider is not None
    options = RuntimeOptions(provider=provider, gpu_mem_limit=limit)
    told = sum(str(limit) in provider_options(name, options).values() for name in PROVIDERS[provider])
    assert told == (2 if provider == "tensorrt" else 1)
    used = 2 * len(args.models) * (told * limit + weights) + GIB
    assert 0.85 < used / (memory * args.num_gpus) <= 1


@pytest.mark.slow  # a second Ray beside the session's
def test_serve_deploy_takes_it(tmp_path: Path, online_models: Path) -> None:
    """Unchanged but for its ports."""
    ports = Ports(*free_ports(4))
    text = next(path for path in CONFIGS if path.name == "serve.yaml").read_text()
    config = tmp_path / "serve.yaml"
    config.write_text(text.replace("port: 8000", f"port: {ports.http}").replace("port: 9000", f"port: {ports.grpc}"))
    folder = Path(tempfile.mkdtemp(prefix="serve-"))  # short: the kernel limits the paths of sockets
    environ = {
        **os.environ,
        **ports.environment(folder),
        "TRIFORM_REPOSITORY": str(online_models),
        "TRIFORM_ALLOW_ANONYMOUS": "true",
    }
    command = [sys.executable, "-m", "tests.ray_apps.deploying", config, str(ports.http), str(ports.grpc)]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer, index = done.stdout.splitlines()[-2:]
    assert answer == '{"predictions":[[14.0]]}'
    assert "linear/1 READY" in index
