"""Options that cannot be meant are refused, with their names, before anything is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.options import Options, check
from loadtests.targets import deployed, serve_arguments
from loadtests.thresholds import FILE
from ray_apps.arguments import Arguments
from ray_apps.ports import free_ports
from tests.loadtests.stub import predicted, stub
from triform.errors import ConfigurationError

GIVEN = Options(
    target="serve", shape="steps", loop="open", rate=None, users=32, seconds=None, workers=1, protocols=None, host=None,
    grpc=None, grpc_metadata=(), metrics=None, prometheus=False, auth="none", region=None, insecure=False,
    thresholds=FILE, timeout=30.0, replicas="1:2", environments=4, example=Path("build/flights"),
    output=Path("build/load"), pictures=None, seed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"target": "batch"}, "--target: no such target: 'batch'"),
        ({"shape": "square"}, "no such shape: 'square'"),
        ({"loop": "endless"}, "--loop"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"users": 0}, "--users"),
        ({"workers": -1}, "--workers"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"seconds": -5.0}, "seconds"),
        ({"loop": "closed", "users": 1, "workers": 2}, "--users"),
        ({"protocols": "http"}, "--protocols: no such protocol: 'http'"),
        ({"protocols": "tfs,"}, "--protocols"),
        ({"target": "lambda", "protocols": "oip-grpc"}, "speaks no gRPC"),
        ({"host": "http://127.0.0.1:1", "protocols": "oip-grpc"}, "give --grpc"),
        ({"replicas": "2:1"}, "--replicas"),
        ({"replicas": "0"}, "--replicas"),
        ({"replicas": "many"}, "--replicas"),
        ({"environments": 0}, "--environments"),
        ({"grpc": "127.0.0.1:1"}, "--grpc belongs to a deployment"),
        ({"metrics": "http://127.0.0.1:1"}, "--metrics belongs to a deployment"),
        ({"auth": "jwt"}, "--auth jwt"),
        ({"host": "http://far.example", "auth": "jwt"}, "--insecure"),
        ({"host": "https://far.example", "grpc": "far.example:9000", "auth": "key"}, "--insecure"),
        ({"target": "lambda", "prometheus": True}, "--prometheus"),
        ({"host": "http://127.0.0.1:1", "prometheus": True}, "give --metrics"),
        ({"grpc_metadata": ("application",)}, "--grpc-metadata"),
        ({"thresholds": Path("nothing.toml")}, "nothing"),
    ],
)
def test_what_cannot_be_meant_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        check(GIVEN._replace(**given))
    assert named in str(told.value)


def test_every_protocol_that_a_target_speaks_is_asked_by_default() -> None:
    assert check(GIVEN).protocols == ("oip-json", "oip-binary", "oip-grpc", "tfs")
    assert check(GIVEN._replace(target="lambda")).protocols == ("oip-json", "oip-binary", "tfs")
    assert check(GIVEN._replace(protocols="tfs,oip-grpc")).protocols == ("tfs", "oip-grpc")


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("127.0.0.1:8000", "--host: expected http"),
        ("ftp://127.0.0.1", "--host: expected http"),
        ("http://user:secret@127.0.0.1", "--host: expected http"),
        ("http://127.0.0.1:99999", "--host: Port out of range"),
        ("http://127.0.0.1:{free}", "does not answer"),
    ],
)
def test_a_host_that_is_none_or_does_not_answer_is_named(host: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        deployed(host.format(free=free_ports(1)[0]), None, None, "m")


def test_grpc_and_metrics_that_do_not_answer_are_named() -> None:
    nobody = free_ports(1)[0]
    with stub(lambda _: predicted(0.0)) as server:
        assert deployed(server.url, None, None, "m").host == server.url
        for grpc in "127.0.0.1", f"127.0.0.1:{nobody}":
            with pytest.raises(ConfigurationError, match="--grpc"):
                deployed(server.url, grpc, None, "m")
        with pytest.raises(ConfigurationError, match="--metrics"):
            deployed(server.url, None, f"{server.url}/metrics", "m")


@pytest.mark.parametrize("shape", ["soak", "burst"])
@pytest.mark.parametrize("replicas", [(1, 1), (1, 2), (2, 4)])
def test_serve_takes_the_arguments(shape: str, replicas: tuple[int, int]) -> None:
    made = Arguments.of({"repository": "x", **serve_arguments(replicas, shape)})
    assert made.autoscaling is None or made.autoscaling.max_replicas == replicas[1]
    if shape == "burst":
        assert made.autoscaling is not None
        assert made.autoscaling.min_replicas == 0


def test_the_command_says_what_is_wrong_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "--output": ["--output", str(tmp_path / "file")],
        "square": ["--shape", "square"],
        "--secret-file": ["--host", "https://far.example", "--auth", "jwt", "--secret-file", str(tmp_path)],
        "--no": ["--no"],
    }
    for named, options in wrong.items():
        command = [sys.executable, "-m", "loadtests", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert named in done.stderr
