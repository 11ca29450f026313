"""What the doctor finds open: settings, files' modes, sockets of /proc, addresses that answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conformance.models import surface
from tests.conformance.server import serve
from triform.access import Access
from triform.api_keys import KeyRing, new_key
from triform.doctor import SERVICES, Finding, examine
from triform.listening import Listener, Process, listeners
from triform.settings import Settings

YEAR = datetime.now(UTC) + timedelta(days=365)


def found(
    check: str, urls: tuple[str, ...] = (), there: tuple[Listener, ...] = (), environ: Any = None, **settings: Any
) -> list[Finding]:
    made = Settings.from_env({}, **settings)
    return [one for one in examine(made, environ or {}, urls, lambda: list(there)) if one.check == check]


def states(*args: Any, **settings: Any) -> list[str]:
    return [finding.state for finding in found(*args, **settings)]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_bytes(msgspec.json.encode(KeyRing([new_key({"infer"}, expires=YEAR)[1]])))
    path.chmod(0o600)
    return path


def test_anonymous_access(keys: Path) -> None:
    assert states("anonymous", allow_anonymous=True) == ["open"]
    assert states("anonymous", allow_anonymous=True, api_keys_file=str(keys)) == ["open"]
    assert states("anonymous", api_keys_file=str(keys)) == ["ok"]
    assert states("anonymous") == ["ok"]


@pytest.mark.parametrize(
    ("mode", "state", "told"),
    [
        (0o600, "ok", ""),
        (0o400, "ok", ""),
        (0o640, "ok", ""),  # a mounted secret's, for a group
        (0o644, "open", "read by everybody"),
        (0o606, "open", "written by everybody"),
        (0o660, "open", "written by its group"),
    ],
)
def test_a_key_files_mode(keys: Path, mode: int, state: str, told: str) -> None:
    keys.chmod(mode)
    (finding,) = found("keys", api_keys_file=str(keys))
    assert (finding.state, told in finding.told) == (state, True)
    if finding.mend:
        subprocess.run(finding.mend.split(), check=True)
        assert states("keys", api_keys_file=str(keys)) == ["ok"]


def test_a_key_file_that_no_host_can_read(keys: Path) -> None:
    keys.write_text('{"keys": [')
    assert states("keys", api_keys_file=str(keys)) == ["ok", "open"]
    assert states("keys", api_keys_file=str(keys.with_name("none"))) == ["unknown", "open"]
    assert states("keys", api_keys="{}") == ["open"]


def test_an_audit_log_that_others_may_write(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    assert states("audit", audit=str(log)) == ["unknown"]
    log.touch(0o600)
    assert states("audit", audit=str(log)) == ["ok"]
    log.chmod(0o620)
    assert states("audit", audit=str(log)) == ["open"]
    assert states("audit") == ["ok"]


AS_A_USER = """
import os, sys
from triform.doctor import examine
from triform.settings import Settings
def states():
    return {one.check: one.state for one in examine(Settings.from_env({}, repository=sys.argv[1]), {}, (), lambda: [])}
states()  # imports what it needs, from where perhaps only root reads
if os.geteuid() == 0:
    os.setuid(65534)
