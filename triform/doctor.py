"""What is open on this machine that should not be: a look before the first request, and after each change of the deployment.

Settings, files, /proc, and addresses that are named -> Findings: `open`, `ok` or `unknown`, each with what to do about it

It sees what this process sees. A firewall or NetworkPolicy that closes a port from outside is none of it.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from triform.access import check_closed
from triform.api_keys import read, read_file
from triform.errors import ConfigurationError
from triform.listening import Listener, listeners
from triform.nonces import MEMORY
from triform.settings import Settings

PROBE_SECONDS: Final = 3.0
CONTAINER: Final = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")


class Finding(msgspec.Struct, frozen=True):
    """`check` names what was looked at; `mend` says what to do where it is open."""

    check: str
    state: Literal["open", "ok", "unknown"]
    told: str
    mend: str = ""


class Service(NamedTuple):
    """What some listening process is, by a word of its command or its usual ports. `runs_code`: for whoever reaches it."""

    name: str
    words: tuple[str, ...]
    ports: Sequence[int]
    mend: str
    runs_code: bool = False


_CLOSE: Final = "close the port by a firewall or NetworkPolicy"
_ASK: Final = "start Ray with RAY_AUTH_MODE=token, and close the port by a firewall or NetworkPolicy"
SERVICES: Final = (
    Service("Ray's dashboard and job API", ("dashboard/dashboard.py", "ray-dashboard"), (8265,), _ASK, runs_code=True),
    Service("Ray Client", ("ray.util.client.server",), (10001,), _ASK, runs_code=True),
    Service("Ray's control plane", ("gcs_server", "raylet", "dashboard/agent.py", "runtime_env/agent"), (6379,), _ASK, True),
    Service("HAProxy's pages and Serve's proxy", ("haproxy",), (8000, 9000, 9101, 8404),
            f"let http_options.host be 127.0.0.1 behind a proxy that speaks TLS; for metrics and the stats page {_CLOSE}"),
    Service("Serve's replicas", ("ray::ServeReplica",), (*range(30000, 32000), *range(40000, 41001)), _CLOSE),
    Service("Ray's workers", ("ray::",), (), _ASK, runs_code=True),
)  # fmt: skip


def examine(
    settings: Settings, environ: Mapping[str, str], urls: Sequence[str] = (), look: Callable[[], list[Listener]] = listeners
) -> Iterator[Finding]:
    """Everything that can be looked at. `urls`: where the service is asked, as its callers would."""
    yield _anonymous(settings)
    yield from _keys(settings)
    yield _audit(settings)
    yield _repository(settings)
    yield _user(environ)
    yield from _ports(environ, look)
    for url in urls:
        yield from _asked(url)


def _anonymous(settings: Settings) -> Finding:
    if settings.allow_anonymous:
        return Finding("anonymous", "open", "callers without credentials may infer", "make keys, and drop allow_anonymous")
    try:
        check_closed(settings)
    except ConfigurationError:
        return Finding(
            "anonymous", "ok", "there are no keys: Serve does not start, Lambda lets in whom an authorizer vouches for"
        )
    return Finding("anonymous", "ok", "callers need credentials")


def _keys(settings: Settings) -> Iterator[Finding]:
    path = Path(settings.api_keys_file) if settings.api_keys_file is not None else None
    if path is not None:
        yield _mode("keys", path, 0o027, "the key file")
    try:
        found = read_file(path) if path is not None else read(settings.api_keys, "api_keys") if settings.api_keys else {}
    except ConfigurationError as error:
        yield Finding(
            "keys", "open", f"no host can start with these keys: {error}", "mend the file: `triform keys list` reads it"
        )
        return
    for key in found.values():
        if key.expires is None:
            yield Finding("keys", "ok", f"key {key.id} never expires")
    if settings.nonces == MEMORY:
        told = "nonces are in memory: each further process, and each restart, lets a captured signed request in once more"
        yield Finding("nonces", "unknown", told, "with several processes name a Redis in TRIFORM_NONCES")


def _audit(settings: Settings) -> Finding:
    if settings.audit is None:
        return Finding("audit", "ok", "operate actions go to the process's own log, unchained")
    return _mode("audit", Path(settings.audit), 0o026, "the audit log")


def _mode(check: str, path: Path, forbidden: int, name: str) -> Finding:
    """`forbidden`: bits of the file's mode that let others in."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return Finding(check, "unknown", f"{name} {path} cannot be looked at: {error.strerror}")
    if found := mode & forbidden:
        who = "everybody" if found & 0o007 else "its group"
        deed = "written" if found & 0o022 else "read"
        return Finding(
            check, "open", f"{name} {path} can be {deed} by {who} (mode {mode:o})", f"chmod {mode & ~forbidden:o} {path}"
        )
    return Finding(check, "ok", f"{name} {path} has mode {mode:o}")


