"""How requests say who asks, and that nobody else hears it."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from infra.local.gateway import local_gateway
from loadtests.credentials import SECRET, Asked, check_wire, read_secret, signer
from loadtests.driving import drive
from loadtests.order import Order
from loadtests.shapes import stages
from tests.loadtests.made import payloads
from tests.loadtests.stub import predicted, stub
from triform.api_keys import KeyRing, new_key
from triform.errors import ConfigurationError
from triform.testing import linear, repository

ASKED = Asked(
    "POST", "https://api.example/prod/v2/models/m/infer", "/v2/models/m/infer", {"content-type": "application/json"}, b"{}"
)
AWS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalr-secret", "AWS_SESSION_TOKEN": "token-of-the-session"}


def test_a_secret_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("abc\n")
    assert read_secret("jwt", file, {SECRET: "other"}) == "abc"
    assert read_secret("jwt", None, {SECRET: "other"}) == "other"
    assert read_secret("none", None, {SECRET: "other"}) is None
    assert read_secret("sigv4", None, {}) is None


@pytest.mark.parametrize(
    ("kind", "content", "named"),
    [
        ("jwt", None, "--secret-file"),
        ("jwt", b"", "needs a secret"),
        ("jwt", b"two\nlines", "needs a secret"),
        ("key", b"\xff\xfe", "cannot be read"),
        ("signed", b"abc", "no API key"),
        ("basic", b"abc", "no such kind"),
        ("sigv4", b"abc", "has no secret"),
    ],
)
def test_a_secret_that_cannot_be_meant_is_refused_without_telling_it(
    kind: str, content: bytes | None, named: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=named) as told:
        read_secret(kind, file, {})
    assert "abc" not in str(told.value)
    assert "lines" not in str(told.value).replace("one line", "")


def test_a_secret_does_not_cross_a_network_in_plain_text() -> None:
    for kind in "key", "jwt", "api-key":
        with pytest.raises(ConfigurationError, match="--insecure"):
            check_wire(kind, "http://triform.example", insecure=False)
        check_wire(kind, "https://triform.example", insecure=False)
        check_wire(kind, "http://127.0.0.1:8000", insecure=False)
        check_wire(kind, "http://triform.example", insecure=True)
    for kind in "none", "signed", "sigv4":  # these send none
        check_wire(kind, "http://triform.example", insecure=False)


def test_headers_are_those_that_gateways_want() -> None:
    assert signer("key", "trf_x", None)(ASKED) == {"authorization": "Bearer trf_x"}
    assert signer("jwt", "ey.x", None)(ASKED) == {"authorization": "Bearer ey.x"}
    assert signer("api-key", "x", None)(ASKED) == {"x-api-key": "x"}
    assert signer("none", None, None)(ASKED) == {}


def test_sigv4_is_what_aws_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew here by "Create a signed AWS API request", from what was sent."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    headers = {**ASKED.headers, **signer("sigv4", None, "eu-west-1")(ASKED)}
    assert headers["x-amz-security-token"] == AWS["AWS_SESSION_TOKEN"]
    form = (
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/eu-west-1/execute-api/aws4_request, "
        r"SignedHeaders=([a-z0-9;-]+), Signature=(\w{64})"
    )
    found = re.fullmatch(form, headers["authorization"])
    assert found is not None
    key_id, day, names, signature = found.groups()
    assert key_id == AWS["AWS_ACCESS_KEY_ID"]
    assert {"host", "x-amz-date", "x-amz-security-token"} <= {*names.split(";")}
    url = urlsplit(ASKED.url)
    said = {**headers, "host": url.netloc}
    lines = [f"{name}:{said[name]}" for name in names.split(";")]
    canonical = "\n".join([ASKED.method, url.path, "", *lines, "", names, hashlib.sha256(ASKED.body).hexdigest()])
    scope = f"{day}/eu-west-1/execute-api/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{AWS['AWS_SECRET_ACCESS_KEY']}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    assert hmac.new(key, text.encode(), "sha256").hexdigest() == signature


def test_a_secret_reaches_the_target_and_no_file(tmp_path: Path) -> None:
    with stub(lambda _: predicted(0.25)) as server:
        order = Order(host=server.url, stages=stages("soak", 0.5), rate=20, users=1, auth="api-key")
        drive(order, payloads(), tmp_path, "very-secret-text")
        assert {head["x-api-key"] for head in server.heads} == {"very-secret-text"}
    for file in tmp_path.iterdir():
        assert b"very-secret-text" not in file.read_bytes()


@pytest.mark.parametrize("kind", ["key", "signed"])
def test_a_function_that_wants_keys_lets_in_who_has_one(kind: str, tmp_path: Path) -> None:
    """A real function; the model is none of flights, so what is let in is told that there is no such model."""
    keys = tmp_path / "keys.json"
    secret, kept = new_key({"infer"})
    keys.write_bytes(msgspec.json.encode(KeyRing([kept])))
    repository(tmp_path / "models", {"linear": linear(tmp_path / "linear.onnx")})
    environ = {
        "TRIFORM_REPOSITORY": str(tmp_path / "models"),
        "TRIFORM_ALLOW_ANONYMOUS": "false",
        "TRIFORM_API_KEYS_FILE": str(keys),
        "TRIFORM_NONCES": "memory",
    }
    said = []
    with local_gateway(environ=environ, max_concurrency=1, provisioned=1) as gateway:
        for who in (kind, "none"):
            folder = tmp_path / who
            folder.mkdir()
            order = Order(host=gateway.url, stages=stages("soak", 0.5), rate=20, users=1, auth=who, connections=1)
            said.append({*drive(order, payloads(), folder, None if who == "none" else secret).generated.outcomes})
    assert said == [{"http_404_model_not_found"}, {"http_401_unauthenticated"}]