print(states())
"""


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users can read, unlike those of `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="as-a-user-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_user_of_its_own_before_a_repository_that_it_cannot_write(reachable: Path) -> None:
    models = reachable / "models"
    (models / "linear").mkdir(parents=True)

    def seen(mode: int) -> tuple[str, str]:
        models.chmod(0o555)
        (models / "linear").chmod(mode)
        command = [sys.executable, "-c", AS_A_USER, models]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        states: dict[str, str] = eval(done.stdout)  # noqa: S307 - our own words
        return states["user"], states["repository"]

    assert seen(0o555) == ("ok", "ok")
    assert seen(0o777) == ("ok", "open")


def test_root_and_what_it_may_write(tmp_path: Path) -> None:
    assert states("user") == ["open" if os.geteuid() == 0 else "ok"]
    assert ("in the container" in found("user", environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})[0].told) is True
    assert states("repository", repository=str(tmp_path)) == ["open"]
    assert states("repository", repository="s3://bucket/models") == ["unknown"]


def at(port: int, command: str = "", *, address: str = "0.0.0.0", token: bool = False) -> Listener:  # noqa: S104 - what is looked for
    environ = frozenset({"RAY_AUTH_MODE=token"} if token else {"PATH=/bin"})
    return Listener(address, port, Process(7 if command else 0, command, environ if command else frozenset()))


RAY = "python -u /opt/venv/lib/ray/"


@pytest.mark.parametrize(
    ("listener", "environ", "state", "told"),
    [
        (at(8265, f"{RAY}dashboard/dashboard.py --port=8265"), {}, "open", "dashboard and job API at 0.0.0.0:8265 runs code"),
        (at(18265, f"{RAY}dashboard/dashboard.py"), {}, "open", "dashboard and job API"),
        (at(8265, f"{RAY}dashboard/dashboard.py", token=True), {}, "ok", "wants a token"),
        (at(8265, f"{RAY}dashboard/dashboard.py"), {"RAY_AUTH_MODE": "token"}, "open", "dashboard"),  # it was started without
        (at(8265), {}, "open", "dashboard"),  # another user's process: told by its port
        (at(8265), {"RAY_AUTH_MODE": "token"}, "ok", "wants a token"),
        (at(8265, address="192.0.2.7"), {}, "open", "192.0.2.7:8265"),
        (at(8265, address="::"), {}, "open", "[::]:8265"),
        (at(10001, "python -m ray.util.client.server"), {}, "open", "Ray Client"),
        (at(6379, "/x/ray/core/src/ray/gcs/gcs_server --gcs_server_port=6379"), {}, "open", "control plane"),
        (at(9101, "/x/haproxy -f haproxy.cfg"), {}, "open", "plain text"),
        (at(30001, "ray::ServeReplica:triform:predict"), {}, "open", "replicas"),
        (at(40999), {}, "open", "replicas"),
        (at(8265, f"{RAY}dashboard/dashboard.py", address="127.0.0.1"), {}, "ok", "nothing"),
        (at(8265, address="::1"), {}, "ok", "nothing"),
        (at(8265, "nginx: master process"), {}, "ok", "nothing"),
        (at(22), {}, "ok", "nothing"),
    ],
)
def test_ports(listener: Listener, environ: dict[str, str], state: str, told: str) -> None:
    (finding,) = found("ports", there=(listener,), environ=environ)
    assert (finding.state, told in finding.told) == (state, True), finding
    assert bool(finding.mend) == (state == "open")


def test_one_finding_names_a_services_ports() -> None:
    (finding,) = found("ports", there=tuple(at(30000 + n, "ray::ServeReplica:a") for n in range(9)))
    assert finding.told.count("0.0.0.0:3000") == 4
    assert len(SERVICES) == len({service.name for service in SERVICES})


def test_without_proc_nothing_is_claimed() -> None:
    def none() -> list[Listener]:
        raise FileNotFoundError

    assert [one.state for one in examine(Settings.from_env({}), {}, (), none) if one.check == "ports"] == ["unknown"]


@pytest.fixture
def listening() -> Iterator[tuple[int, int]]:
    """A child that listens on loopback: its pid and port."""
    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, "gcs_server"]
    environ = {**os.environ, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as child:
        assert child.stdout is not None
        yield child.pid, int(child.stdout.readline())
        child.communicate(timeout=30)


def test_who_listens_is_read_from_proc(listening: tuple[int, int]) -> None:
    pid, port = listening
    (listener,) = [one for one in listeners() if one.port == port]
    assert (listener.where, listener.loopback, listener.process.pid) == (f"127.0.0.1:{port}", True, pid)
    assert listener.process.command.endswith("gcs_server")
    assert "RAY_AUTH_MODE=token" in listener.process.environ
    (finding,) = found("ports", there=(listener._replace(address="0.0.0.0"),))  # noqa: S104
    assert (finding.state, "control plane" in finding.told) == ("ok", True)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        (six,) = [one for one in listeners() if one.port == server.getsockname()[1]]
    assert (six.address, six.loopback, six.process.pid) == ("::1", True, os.getpid())


def test_addresses_are_asked_without_credentials(online_models: Path) -> None:
    kept = new_key({"infer"})[1]
    with serve(surface(online_models)) as anybody, serve(surface(online_models, access=Access({kept.id: kept}))) as closed:
        assert states("url", (f"http://{anybody}",)) == ["open"]
        assert states("url", (f"http://{closed}",)) == ["ok"]
        mapped = closed.replace("127.0.0.1", "[::ffff:127.0.0.1]")  # an address that does not look like loopback
        plain, answers = found("url", (f"http://{mapped}/",))
        assert (plain.state, "plain HTTP" in plain.told, answers.state) == ("open", True, "ok")
        (tls,) = found("url", (f"https://{closed}",))
        assert (tls.state, "TLS fails" in tls.told) == ("open", True)
    assert states("url", (f"http://{closed}",)) == ["unknown"]
    assert states("url", ("triform.example",)) == ["unknown"]
