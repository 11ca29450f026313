"""How requests say who asks: a secret from a file or the environment -> headers. Never logged, never in a report or an order.

key       Authorization: Bearer <a key of `triform keys`>            jwt    the same with a token for an API Gateway
api-key   x-api-key, of an API Gateway's usage plan                  signed HMAC with a key of `triform keys`, one request each
sigv4     AWS's signature for execute-api, by botocore, with the credentials that it finds
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from triform.errors import ConfigurationError
from triform.signing import Parts, sign

KINDS: Final = ("none", "key", "jwt", "api-key", "signed", "sigv4")
SECRET: Final = "LOADTEST_SECRET"  # noqa: S105 - the name of the variable
SENT: Final = ("key", "jwt", "api-key")  # whoever sees such a request can send others
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


class Asked(NamedTuple):
    """What is to be sent. `url`: with the host; `path`: as the surface knows it, without what the host puts before it."""

    method: str
    url: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Sign = Callable[[Asked], dict[str, str]]  # the headers to add


def read_secret(kind: str, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The secret of that kind. Raises `ConfigurationError` where it is missing, or empty."""
    if kind not in KINDS:
        raise ConfigurationError(f"--auth: no such kind: {kind!r}; there are {', '.join(KINDS)}")
    if kind in ("none", "sigv4"):
        if file is not None:
            raise ConfigurationError(f"--secret-file: --auth {kind} has no secret")
        return None
    try:
        secret = environ.get(SECRET, "") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--secret-file: cannot be read: {type(error).__name__}") from error
    secret = secret.strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ConfigurationError(f"--auth {kind} needs a secret of one line: --secret-file, or {SECRET} in the environment")
    if kind == "signed":
        try:
            sign(secret, Parts("POST", "/"))
        except ValueError as error:
            raise ConfigurationError(f"--auth signed: {error}") from error
    return secret


def check_wire(kind: str, host: str, *, insecure: bool) -> None:
    """Raises `ConfigurationError` where a secret would go over a network in plain text."""
    url = urlsplit(host)
    if kind in SENT and url.scheme != "https" and url.hostname not in LOOPBACK and not insecure:
        raise ConfigurationError(f"--auth {kind} would send the secret in plain text to {url.hostname}: use https, or --insecure")


def signer(kind: str, secret: str | None, region: str | None) -> Sign:
    """What makes the headers. Raises `ConfigurationError` where AWS credentials or a region are missing."""
    if kind in ("key", "jwt"):
        return lambda _: {"authorization": f"Bearer {secret}"}
    if kind == "api-key":
        return lambda _: {"x-api-key": str(secret)}
    if kind == "signed":
        return lambda asked: {
            "authorization": sign(str(secret), Parts(asked.method, asked.path, headers=[*asked.headers.items()], body=asked.body))
        }
    return _sigv4(region) if kind == "sigv4" else lambda _: {}


def _sigv4(region: str | None) -> Sign:
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.session import Session

    session: Any = Session()
    found = session.get_credentials()
    region = region or session.get_config_variable("region") or os.environ.get("AWS_REGION")
    if found is None:
        raise ConfigurationError("--auth sigv4: botocore finds no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its kin")
    if not region:
        raise ConfigurationError("--auth sigv4 needs a region: --region, or AWS_REGION")

    def signed(asked: Asked) -> dict[str, str]:
        request = AWSRequest(asked.method, asked.url, headers=dict(asked.headers), data=asked.body)
        SigV4Auth(found.get_frozen_credentials(), "execute-api", region).add_auth(request)
        return {name.lower(): value for name, value in request.headers.items()}

    return signed
