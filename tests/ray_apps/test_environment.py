"""What stands in the environment before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
from ray.serve._private import constants

from ray_apps.arguments import Arguments
from ray_apps.environment import GRPC_BYTES, least_of_grpc, serve_environment, tuned
from ray_apps.ports import Ports


def test_two_serves_on_one_machine_share_no_port_and_no_path() -> None:
    """HAProxy hands requests to a proxy while no replica is up: another Serve's, if both had the port that Ray chooses itself."""
    one = Ports(22_001, 22_002, 22_003, 22_004).environment(Path("/tmp/one"))
    other = Ports(23_500, 23_600, 23_700, 23_800).environment(Path("/tmp/other"))
    own = [name for name in one if name.endswith("_PORT") or any(word in name for word in ("_LOC", "_PATH", "_SERVER_STATE"))]
    own = [name for name in own if name not in ("RAY_SERVE_HAPROXY_BINARY_PATH", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")]
    assert len(own) == 13
    assert [name for name in own if one[name] == other[name]] == []


def test_a_replica_that_goes_away_is_told_of_as_something_to_try_again(tmp_path: Path) -> None:
    environment = serve_environment(tmp_path) | {"RAY_APPS_HAPROXY": "/bin/echo"}
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(tmp_path / "haproxy.cfg"), "-sf", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == f"-db -f {tmp_path}/haproxy.cfg -sf 1\n", "HAProxy gets what Serve gave"
    head, _, page = (tmp_path / "500.http").read_bytes().partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 503 Service Unavailable"
    assert set(lines[1:]) == {"content-type: application/json", "retry-after: 1", f"content-length: {len(page)}"}
    assert orjson.loads(page)["code"] == "unavailable"


def told(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """What a program says in a child's environment: all of ours, and that."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, env={**os.environ, "PATH": path, **environ}, capture_output=True, text=True, timeout=30)


def test_haproxy_is_found_where_the_environment_is_set_already() -> None:
    """A child of a process that has it, and a manifest that gives the script alone: neither starts the script by itself."""
    script = tuned()["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert not Path(tuned()["RAY_APPS_HAPROXY"]).samefile(script)
    again = told(sys.executable, "-m", "ray_apps.environment", **tuned())
    assert again.stdout.splitlines() == [f"export {name}={value}" for name, value in tuned().items()]
    alone = {"RAY_SERVE_HAPROXY_BINARY_PATH": script, "RAY_APPS_HAPROXY": ""}
    assert told(script, "-v", **alone).stdout.startswith("HAProxy version")
    itself = told(script, "-v", **alone | {"RAY_APPS_HAPROXY": script})
    assert (itself.returncode, "names" in itself.stderr) == (2, True)


def test_a_shell_reads_what_is_printed_for_it_wherever_haproxy_is(tmp_path: Path) -> None:
    haproxy = tmp_path / "it's a folder" / "haproxy"
    haproxy.parent.mkdir()
    haproxy.touch()
    printed = told(sys.executable, "-m", "ray_apps.environment", RAY_APPS_HAPROXY=str(haproxy)).stdout
    assert told("sh", "-c", f'{printed}\nprintf %s "$RAY_APPS_HAPROXY"', RAY_APPS_HAPROXY="").stdout == str(haproxy)


def test_a_message_of_grpc_may_have_what_a_body_may() -> None:
    args = {"repository": "models", "allow_anonymous": True}
    assert least_of_grpc(Arguments.of(args)) == GRPC_BYTES
    assert least_of_grpc(Arguments.of({**args, "request_bytes": 1 << 28})) == 1 << 28
    assert least_of_grpc(Arguments.of({**args, "response_bytes": 1 << 29})) == 1 << 29


def test_every_port_that_serve_would_choose_itself_is_set() -> None:
    fixed = {
        name for name, value in vars(constants).items() if name.startswith("RAY_SERVE_") and name.endswith("_PORT") and value
    }
    assert fixed
    assert fixed - set(serve_environment(Path("/tmp/one"))) == set()


def test_the_python_proxys_port_is_no_replicas() -> None:
    set_ = serve_environment(Path("/tmp/one"), replica_ports=(30_000, 31_000))
    ranges = [
        range(int(set_[f"RAY_SERVE_DIRECT_INGRESS_MIN_{p}_PORT"]), int(set_[f"RAY_SERVE_DIRECT_INGRESS_MAX_{p}_PORT"]) + 1)
        for p in ("HTTP", "GRPC")
    ]
    assert set(ranges[0]).isdisjoint(ranges[1])
    for p in "HTTP", "GRPC":
        assert not any(int(set_[f"RAY_SERVE_FALLBACK_PROXY_{p}_PORT"]) in taken for taken in ranges)
