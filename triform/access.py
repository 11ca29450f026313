"""Who may call, and what: every online host asks here, before a body is decoded.

    HttpRequest -> authenticate -> with its Caller -> attend: authorize(role, model) -> the surface -> the audit, if it operates
                   the host's own word (HttpRequest.caller: an authorizer's), else a key, else a signature, else anonymous

`infer` is what requests need; `operate` what changes what others are answered, or steps past what was released: a version chosen
by the header x-triform-version, loading and unloading, and whatever changes state later. Neither includes the other. A version in
a path (`/versions/3`) is the protocol's own way to name what is served to everybody here, so it needs `infer` alone.

What only signatures, nonces or the audit need is imported when it is first wanted: a cold start pays for each module.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from triform.api_keys import SIGNED, ApiKey, KeyFile, Keys, Presented, Role, read, stored_of
from triform.errors import ConfigurationError, Forbidden, TriformError, Unauthenticated
from triform.headers import named, values

if TYPE_CHECKING:
    from triform.audit import Audit
    from triform.http import HttpRequest
    from triform.nonces import Nonces, Run
    from triform.settings import Settings
    from triform.signing import Signature

T = TypeVar("T")

INFER: Final[Role] = "infer"
OPERATE: Final[Role] = "operate"
OVERRIDE: Final = "x-triform-version"  # the header that names the version that is to answer, whatever the release says
CHALLENGE: Final = f'Bearer realm="triform", {SIGNED} realm="triform"'  # RFC 9110, 11.6.1: WWW-Authenticate
WRONG_SIGNATURE: Final = "the signature is not that of this request by a key that is known here"
_NOBODYS: Final = ApiKey(
    id="none", stored="0" * 64, roles=frozenset({INFER})
)  # so that an unknown id takes as long as a known one
_UNPRINTABLE: Final = r"[^\x20-\x7e]"
_HOST: Final = r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/@\s]+)(:[0-9]{1,5})?"
_ADDRESS: Final = r"\[[0-9A-Fa-f:.]+\]|[0-9]{1,3}(\.[0-9]{1,3}){3}|localhost|.+\.localhost"


class Caller(NamedTuple):
    """Who asks. `id`: for logs and the audit, such as `key:k3fx9w2mpa` or `iam:arn:aws:...`; `models`: None for every model."""

    id: str
    roles: frozenset[Role] = frozenset({INFER})
    models: frozenset[str] | None = None

    def may_see(self, model: str) -> bool:
        return self.models is None or model in self.models


ANONYMOUS: Final = Caller("anonymous")


class Browsers(NamedTuple):
    """What a browser may be made to send here by a page of somebody else's.

    `hosts`: the names under which this host is called; none: any, or, where `addresses_only`, addresses and localhost: a name
    that leads here is then somebody else's (DNS rebinding). `origins`: whose pages may ask, beside the host's own.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    addresses_only: bool = False

    def check(self, headers: Sequence[tuple[str, str]]) -> None:
        """Raises `Forbidden`."""
        by_name = named(headers)
        hosts, origins = by_name.get("host", ()), by_name.get("origin", ())
        if len(hosts) > 1 or len(origins) > 1:
            raise Forbidden("the header host or origin is given twice")
        host = hosts[0].lower() if hosts else ""
        if hosts and not self._known(host):
            raise Forbidden("this host is not called by that name: see TRIFORM_HOSTS")
        if origins and origins[0] not in self.origins and (not host or origins[0].lower().partition("://")[2] != host):
            raise Forbidden("pages of that origin may not ask here: see TRIFORM_ORIGINS")

    def _known(self, host: str) -> bool:
        if not self.hosts and not self.addresses_only:
            return True
        name, is_address = _name_in(host)
        return name in self.hosts if self.hosts else is_address


@lru_cache(maxsize=64)
def _name_in(host: str) -> tuple[str, bool]:
    """The name in a header Host, "" where it is none, and whether it is an address or this machine's own."""
    found = re.fullmatch(_HOST, host)
    name = found[1].rstrip(".") if found else ""
    return name, bool(re.fullmatch(_ADDRESS, name))