def _repository(settings: Settings) -> Finding:
    location = settings.repository
    if location is None or location.startswith("s3://"):
        told = "none is named" if location is None else f"who may write {location} is IAM's to say"
        return Finding("repository", "unknown", told, "docs/security.md has policies: `python -m infra.iam`" if location else "")
    folders = [Path(location), *(path for path in Path(location).glob("*") if path.is_dir())]
    if writable := [str(folder) for folder in folders if os.access(folder, os.W_OK)]:
        told = f"this process may change what is served: it can write {writable[0]}"
        return Finding("repository", "open", told, "serve as another user than the one who packages, or from a read-only mount")
    return Finding("repository", "ok", f"{location} is read-only for this process")


def _user(environ: Mapping[str, str]) -> Finding:
    contained = "KUBERNETES_SERVICE_HOST" in environ or any(Path(path).exists() for path in CONTAINER)
    place = "the container" if contained else "this machine"
    if os.geteuid() == 0:
        return Finding(
            "user", "open", f"this process is root in {place}", "run it as a user of its own: USER in the image, runAsNonRoot"
        )
    return Finding("user", "ok", f"this process is user {os.geteuid()} in {place}")


def _ports(environ: Mapping[str, str], look: Callable[[], list[Listener]]) -> Iterator[Finding]:
    try:
        found = [listener for listener in look() if not listener.loopback]
    except OSError:
        yield Finding("ports", "unknown", "what listens cannot be seen here: there is no Linux /proc")
        return
    seen = False
    for service in SERVICES:
        there = [listener for listener in found if _service(listener) is service]
        guarded = [listener for listener in there if service.runs_code and _has_token(listener, environ)]
        for listeners_, token in (guarded, True), ([one for one in there if one not in guarded], False):
            if listeners_:
                seen = True
                yield _port(service, listeners_, token=token)
    if not seen:
        yield Finding("ports", "ok", "nothing of Ray's or Serve's listens beyond loopback")


def _port(service: Service, there: Sequence[Listener], *, token: bool) -> Finding:
    where = ", ".join(sorted({listener.where for listener in there})[:4]) + (", ..." if len(there) > 4 else "")
    if token:
        return Finding("ports", "ok", f"{service.name} at {where} wants a token")
    what = "runs code for whoever reaches it" if service.runs_code else "is reached in plain text from beyond loopback"
    return Finding("ports", "open", f"{service.name} at {where} {what}", service.mend)


def _service(listener: Listener) -> Service | None:
    """By its command where that can be seen, else by its port."""
    command = listener.process.command
    for service in SERVICES:
        if any(word in command for word in service.words) if command else listener.port in service.ports:
            return service
    return None


def _has_token(listener: Listener, environ: Mapping[str, str]) -> bool:
    """By the environment that the process was started with, else by this one."""
    if listener.process.command:
        return "RAY_AUTH_MODE=token" in listener.process.environ
    return environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _asked(url: str) -> Iterator[Finding]:
    """Asks without credentials, as anybody could."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        yield Finding("url", "unknown", f"{url} is no address: expected http://host:port or https://host")
        return
    try:
        status = _status(parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/v2")
    except ssl.SSLError as error:
        yield Finding("url", "open", f"{url}: TLS fails: {error.reason or error}", "give it a certificate that its callers trust")
        return
    except (OSError, http.client.HTTPException) as error:
        yield Finding("url", "unknown", f"{url} does not answer ({type(error).__name__})")
        return
    if parts.scheme == "http" and not (host == "localhost" or host.startswith("127.") or host == "::1"):
        yield Finding(
            "url", "open", f"{url} is plain HTTP: keys and rows can be read on the way", "end TLS before it: docs/security.md"
        )
    if status == 200:
        yield Finding("url", "open", f"{url} answers callers without credentials", "make keys, and drop allow_anonymous")
    else:
        yield Finding(
            "url", "ok" if status in (401, 403) else "unknown", f"{url} answers {status} to callers without credentials"
        )


def _status(scheme: str, netloc: str, path: str) -> int:
    connect = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = connect(netloc, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
