"""API keys: what they look like, how a host keeps them, how they change while it runs.

    trf_<id>_<secret>        shown once, to its holder; the id is no secret: logs and the audit name it

    client key = HMAC-SHA256(secret, "triform client key")        stored = SHA-256(client key)        RFC 5802, section 3

A host keeps `stored` alone. That is enough to check a key that is sent (Bearer) and a request that is signed (signing.py), and
not enough to call: a stolen key file lets nobody in. One fast hash will do: a secret of 256 random bits is not to be guessed.

    {"format": 1, "keys": [{"id", "stored", "roles", "models", "expires", "created", "note"}]}        `triform keys` writes it
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import msgspec

from triform.errors import ConfigurationError

log = logging.getLogger(__name__)

Role = Literal["infer", "operate"]
SIGNED: Final = "TRIFORM-HMAC-SHA256"  # how a request is authorized that is signed with a key: signing.py
ID: Final = "[a-z0-9]{4,32}"
LOOK_SECONDS: Final = 1.0  # between two looks at the file
TELL_SECONDS: Final = 60.0  # between two complaints about one that is broken
MOST_BYTES: Final = 4 << 20  # of a key file: some ten thousand keys
_KEY: Final = rf"trf_({ID})_([A-Za-z0-9_-]{{43}})"
_ALPHABET: Final = "abcdefghjkmnpqrstuvwxyz23456789"  # nothing that is taken for something else


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as a host keeps it."""

    id: Annotated[str, msgspec.Meta(pattern=rf"\A{ID}\Z")]
    stored: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    roles: Annotated[frozenset[Role], msgspec.Meta(min_length=1)]
    models: Annotated[frozenset[str], msgspec.Meta(min_length=1)] | None = None  # None: every model
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None  # None: never
    created: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    note: str = ""

    def expired(self, now: float) -> bool:
        """At `now`, in Unix time."""
        return self.expires is not None and now >= self.expires.timestamp()


class KeyRing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a key file."""

    keys: list[ApiKey]
    format: Literal[1] = 1


class Presented(NamedTuple):
    """A key as its holder has it."""

    id: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> Presented | None:
        found = re.fullmatch(_KEY, text)
        return cls(*found.groups()) if found else None

    @property
    def client_key(self) -> bytes:
        import hmac  # brings OpenSSL, as hashlib does: 3 ms of a cold start, for who asks with a key

        return hmac.digest(self.secret.encode(), b"triform client key", "sha256")


def stored_of(client_key: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(client_key).digest()


def new_key(
    roles: Collection[Role],
    *,
    models: Collection[str] | None = None,
    expires: datetime | None = None,
    created: datetime | None = None,
    note: str = "",
) -> tuple[str, ApiKey]:
    """A new key: its text, which nobody can make out again later, and what a host keeps of it."""
    import secrets  # hosts make no keys

    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(10))
    presented = Presented(key_id, secrets.token_urlsafe(32))
    kept: dict[str, Any] = {"models": frozenset(models) if models else None, "expires": expires, "created": created, "note": note}
    stored = stored_of(presented.client_key).hex()
    return f"trf_{key_id}_{presented.secret}", ApiKey(id=key_id, stored=stored, roles=frozenset(roles), **kept)


def read(content: bytes | str, where: str) -> dict[str, ApiKey]:
    """The keys by id. Raises `ConfigurationError`, which begins with `where` and names the entry at fault."""
    try:
        keys = msgspec.json.decode(content, type=KeyRing).keys
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ConfigurationError(f"{where}: {str(error).replace('`', chr(39))}") from error
    by_id = {key.id: key for key in keys}
    if len(by_id) < len(keys):
        twice = next(key.id for i, key in enumerate(keys) if key.id in {other.id for other in keys[:i]})
        raise ConfigurationError(f"{where}: the id {twice!r} stands there twice")
    return by_id


def read_file(path: Path) -> dict[str, ApiKey]:
    """The keys of a file. Raises `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"api_keys_file: {path} cannot be read: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise ConfigurationError(f"api_keys_file: {path} has more than {MOST_BYTES} bytes")
    return read(content, f"api_keys_file: {path}")


class Keys(Protocol):
    """Where keys are looked up."""

    def get(self, key_id: str, /) -> ApiKey | None: ...


class KeyFile:
    """The keys of a file, which may change while the host runs. Thread-safe.

    It is looked at once a second at most, and read when it is another file or has another content than before. One that cannot be
    read changes nothing but the log, so that a slip of the hand shuts nobody out. Constructing one raises `ConfigurationError`.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._state = _state(path)
        self._keys: Mapping[str, ApiKey] = read_file(path)
        self._next_look = clock() + LOOK_SECONDS
        self._quiet_until = 0.0

    def get(self, key_id: str, /) -> ApiKey | None:
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._look(now)
        return self._keys.get(key_id)

    def _look(self, now: float) -> None:
        state = _state(self.path)
        if state is not None and state == self._state:
            return
        try:
            keys = read_file(self.path)
        except ConfigurationError as error:
            if now >= self._quiet_until:
                self._quiet_until = now + TELL_SECONDS
                log.error("the new API keys are NOT in force, those from before still are: %s", error)  # noqa: TRY400 - says it all
            return
        gone, new = sorted(self._keys.keys() - keys.keys()), sorted(keys.keys() - self._keys.keys())
        self._keys, self._state, self._quiet_until = keys, state, 0.0
        log.warning("API keys were read again: %d in force, new: %s, gone: %s", len(keys), new, gone)


def _state(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when a file does. A mounted secret's link leads to another file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, and it is asked for while requests wait
    except OSError:
        return None
    return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns
