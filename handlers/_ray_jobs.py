"""Ray's job REST API over plain HTTP: a job is begun, looked at, and never begun twice. No ray package, which fits no layer.

    RayJobs.begin(name, entrypoint) -> GET name, name-2, name-3 ... the first that is not there or has not failed
                                    -> POST it where it is not there -> Job

Whoever reaches the job API runs code on the cluster: the token goes over TLS only (or to this machine), and to the address that
was configured only; a redirect is refused. Paths: Ray, "Ray Jobs REST API".
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import quote, urlsplit

import msgspec

from triform.errors import ConfigurationError, StoreError
from triform.settings import Settings

ANSWER_BYTES: Final = 4 << 20
FAILED: Final = frozenset({"FAILED", "STOPPED"})
ENDED: Final = FAILED | {"SUCCEEDED"}
NO_USE: Final = frozenset({2, 4})  # exit codes of `python -m batch run` after which the same command fails again
_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})


Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_000)]  # of Unix time, up to the year 9999


class Job(msgspec.Struct, frozen=True):
    """A job as the API tells of it."""

    submission_id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    message: str | None = None
    start_time: Milliseconds | None = None
    end_time: Milliseconds | None = None
    driver_exit_code: int | None = None

    @property
    def may_be_tried_again(self) -> bool:
        return self.status in FAILED and self.driver_exit_code not in NO_USE

    @property
    def seconds(self) -> float:
        """How long it ran, of one that has ended."""
        return max(0, (self.end_time or 0) - (self.start_time or self.end_time or 0)) / 1000


class RayJobs:
    """The job API at an address. `token` is asked for with the first request. Every method may raise `StoreError`."""

    def __init__(
        self,
        address: str,
        *,
        token: Callable[[], str] | None = None,
        ca: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        seconds: float = 10.0,
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ConfigurationError("ray_address: expected https://host:port, or http://host:port")
        if token is not None and parts.scheme == "http" and parts.hostname not in _HERE:
            raise ConfigurationError("ray_address: a token is sent over https:// only")
        self.address = address.rstrip("/")
        self.runtime_env = dict(runtime_env or {})
        self.seconds = seconds
        self._token = token
        self._known: str | None = None
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if parts.scheme == "https":
            try:
                handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca)))
            except OSError as error:
                raise ConfigurationError(f"ray_ca: the certificates cannot be read ({type(error).__name__})") from error
        self._opener = urllib.request.build_opener(*handlers)

    def begin(self, name: str, entrypoint: str, *, attempts: int = 1) -> Job:
        """The job of that name: the one there is, or a new one. One that failed is followed by `name-2` and so on, `attempts` in
        all; the last is returned as it is. Of many who begin it at once one wins, and the others get its job."""
        job = self.find(name) or self._submit(name, entrypoint)
        for attempt in range(2, attempts + 1):
            if not job.may_be_tried_again:
                break
            own = f"{name}-{attempt}"
            job = self.find(own) or self._submit(own, entrypoint)
        return job

    def find(self, name: str) -> Job | None:
        """The job; None if there is none of that name."""
        status, body = self._ask("GET", f"/api/jobs/{quote(name, safe='')}")
        if status == 404:
            return None
        return _job(_expect(status, body), name)

    def latest(self, name: str, *, attempts: int = 1) -> Job | None:
        """The latest attempt that was begun under the name."""
        found: Job | None = None
        for attempt in range(1, attempts + 1):
            job = self.find(name if attempt == 1 else f"{name}-{attempt}")
            if job is None:
                break
            found = job
        return found

    def _submit(self, name: str, entrypoint: str) -> Job:
        asked = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": self.runtime_env}
        status, body = self._ask("POST", "/api/jobs/", asked)
        if status != 200 and (there := self.find(name)) is not None:  # somebody was quicker, or an answer of ours was lost
            return there
        _expect(status, body)
        return self.find(name) or Job(name, "PENDING")

    def _ask(self, method: str, path: str, content: Any = None) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", "User-Agent": "triform"}
        if self._token is not None:
            self._known = self._known or self._token()
            headers["Authorization"] = f"Bearer {self._known}"
        body = None if content is None else json.dumps(content).encode()
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.address + path, body, headers, method=method)  # noqa: S310 - checked above
        try:
            with self._opener.open(request, timeout=self.seconds) as answer:
                return answer.status, answer.read(ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):
                    self._known = None  # it may have been changed meanwhile
                    raise StoreError(
                        f"Ray's job API denies access ({error.code}): TRIFORM_RAY_TOKEN_SECRET names its token"
                    ) from None
                return error.code, error.read(ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise StoreError(f"Ray's job API does not answer ({type(error).__name__})") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the address that was configured."""

    def redirect_request(self, *_: Any) -> None:
        """Follows none: the answer is the redirect itself."""


def _expect(status: int, body: bytes) -> bytes:
    """What Ray says of a failure is a traceback: it is not passed on."""
    if status != 200:
        raise StoreError(f"Ray's job API answered {status}")
    return body


def _job(body: bytes, name: str) -> Job:
    try:
        job = msgspec.json.decode(body, type=dict[str, Any])
        return msgspec.convert({**job, "submission_id": job.get("submission_id") or name}, Job)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise StoreError("Ray's job API answered with what is no job: does TRIFORM_RAY_ADDRESS name another server?") from error


def open_jobs(settings: Settings) -> RayJobs:
    """The job API that the settings name. Raises `ConfigurationError`."""
    if settings.ray_address is None:
        raise ConfigurationError("TRIFORM_RAY_ADDRESS is not set: where is Ray's job API?")
    try:
        runtime_env = msgspec.json.decode(settings.ray_runtime_env or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"TRIFORM_RAY_RUNTIME_ENV: expected a JSON object: {error}") from error
    secret = settings.ray_token_secret
    return RayJobs(
        settings.ray_address,
        token=None if secret is None else lambda: _secret(secret),
        ca=settings.ray_ca,
        runtime_env=runtime_env,
        seconds=settings.ray_seconds,
    )


def _secret(name: str) -> str:
    """A secret's text. Raises `StoreError`."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return str(boto3.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"])
    except (BotoCoreError, ClientError, KeyError) as error:
        raise StoreError(f"the secret of TRIFORM_RAY_TOKEN_SECRET cannot be read ({type(error).__name__})") from error
