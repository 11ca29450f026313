"""The doorkeeper by itself: hostile headers, signatures out of time, replays, pages of other people, and what is on record."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.access import ANONYMOUS, INFER, OPERATE, Access, Browsers, Caller, check_closed, open_access
from triform.api_keys import SIGNED, KeyRing, new_key
from triform.audit import AuditFile, Entry, verify
from triform.errors import ConfigurationError, Forbidden, StoreError, TriformError, Unauthenticated, VersionNotFound
from triform.http import HttpRequest, at_once
from triform.nonces import MemoryNonces
from triform.settings import Settings
from triform.signing import SKEW_SECONDS, Parts, sign

NOW = 1_800_000_000.0
KEY, KEPT = new_key({INFER})
OPERATOR, OPERATORS = new_key({INFER, OPERATE})
BOUND, BOUNDS = new_key({INFER}, models={"churn"})
EXPIRED, EXPIREDS = new_key({INFER}, expires=datetime.fromtimestamp(NOW, UTC))
KEYS = {kept.id: kept for kept in (KEPT, OPERATORS, BOUNDS, EXPIREDS)}
PATH, BODY = "/v1/models/linear:predict", b'{"instances": [[1, 2, 3]]}'


def door(**options: Any) -> Access:
    return Access(KEYS, **{"nonces": MemoryNonces(), "clock": lambda: NOW} | options)


def request(*headers: tuple[str, str], body: bytes = BODY, path: str = PATH, query: str = "") -> HttpRequest:
    return HttpRequest("POST", path, headers, body, query, "192.0.2.7")


def signed(key: str = KEY, *, now: float = NOW, nonce: str | None = None, **parts: Any) -> HttpRequest:
    told = Parts(**{"method": "POST", "path": PATH, "body": BODY} | parts)
    http = HttpRequest(told.method, told.path, told.headers, told.body, told.query)
    return http._replace(headers=[*told.headers, ("authorization", sign(key, told, now=now, nonce=nonce))])


def caller_of(to: Access, http: HttpRequest) -> Caller:
    caller = at_once(to.authenticate(http)).caller
    assert caller is not None
    return caller


def bearer(key: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {key}"


def refusal(to: Access, http: HttpRequest) -> str:
    """The message; it quotes no credential."""
    with pytest.raises(Unauthenticated) as refused:
        at_once(to.authenticate(http))
    told = str(refused.value)
    assert not any(len(value) > 40 and value in told for name, value in http.headers if name.lower() == "authorization")
    assert KEY.split("_", 2)[2] not in told
    assert len(told) < 300
    return told


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_says_who_asks_and_what_he_may(scheme: str) -> None:
    assert caller_of(door(), request(("authorization", f"{scheme} {KEY}"))) == (f"key:{KEPT.id}", {INFER}, None)
    assert caller_of(door(), request(bearer(OPERATOR))).roles == {INFER, OPERATE}
    assert caller_of(door(), request(bearer(BOUND))).models == {"churn"}


LOOK_ALIKE = str.maketrans("abcdefghijklmnopqrstuvwxyz0123456789", "аЬсԁеｆɡһіјｋⅼⅿոорԛｒѕｔսνԝхуｚ𝟎１２３４５６７８９")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Bearer {KEY[:-1]}")],
        [("authorization", f"Bearer {KEY},Bearer {KEY}")],
        [("authorization", f"Bearer\t{KEY}")],
        [("authorization", f"Bearer {KEY}\x00")],
        [("authorization", f"Bearer {KEY}\r\nx-triform-version: 2")],
        [("authorization", f"Bearer \u200b{KEY}")],
        [("authorization", f"Bearer {KEY.translate(LOOK_ALIKE)}")],
        [("authorization", "\uff22\uff45\uff41\uff52\uff45\uff52 " + KEY)],
        [("authorization", f"Bearer {KEY.upper()}")],
        [("authorization", f"Bearer {KEY.replace(KEPT.id, OPERATORS.id)}")],
        [("authorization", "Bearer " + "x" * 1_000_000)],
        [("authorization", "Bearer trf_\ud800_" + "x" * 43)],
        [("authorization", f"Bearer {KEPT.stored}")],
        [("authorization", f"Bearer trf_{KEPT.id}_{KEPT.stored[:43]}")],
        [("authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("authorization", ""), ("authorization", f"Bearer {KEY}")],
        [("authorizati\u043en", f"Bearer {KEY}")],  # with a Cyrillic o
        [("authorization ", f"Bearer {KEY}")],
        [("x-authorization", f"Bearer {KEY}"), ("proxy-authorization", f"Bearer {KEY}"), ("x-api-key", KEY)],
        [(name, f"key:{KEPT.id}") for name in ("caller", "x-triform-caller", "x-forwarded-user", "remote-user", "x-remote-user")],
        [("x-amzn-oidc-identity", "root"), ("x-amzn-requestcontext", '{"authorizer": {"principalId": "root"}}')],
    ],
)  # fmt: skip
def test_what_lets_nobody_in(headers: list[tuple[str, str]]) -> None:
    refusal(door(), request(*headers))
    assert caller_of(door(), request(bearer(KEY))).id == f"key:{KEPT.id}"


@given(st.lists(st.tuples(st.text(st.characters()), st.text(st.characters()))))
def test_no_headers_let_in_who_holds_no_key(headers: list[tuple[str, str]]) -> None:
    refusal(door(), request(*headers))


@given(st.sampled_from(["Bearer", SIGNED]), st.text(st.characters()))
def test_nor_does_anything_in_the_right_header(scheme: str, text: str) -> None:
    refusal(door(), request(("authorization", f"{scheme} {text}")))


def test_an_expired_key_is_told_to_its_holder_alone() -> None:
    assert "has expired" in refusal(door(), request(bearer(EXPIRED)))
    assert "has expired" in refusal(door(), signed(EXPIRED))
    assert "has expired" not in refusal(door(), request(bearer(EXPIRED[:-1] + ("A" if EXPIRED[-1] != "A" else "B"))))
    assert caller_of(door(clock=lambda: NOW - 0.001), request(bearer(EXPIRED))).id == f"key:{EXPIREDS.id}"


def test_a_known_and_an_unknown_key_are_compared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the comparison is `hmac.compare_digest`, over 32 bytes each."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    caller_of(door(), request(bearer(KEY)))
    stranger = new_key({INFER})[0]
    wrong = signed()._replace(body=b"altered")
    for http in request(bearer(stranger)), request(bearer("nonsense")), request(bearer(KEY[:-2] + "AA")), wrong:
        refusal(door(), http)
    assert compared == [(32, 32)] * 5


def test_a_signed_request_is_let_in_once() -> None:
    to, http = door(), signed()
    assert caller_of(to, http).id == f"key:{KEPT.id}"
    assert "nonce was used before" in refusal(to, http)
    assert caller_of(to, signed()).id == f"key:{KEPT.id}"


def test_nonces_are_a_keys_own_and_wrong_signatures_use_none_up() -> None:
    to, nonce = door(), "n" * 16
    refusal(to, signed(nonce=nonce)._replace(body=b"altered"))
    refusal(to, signed(now=NOW - 1000, nonce=nonce))
    assert caller_of(to, signed(nonce=nonce)).id == f"key:{KEPT.id}"
    assert caller_of(to, signed(OPERATOR, nonce=nonce)).id == f"key:{OPERATORS.id}"
    refusal(to, signed(nonce=nonce, now=NOW + 1))


@pytest.mark.parametrize("sign_of", [-1, 1])
@pytest.mark.parametrize(("off", "fits"), [(0, True), (SKEW_SECONDS, True), (SKEW_SECONDS + 0.001, False), (1e9, False)])
def test_a_signature_holds_for_five_minutes_both_ways(sign_of: int, off: float, fits: bool) -> None:
    to, http = door(clock=lambda: NOW + sign_of * off), signed()
    if fits:
        assert caller_of(to, http).id == f"key:{KEPT.id}"
        assert "used before" in refusal(to, http)
    else:
        assert "300 are allowed" in refusal(to, http)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-400, 400), st.booleans()), max_size=30))
def test_of_many_sendings_each_request_gets_in_once_at_most(sent: list[tuple[int, float, bool]]) -> None:
    requests = [signed(now=NOW + 50 * n) for n in range(6)]
    now = NOW
    to = door(clock=lambda: now)
    let_in = []
    for which, later, altered in sent:
        now = NOW + later
        try:
            caller_of(to, requests[which]._replace(body=b"other") if altered else requests[which])
        except Unauthenticated:
            continue
        let_in.append(which)
        assert not altered
    assert len(let_in) == len(set(let_in))


@pytest.mark.parametrize(
    "altered",
    [{"method": "PUT"}, {"path": "/v1/models/churn:predict"}, {"query": "a=1"}, {"body": BODY + b" "}, {"headers": []}],
)
def test_an_altered_request_is_refused(altered: dict[str, Any]) -> None:
    refusal(door(), signed()._replace(**altered))


@pytest.mark.parametrize("name", ["x-triform-version", "x-triform-input", "content-encoding", "inference-header-content-length"])
def test_so_is_one_with_a_header_more_that_decides(name: str) -> None:
    http = signed(OPERATOR)
    for value in "2", "", "2\nx", "\ud800":
        refusal(door(), http._replace(headers=[*http.headers, (name, value)]))


def test_a_signature_twice_or_beside_a_key_is_refused() -> None:
    http = signed()
    refusal(door(), http._replace(headers=[*http.headers, http.headers[-1]]))
    refusal(door(), http._replace(headers=[bearer(KEY), *http.headers]))


def test_without_a_place_for_nonces_signed_requests_are_refused() -> None:
    assert "TRIFORM_NONCES" in refusal(door(nonces=None), signed())


def test_anonymous_callers_may_infer_and_wrong_credentials_are_still_wrong() -> None:
    to = door(anonymous=True)
    assert caller_of(to, request()) is ANONYMOUS
    assert caller_of(to, request(bearer(OPERATOR))).roles == {INFER, OPERATE}
    refusal(to, request(bearer("nonsense")))
    at_once(to.authorize(request()._replace(caller=ANONYMOUS), "v1_predict", INFER, "linear"))
    with pytest.raises(Unauthenticated, match="'operate'"):
        at_once(to.authorize(request()._replace(caller=ANONYMOUS), "drain", OPERATE))


def test_whom_the_host_knows_is_asked_for_nothing_else() -> None:
    to = door(operators=["iam:arn:aws:iam::*:role/ops", "jwt:42"])
    http = request(bearer("nonsense"))._replace(caller=to.of_platform("jwt:7"))
    assert caller_of(to, http) == ("jwt:7", {INFER}, None)
    for identity in "jwt:42", "iam:arn:aws:iam::1:role/ops":
        assert to.of_platform(identity).roles == {INFER, OPERATE}
    near = "iam:arn:aws:iam::1:role/ops2", "iam:arn:aws:iam::1:user/x:role/ops", "iam:arn:aws:iam::1:role/x/ops"
    for identity in "jwt:421", "jwt:4", "xjwt:42", "jwt:42\n", "jwt:42 ", *near:
        assert to.of_platform(identity).roles == {INFER}, identity
    assert to.of_platform("jwt:\x1b[31m\u202e" + "x" * 1000).id == "jwt:?[31m?" + "x" * 246


@pytest.mark.parametrize(
    ("key", "role", "model", "kind"),
    [
        (KEY, INFER, "linear", None),
        (KEY, INFER, None, None),
        (KEY, OPERATE, "linear", Forbidden),
        (OPERATOR, OPERATE, "linear", None),
        (BOUND, INFER, "churn", None),
        (BOUND, INFER, "linear", Forbidden),
        (BOUND, INFER, "nobody", Forbidden),  # whether there is such a model is not his to know
        (BOUND, INFER, None, None),
        (BOUND, OPERATE, "churn", Forbidden),
    ],
    ids=lambda value: "key" if str(value).startswith("trf_") else None,  # keys differ in each process that collects the tests
)
def test_roles_and_models(key: str, role: Any, model: str | None, kind: type[TriformError] | None) -> None:
    to = door()
    http = at_once(to.authenticate(request(bearer(key))))
    if kind is None:
        at_once(to.authorize(http, "something", role, model))
    else:
        with pytest.raises(kind):
            at_once(to.authorize(http, "something", role, model))


def test_operate_does_not_include_infer() -> None:
    key, kept = new_key({OPERATE})
    to = Access({kept.id: kept})
    http = at_once(to.authenticate(request(bearer(key))))
    at_once(to.authorize(http, "drain", OPERATE))
    with pytest.raises(Forbidden):
        at_once(to.authorize(http, "v1_predict", INFER, "linear"))
    override = http._replace(headers=[*http.headers, ("X-Triform-Version", "2")])
    with pytest.raises(Forbidden):  # a version of one's own choice needs both
        at_once(to.authorize(override, "v1_predict", INFER, "linear"))


@pytest.fixture
def audit(tmp_path: Path) -> AuditFile:
    return AuditFile(tmp_path / "audit.jsonl")


def recorded(audit: AuditFile) -> list[tuple[str, str, str, str, str]]:
    if not audit.path.exists():
        return []
    assert verify(audit.path).faults == []
    lines = [msgspec.json.decode(line, type=Entry) for line in audit.path.read_bytes().splitlines()]
    return [(entry.who, entry.what, entry.target, entry.where, entry.result) for entry in lines]


def test_what_operates_is_on_record_however_it_ends(audit: AuditFile) -> None:
    to = door(audit=audit)

    async def fine(_: HttpRequest) -> str:
        return "done"

    async def fails(_: HttpRequest) -> str:
        raise VersionNotFound("no such version")

    async def breaks(_: HttpRequest) -> str:
        raise ZeroDivisionError

    def attend(key: str, act: Callable[[HttpRequest], Any], *headers: tuple[str, str], role: Any = INFER) -> str:
        http = at_once(to.authenticate(request(bearer(key), *headers)))
        return str(at_once(to.attend(http, "drain" if role == OPERATE else "v1_predict", role, "linear", act)))

    override = ("x-triform-version", "2")
    assert attend(KEY, fine) == "done"
    assert recorded(audit) == []
    assert attend(OPERATOR, fine, override) == attend(OPERATOR, fine, role=OPERATE) == "done"
    for act, error in (fails, VersionNotFound), (breaks, ZeroDivisionError):
        with pytest.raises(error):
            attend(OPERATOR, act, override)
    with pytest.raises(Forbidden):
        attend(KEY, fine, override)
    with pytest.raises(Unauthenticated):
        attend(KEY[:-3], fine, override)
    who = f"key:{OPERATORS.id}"
    assert recorded(audit) == [
        (who, "version.override", "linear/2", "192.0.2.7", "ok"),
        (who, "drain", "linear", "192.0.2.7", "ok"),
        (who, "version.override", "linear/2", "192.0.2.7", "version_not_found"),
        (who, "version.override", "linear/2", "192.0.2.7", "internal"),
        (f"key:{KEPT.id}", "version.override", "linear/2", "192.0.2.7", "forbidden"),
    ]


def test_what_cannot_be_recorded_is_not_answered(tmp_path: Path) -> None:
    to = door(audit=AuditFile(tmp_path / "none/audit.jsonl"))

    async def fine(_: HttpRequest) -> str:
        return "done"

    http = at_once(to.authenticate(request(bearer(OPERATOR), ("x-triform-version", "1"))))
    with pytest.raises(StoreError, match="audit log"):
        at_once(to.attend(http, "v1_predict", INFER, "linear", fine))


def test_without_a_file_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    async def fine(_: HttpRequest) -> None:
        return None

    to = door()
    with caplog.at_level(logging.INFO, "triform.audit"):
        http = at_once(to.authenticate(request(bearer(OPERATOR), ("x-triform-version", "\x1b[31m\n2\ud800"))))
        at_once(to.attend(http, "v1_predict", INFER, "linear", fine))
    (record,) = caplog.records
    assert vars(record)["audit_who"] == f"key:{OPERATORS.id}"
    assert vars(record)["audit_target"].encode()


LOCAL = Browsers(addresses_only=True)
NAMED = Browsers(frozenset({"triform.example"}), frozenset({"https://app.example"}))


@pytest.mark.parametrize(
    ("browsers", "host", "origin", "fits"),
    [
        (Browsers(), "anything.example", None, True),
        (Browsers(), None, None, True),
        (LOCAL, "127.0.0.1:8000", None, True),
        (LOCAL, "localhost:8000", None, True),
        (LOCAL, "LOCALHOST", None, True),
        (LOCAL, "app.localhost", None, True),
        (LOCAL, "[::1]:8000", None, True),
        (LOCAL, "10.0.0.7", None, True),
        (LOCAL, "evil.example", None, False),  # a name of the attacker's that leads here
        (LOCAL, "evil.example:8000", None, False),
        (LOCAL, "127.0.0.1.evil.example", None, False),
        (LOCAL, "localhost.evil.example", None, False),
        (LOCAL, "127.0.0.1@evil.example", None, False),
        (LOCAL, "evil.example#127.0.0.1", None, False),
        (LOCAL, "l\u043ecalhost", None, False),
        (LOCAL, "", None, False),
        (LOCAL, "127.0.0.1\n", None, False),
        (NAMED, "triform.example", None, True),
        (NAMED, "Triform.Example.:443", None, True),
        (NAMED, "127.0.0.1", None, False),
        (NAMED, "xtriform.example", None, False),
        (NAMED, "triform.example.evil.example", None, False),
        (Browsers(), "triform.example", "https://triform.example", True),
        (Browsers(), "triform.example:8443", "https://triform.example:8443", True),
        (Browsers(), "triform.example:8443", "https://triform.example", False),
        (Browsers(), "triform.example", "https://evil.example", False),
        (Browsers(), "triform.example", "https://triform.example.evil.example", False),
        (Browsers(), "triform.example", "null", False),
        (Browsers(), None, "null", False),
        (Browsers(), None, "https://evil.example", False),
        (Browsers(), "", "", False),
        (NAMED, "triform.example", "https://app.example", True),
        (NAMED, "triform.example", "http://app.example", False),
        (NAMED, "triform.example", "https://app.example.evil.example", False),
    ],
)
def test_pages_of_other_people_may_not_ask(browsers: Browsers, host: str | None, origin: str | None, fits: bool) -> None:
    headers = [(name, value) for name, value in (("Host", host), ("Origin", origin)) if value is not None]
    to = door(browsers=browsers)
    if fits:
        assert caller_of(to, request(bearer(KEY), *headers)).id == f"key:{KEPT.id}"
    else:
        with pytest.raises(Forbidden):
            caller_of(to, request(bearer(KEY), *headers))


def test_a_host_or_origin_twice_is_refused() -> None:
    for name in "host", "origin":
        with pytest.raises(Forbidden, match="twice"):
            caller_of(door(), request(bearer(KEY), (name, "https://a.example"), (name.title(), "https://a.example")))


def given_settings(**environ: str) -> Settings:
    return Settings.from_env({f"TRIFORM_{name.upper()}": value for name, value in environ.items()})


def test_settings_make_an_access(tmp_path: Path) -> None:
    content = msgspec.json.encode(KeyRing([KEPT, OPERATORS]))
    (tmp_path / "keys.json").write_bytes(content)
    for named in {"api_keys": content.decode()}, {"api_keys_file": str(tmp_path / "keys.json")}:
        settings = given_settings(
            **named, hosts="Triform.example", origins="https://a.example,https://b.example", operators="jwt:1"
        )
        check_closed(settings)
        to = open_access(settings, public=False)
        http = request(bearer(KEY), ("host", "triform.example"), ("origin", "https://b.example"))
        assert caller_of(to, http).id == f"key:{KEPT.id}"
        refusal(to, request(("host", "triform.example")))
        assert "TRIFORM_NONCES" in refusal(to, signed(now=datetime.now(UTC).timestamp()))
        with pytest.raises(Forbidden):
            caller_of(to, request(bearer(KEY), ("host", "other.example")))
        assert to.of_platform("jwt:1").roles == {INFER, OPERATE}


@pytest.mark.parametrize("public", [True, False])
def test_who_lets_everybody_in_is_still_no_strangers_page_to_ask(public: bool) -> None:
    """Where a platform gives out the names (Lambda), a name that leads here is nobody else's."""
    to = open_access(given_settings(allow_anonymous="true"), public=public)
    assert caller_of(to, request(("host", "127.0.0.1"))) is ANONYMOUS
    if public:
        assert caller_of(to, request(("host", "abc.lambda-url.us-east-1.on.aws"))) is ANONYMOUS
    else:
        with pytest.raises(Forbidden, match="TRIFORM_HOSTS"):
            caller_of(to, request(("host", "evil.example")))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"api_keys": "{}"}, "api_keys: "),
        ({"api_keys": '{"keys": [{"id": "abcd"}]}'}, "api_keys: "),
        ({"api_keys_file": "/nowhere/keys.json"}, "api_keys_file: "),
        ({"allow_anonymous": "true", "nonces": "redi://x"}, "nonces: "),
    ],
)
def test_what_cannot_be_right_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        open_access(given_settings(**environ), public=False)


@pytest.mark.parametrize("wrong", ["maybe", "2", "", "nan"])
def test_whether_everybody_may_come_in_is_said_plainly(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="TRIFORM_ALLOW_ANONYMOUS"):
        given_settings(allow_anonymous=wrong)


def test_keys_stand_in_one_place() -> None:
    with pytest.raises(ConfigurationError, match="one of them"):
        given_settings(api_keys="{}", api_keys_file="keys.json")
    with pytest.raises(ConfigurationError, match="credentials are required"):
        check_closed(given_settings())
