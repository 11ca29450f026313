"""Who may call, over each kind of host: credentials on every path, roles, models, signatures, other people's pages.

Function URLs have no authorizer before them, so the same keys work there; tests/handlers/test_identity.py has authorizers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson
import pytest

from tests.conformance.hosts import Answer, Send, asgi, aws_lambda, in_process, loopback
from triform.access import Access
from triform.api_keys import KeyFile, KeyRing, new_key
from triform.audit import AuditFile, Entry, verify
from triform.nonces import MemoryNonces
from triform.routes import ROUTES
from triform.signing import Parts, sign

PREDICT, INFER = "/v1/models/linear:predict", "/v2/models/linear/infer"
GOOD, ANSWER = b'{"instances": [[1, 2, 3]]}', b'{"predictions":[[14.0]]}'


class Guard(NamedTuple):
    """What a guarded host is set up with: keys by what they are good for, and the files that say so."""

    keys: dict[str, str]
    file: Path
    audit: Path

    def access(self) -> Access:
        return Access(KeyFile(self.file), nonces=MemoryNonces(), audit=AuditFile(self.audit))

    def settings(self) -> dict[str, str]:
        settings = {"api_keys_file": str(self.file), "nonces": "memory", "audit": str(self.audit)}
        return {f"TRIFORM_{name.upper()}": value for name, value in settings.items()} | {"TRIFORM_ALLOW_ANONYMOUS": "false"}

    def bearer(self, which: str, **headers: str) -> dict[str, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return {"Authorization": f"Bearer {self.keys[which]}", **named}

    def signed(
        self, method: str, path: str, body: bytes = b"", which: str = "infer", now: float = 0, **headers: str
    ) -> dict[str, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        at, _, query = path.partition("?")
        parts = Parts(method, at, query, list(named.items()), body)
        return {"Authorization": sign(self.keys[which], parts, now=now or time.time()), **named}


def guard(folder: Path) -> Guard:
    made = {
        "infer": new_key({"infer"}),
        "operate": new_key({"infer", "operate"}),
        "bound": new_key({"infer"}, models={"flights"}),
        "drain": new_key({"operate"}),
        "expired": new_key({"infer"}, expires=datetime(2020, 1, 1, tzinfo=UTC)),
    }
    file = folder / "keys.json"
    file.write_bytes(msgspec.json.encode(KeyRing([kept for _, kept in made.values()])))
    return Guard({name: text for name, (text, _) in made.items()}, file, folder / "audit.jsonl")


Host = Callable[[Path, Guard], AbstractContextManager[Send]]
HOSTS: dict[str, Host] = {
    "http.py": lambda repository, guard: in_process(repository, access=guard.access()),
    "loopback": lambda repository, guard: loopback(repository, access=guard.access()),
    "asgi": lambda repository, guard: asgi(
        repository, allow_anonymous=False, api_keys_file=str(guard.file), nonces="memory", audit=str(guard.audit)
    ),
    "lambda-url": lambda repository, guard: aws_lambda(repository, "url", **guard.settings()),
    "lambda-rest": lambda repository, guard: aws_lambda(repository, "rest", **guard.settings()),
    "lambda-alb": lambda repository, guard: aws_lambda(repository, "alb", **guard.settings()),
}
SLOW = ("lambda-rest", "lambda-alb")  # the same function behind other events


PROBED = ("/ping", "/v2/health/live", "/v2/health/ready")  # by what has no credentials


class Guarded(NamedTuple):
    send: Send
    guard: Guard

    def ask(self, which: str = "infer", path: str = PREDICT, body: bytes = GOOD, **headers: str) -> Answer:
        return self.send("POST", path, self.guard.bearer(which, **headers), body)

    def refuses(self, answer: Answer, status: int, code: str) -> str:
        """The message of a refusal in its form; and the next request is answered."""
        told = orjson.loads(answer.body)
        assert (answer.status, told["code"], set(told)) == (status, code, {"error", "code"}), answer
        assert answer.headers["content-type"] == "application/json"
        assert ("Bearer" in answer.headers.get("www-authenticate", "")) == (status == 401)
        assert not any(secret in answer.body.decode() for key in self.guard.keys.values() for secret in key.split("_", 2)[2:])
        assert not any(trace in told["error"] for trace in ("Traceback", ".py", "/tmp/", str(self.guard.file)))
        assert self.ask()[::2] == (200, ANSWER)
        return str(told["error"])


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HOSTS])
def guarded(request: pytest.FixtureRequest, online_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = guard(tmp_path_factory.mktemp("guard"))
    with HOSTS[request.param](online_models, made) as send:
        yield Guarded(send, made)


@pytest.mark.parametrize("route", ROUTES, ids=[f"{route.method} {route.template}" for route in ROUTES])
def test_every_path_wants_credentials_but_those_of_probes(guarded: Guarded, route: NamedTuple) -> None:
    method, path = route[0], route[1].format(model="linear", version="1", alias="stable")
    answer = guarded.send(method, path, {}, GOOD if method == "POST" else b"")
    if path in PROBED:
        foreign = guarded.send(method, path, {"origin": "https://elsewhere.example"})  # nor is it asked under which name it came
        assert (answer.status, foreign.status, b"linear" in answer.body) == (200, 200, False)
    else:
        guarded.refuses(answer, 401, "unauthenticated")
        guarded.refuses(guarded.send(method, path, guarded.guard.bearer("drain"), b""), 403, "forbidden")
    if method == "GET":
        allowed = guarded.send(method, path, guarded.guard.bearer("infer"))
        assert allowed.status == 200, allowed


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/nothing", "/v2/models/nobody", "/", "/v2/health/live/", "/v2/health//live"])
def test_so_does_what_is_not_there(guarded: Guarded, method: str, path: str) -> None:
    guarded.refuses(guarded.send(method, path), 401, "unauthenticated")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer nonsense",
        "Basic cm9vdDpyb290",
        "Bearer trf_aaaaaaaaaa_" + "a" * 43,
        "Bearer " + "x" * 7000,
        "TRIFORM-HMAC-SHA256 key=",
    ],
)
def test_wrong_credentials(guarded: Guarded, authorization: str) -> None:
    guarded.refuses(guarded.send("POST", PREDICT, {"Authorization": authorization}, GOOD), 401, "unauthenticated")


def test_an_expired_key(guarded: Guarded) -> None:
    assert "expired" in guarded.refuses(guarded.ask("expired"), 401, "unauthenticated")


def test_identity_in_headers_is_nobodys(guarded: Guarded) -> None:
    names = ["x-amzn-oidc-identity", "x-amzn-oidc-data", "x-forwarded-user", "x-remote-user", "x-triform-caller", "x-api-key"]
    claims = dict.fromkeys(names, "root") | {
        "x-amzn-request-context": '{"authorizer": {"iam": {"userArn": "arn:aws:iam::1:root"}}}'
    }
    guarded.refuses(guarded.send("POST", PREDICT, claims, GOOD), 401, "unauthenticated")
    body = orjson.dumps({"instances": [[1, 2, 3]], "requestContext": {"authorizer": {"principalId": "root"}}})
    guarded.refuses(guarded.send("POST", PREDICT, claims, body), 401, "unauthenticated")


def test_nothing_of_a_body_is_decoded_for_who_may_not_ask(guarded: Guarded) -> None:
    packed = {"content-encoding": "gzip", "content-type": "application/x-python-pickle"}
    guarded.refuses(guarded.send("POST", PREDICT, packed, b"\x00not gzip"), 401, "unauthenticated")


def test_a_version_of_ones_own_choice_needs_operate(guarded: Guarded) -> None:
    before = len(guarded.guard.audit.read_bytes().splitlines()) if guarded.guard.audit.exists() else 0
    guarded.refuses(guarded.ask("infer", x_triform_version="1"), 403, "forbidden")
    guarded.refuses(guarded.ask("drain", x_triform_version="1"), 403, "forbidden")
    answer = guarded.ask("operate", x_triform_version="1")
    assert (answer.status, answer.body, answer.headers["x-triform-model"]) == (200, ANSWER, "linear/1")
    guarded.refuses(guarded.ask("operate", x_triform_version="9"), 404, "version_not_found")
    guarded.refuses(guarded.ask("operate", x_triform_version="one"), 404, "version_not_found")
    guarded.refuses(guarded.ask("operate", "/v2/models/linear/versions/1/infer", x_triform_version="1"), 400, "invalid_request")
    assert guarded.ask("infer", "/v1/models/linear/versions/1:predict").status == 200  # which is the protocol's own
    assert verify(guarded.guard.audit).faults == []
    lines = [msgspec.json.decode(line, type=Entry) for line in guarded.guard.audit.read_bytes().splitlines()][before:]
    results = ["forbidden", "forbidden", "ok", "version_not_found", "version_not_found", "invalid_request"]
    assert [line.result for line in lines] == results
    assert {(line.what, line.target) for line in lines[:3]} == {("version.override", "linear/1")}


def test_a_key_is_bound_to_its_models(guarded: Guarded) -> None:
    rows = orjson.dumps({"instances": [{"carrier": "UA", "distance": 1400, "hour": 5}]})
    assert guarded.ask("bound", "/v1/models/flights:predict", rows).status == 200
    for method, path in (
        ("POST", PREDICT),
        ("POST", INFER),
        ("POST", "/invocations"),
        ("GET", "/v2/models/linear"),
        ("GET", "/v2/models/linear/ready"),
        ("GET", "/v1/models/linear"),
        ("GET", "/v1/models/linear/metadata"),
        ("POST", "/v1/models/nobody:predict"),
        ("POST", "/v1/models/l%69near:predict"),
    ):
        guarded.refuses(guarded.send(method, path, guarded.guard.bearer("bound"), GOOD), 403, "forbidden")


@pytest.mark.parametrize("path", [PREDICT, f"{PREDICT}?b=%2F%20x%26y&a=1", "/v1/models/linear%3Apredict", "/invocations"])
def test_a_signed_request_once(guarded: Guarded, path: str) -> None:
    headers = guarded.guard.signed("POST", path, GOOD, content_type="application/json")
    assert guarded.send("POST", path, headers, GOOD)[::2] == (200, ANSWER)
    assert "used before" in guarded.refuses(guarded.send("POST", path, headers, GOOD), 401, "unauthenticated")


def test_the_guides_example_is_let_in(guarded: Guarded) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/security.md").read_text(), re.DOTALL)
    made: dict[str, Any] = {"key": guarded.guard.keys["infer"]}
    exec(code.replace("churn", "linear"), made)  # noqa: S102 - our own page
    assert guarded.send("POST", made["path"], made["headers"], made["body"])[::2] == (200, ANSWER)


def test_a_signed_binary_body(guarded: Guarded) -> None:
    body = bytes(range(256)) * 3 + bytes(12)
    headers = {"inference-header-content-length": "0", "content-type": "application/octet-stream"}
    told = {name.replace("-", "_"): value for name, value in headers.items()}
    assert guarded.send("POST", INFER, guarded.guard.signed("POST", INFER, body, **told), body).status == 200
    altered = guarded.send("POST", INFER, guarded.guard.signed("POST", INFER, body, **told), body[:-1] + b"\x01")
    guarded.refuses(altered, 401, "unauthenticated")


def test_stale_and_altered_signed_requests(guarded: Guarded) -> None:
    headers = guarded.guard.signed
    for now in time.time() - 310, time.time() + 310, 1.0:
        answer = guarded.send("POST", PREDICT, headers("POST", PREDICT, GOOD, now=now), GOOD)
        assert "300 are allowed" in guarded.refuses(answer, 401, "unauthenticated")
    for method, path, body, more in (
        ("POST", PREDICT, GOOD + b" ", {}),
        ("POST", PREDICT + "?a=1", GOOD, {}),
        ("POST", "/v1/models/text:predict", GOOD, {}),
        ("PUT", PREDICT, GOOD, {}),
        ("POST", PREDICT, GOOD, {"x-triform-version": "1"}),
        ("POST", PREDICT, GOOD, {"content-type": "text/csv"}),
    ):
        answer = guarded.send(method, path, {**headers("POST", PREDICT, GOOD, "operate"), **more}, body)
        assert "not that of this request" in guarded.refuses(answer, 401, "unauthenticated")


def test_pages_of_other_people(guarded: Guarded) -> None:
    guarded.refuses(guarded.ask(origin="https://evil.example"), 403, "forbidden")
    guarded.refuses(guarded.ask(origin="null"), 403, "forbidden")
    assert guarded.ask(host="triform.example", origin="https://triform.example")[::2] == (200, ANSWER)


@pytest.mark.parametrize("guarded", ["asgi", "lambda-url"], indirect=True)  # it takes a second or two each
def test_keys_change_while_the_host_runs(guarded: Guarded) -> None:
    content = guarded.guard.file.read_bytes()
    key, kept = new_key({"infer"})
    ring = msgspec.json.decode(content, type=KeyRing)

    def until(headers: dict[str, str], status: int) -> None:
        deadline = time.monotonic() + 30
        while guarded.send("POST", PREDICT, headers, GOOD).status != status:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    new = {"Authorization": f"Bearer {key}"}
    assert guarded.send("POST", PREDICT, new, GOOD).status == 401
    guarded.guard.file.write_bytes(msgspec.json.encode(KeyRing([*ring.keys, kept])))
    until(new, 200)
    guarded.guard.file.write_bytes(content)
    until(new, 401)
    assert guarded.ask()[::2] == (200, ANSWER)