class Access:
    """A host's doorkeeper. Thread-safe.

    `anonymous`: whether callers without credentials are let in, to infer. `nonces`: None: signed requests are refused.
    `operators`: ids of the platform's callers that may operate, `*` for what has no ':' or '/'. `run`: how the audit waits.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        *,
        anonymous: bool = False,
        nonces: Nonces | None = None,
        browsers: Browsers | None = None,
        operators: Collection[str] = (),
        audit: Audit | None = None,
        run: Run | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        none: Mapping[str, ApiKey] = {}
        self._keys = none if keys is None else keys
        self._anonymous = anonymous
        self._nonces = nonces
        self._browsers = browsers or Browsers()
        self._operators = operators
        self._audit = audit
        self._run = run
        self._clock = clock

    async def authenticate(self, http: HttpRequest) -> HttpRequest:
        """The request with its caller; one that has him already keeps him.

        Raises `Unauthenticated`, `Forbidden` (a page of somebody else's), and `StoreError` or `Overloaded` (of the nonces).
        """
        if http.greeted:
            return http
        self._browsers.check(http.headers)
        caller = http.caller or self._caller(http)
        if caller is None:
            caller = _holder(await self._of_signature(values(http.headers, "authorization")[0], http))
        return http.let_in(caller)

    def authenticate_head(self, http: HttpRequest) -> HttpRequest:
        """The same of a request whose body is still to be read: a signature that could be right is left for then."""
        self._browsers.check(http.headers)
        caller = http.caller or self._caller(http)
        if caller is not None:
            return http.let_in(caller)
        self._signature(values(http.headers, "authorization")[0])
        return http

    def _caller(self, http: HttpRequest) -> Caller | None:
        """None: of whom a signature is to tell."""
        given = values(http.headers, "authorization")
        if not given:
            if self._anonymous:
                return ANONYMOUS
            raise Unauthenticated("credentials are required: send Authorization: Bearer <API key>, or a signed request")
        if len(given) > 1:
            raise Unauthenticated("the header authorization is given twice")
        scheme, _, rest = given[0].partition(" ")
        if scheme.lower() == "bearer":
            return _holder(self._of_bearer(rest.strip(" ")))
        if scheme != SIGNED:
            raise Unauthenticated(f"authorization: expected Bearer or {SIGNED}")
        return None

    def of_platform(self, identity: str) -> Caller:
        """The caller whom the platform before this host knows, such as an authorizer: never from a header."""
        operates = any(_fits(identity, pattern) for pattern in self._operators)
        return Caller(re.sub(_UNPRINTABLE, "?", identity)[:256], frozenset({INFER, OPERATE} if operates else {INFER}))

    async def authorize(self, http: HttpRequest, what: str, role: Role, model: str | None = None) -> None:
        """Lets an authenticated request pass, or raises `Forbidden`; `Unauthenticated` where credentials might help.

        `what` it does, for the audit: a caller who is known and may not operate is on record for having tried.
        """
        await self._authorize(http, _Deed.of(http, what, role, model), model)

    async def _authorize(self, http: HttpRequest, deed: _Deed, model: str | None) -> None:
        caller = http.caller or ANONYMOUS
        missing = [needed for needed in deed.roles if needed not in caller.roles]
        if missing and caller is ANONYMOUS:
            raise Unauthenticated(f"this needs the role '{missing[0]}', and so credentials")
        if not missing and (model is None or caller.may_see(model)):
            return
        if OPERATE in deed.roles:
            await self._record(http, deed, Forbidden.code)
        raise Forbidden(f"this needs the role '{missing[0]}'" if missing else "the caller is bound to other models")

    def infers(self, http: HttpRequest, role: Role, model: str | None) -> bool:
        """Whether an authenticated request does no more than infer, which its caller may: there is nothing to `attend` to."""
        caller = http.caller or ANONYMOUS
        if role != INFER or INFER not in caller.roles or OVERRIDE in named(http.headers):
            return False
        return caller.models is None or model is None or model in caller.models

    async def attend(
        self, http: HttpRequest, what: str, role: Role, model: str | None, act: Callable[[HttpRequest], Awaitable[T]]
    ) -> T:
        """What `act` returns, if the request may have it done; what operates is on record when this returns, however it ended.

        Raises as `authorize` and `act` do, and `StoreError` where it cannot be written down.
        """
        deed = _Deed.of(http, what, role, model)
        await self._authorize(http, deed, model)
        if OPERATE not in deed.roles:
            return await act(http)
        result = TriformError.code
        try:
            done = await act(http)
            result = "ok"
        except TriformError as error:
            result = error.code
            raise
        finally:
            await self._record(http, deed, result)
        return done

    async def _record(self, http: HttpRequest, deed: _Deed, result: str) -> None:
        from triform.audit import Action, Logged

        caller, append = http.caller or ANONYMOUS, (self._audit or Logged()).append
        action = Action(who=caller.id, what=deed.what, target=deed.target, where=http.client, result=result)
        if self._run is None:
            append(action)
        else:
            await self._run(append, action)

    def _of_bearer(self, text: str) -> ApiKey:
        import hmac  # see api_keys.py

        presented = Presented.parse(text)
        key = self._keys.get(presented.id) if presented else None
        client_key = presented.client_key if presented else b""
        right = hmac.compare_digest(stored_of(client_key), bytes.fromhex((key or _NOBODYS).stored))
        if key is None or not right:
            raise Unauthenticated("no such API key")
        return self._in_time(key)

    def _signature(self, authorization: str) -> tuple[Signature, ApiKey, float]:
        """What can be told of a signature without the request's body, and when. Raises `Unauthenticated`."""
        from triform.signing import SKEW_SECONDS, Signature

        signature, now = Signature.parse(authorization), self._clock()
        if signature is None:
            raise Unauthenticated(f"authorization: expected {SIGNED} key=, timestamp=, nonce=, signature=")
        if abs(now - signature.timestamp) > SKEW_SECONDS:
            raise Unauthenticated(
                f"the signature's timestamp is {now - signature.timestamp:+.0f} s off, {SKEW_SECONDS} are allowed"
            )
        if (key := self._keys.get(signature.key_id)) is None:
            raise Unauthenticated(WRONG_SIGNATURE)
        return signature, key, now

    async def _of_signature(self, authorization: str, http: HttpRequest) -> ApiKey:
        from triform.signing import SKEW_SECONDS, Parts, message

        signature, key, now = self._signature(authorization)
        parts = Parts(http.method, http.path, http.query, http.headers, http.body)
        try:
            signed = message(parts, signature.key_id, signature.timestamp, signature.nonce)
        except ValueError:
            raise Unauthenticated("the request is none that can be signed") from None
        if not signature.proves(bytes.fromhex(key.stored), signed):
            raise Unauthenticated(WRONG_SIGNATURE)
        self._in_time(key)
        if self._nonces is None:
            raise Unauthenticated("signed requests are not taken here: see TRIFORM_NONCES")
        if not await self._nonces.spend(f"{key.id}:{signature.nonce}", until=signature.timestamp + SKEW_SECONDS, now=now):
            raise Unauthenticated("the signature's nonce was used before")
        return key

    def _in_time(self, key: ApiKey) -> ApiKey:
        """Asked of who has proved that the key is his."""
        if key.expired(self._clock()):
            raise Unauthenticated(f"the key {key.id} has expired")
        return key


class _Deed(NamedTuple):
    """What a request does, and the roles that this needs. A version chosen by the header makes an `operate` action of any."""

    what: str
    target: str
    roles: tuple[Role, ...]

    @classmethod
    def of(cls, http: HttpRequest, what: str, role: Role, model: str | None) -> _Deed:
        if override := values(http.headers, OVERRIDE):
            return cls("version.override", f"{model or ''}/{override[0]}", (role, OPERATE))
        return cls(what, model or "", (role,))


def _fits(identity: str, pattern: str) -> bool:
    return re.fullmatch("[^:/]*".join(map(re.escape, pattern.split("*"))), identity) is not None


def _holder(key: ApiKey) -> Caller:
    return Caller(f"key:{key.id}", key.roles, key.models)


def open_access(settings: Settings, run: Run | None = None, *, public: bool) -> Access:
    """As the settings say. `public`: whether the host is reached by names that are its platform's to give out, as Lambda is.

    `run`: how to wait for a disk or for Redis elsewhere, such as `asyncio.to_thread`; None: here. Raises `ConfigurationError`.
    """
    keys: Keys | None = None
    nonces: Nonces | None = None
    audit: Audit | None = None
    if settings.api_keys_file is not None:
        keys = KeyFile(Path(settings.api_keys_file))
    elif settings.api_keys is not None:
        keys = read(settings.api_keys, "api_keys")
    if settings.nonces is not None:
        from triform.nonces import open_nonces

        nonces = open_nonces(settings.nonces, run)
    if settings.audit is not None:
        from triform.audit import AuditFile

        audit = AuditFile(Path(settings.audit))
    return Access(
        keys,
        anonymous=settings.allow_anonymous,
        nonces=nonces,
        browsers=Browsers(
            frozenset(name.lower() for name in settings.hosts),
            frozenset(settings.origins),
            addresses_only=settings.allow_anonymous and not public,
        ),
        operators=settings.operators,
        audit=audit,
        run=run,
    )


def check_closed(settings: Settings) -> None:
    """Raises `ConfigurationError` where nobody could call, or everybody can and nobody said so."""
    if not (settings.allow_anonymous or settings.api_keys or settings.api_keys_file):
        raise ConfigurationError(
            "api_keys_file: credentials are required, and there are no keys: make one with `triform keys new` and name the file, "
            "or let everybody in with allow_anonymous = true"
        )
