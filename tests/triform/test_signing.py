"""Signed requests: what a signature holds fast, and what it lets nobody do."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any
from urllib.parse import parse_qsl, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.api_keys import SIGNED, new_key
from triform.signing import HEADERS, Parts, Signature, message, sign

KEY, KEPT = new_key({"infer"})
OTHER = new_key({"infer"})[0]
STORED = bytes.fromhex(KEPT.stored)
NONCE = "n" * 16
PARTS = Parts(
    "POST", "/v1/models/linear:predict", "a=1&b=2", [("content-type", "application/json")], b'{"instances": [[1, 2, 3]]}'
)


def proves(authorization: str, parts: Parts, stored: bytes = STORED) -> bool:
    signature = Signature.parse(authorization)
    assert signature is not None
    return signature.proves(stored, message(parts, signature.key_id, signature.timestamp, signature.nonce))


headers = st.lists(
    st.tuples(st.sampled_from([*HEADERS, "x-other"]), st.text(st.characters(exclude_characters="\n", codec="utf-8")))
)
requests = st.builds(
    Parts,
    st.sampled_from(["GET", "POST", "PUT"]),
    st.text(st.characters(codec="utf-8")),
    st.text(st.characters(codec="utf-8")),
    headers,
    st.binary(),
)


@given(requests)
def test_what_was_signed_is_proved_and_only_by_its_key(parts: Parts) -> None:
    assert proves(sign(KEY, parts, now=1.8e9), parts)
    assert not proves(sign(OTHER, parts, now=1.8e9), parts)


def meaning(parts: Parts) -> Any:
    """What of a request counts."""
    said: dict[str, list[str]] = {}
    for name, value in parts.headers:
        if name in HEADERS:
            said.setdefault(name, []).append(value.strip())
    pairs = sorted(parse_qsl(parts.query, keep_blank_values=True))
    return parts.method, unquote(parts.path), pairs, {name: ",".join(values) for name, values in said.items()}, parts.body


@given(requests, requests, st.sampled_from(Parts._fields))
def test_a_request_that_means_something_else_has_another_message(one: Parts, other: Parts, field: str) -> None:
    changed = one._replace(**{field: getattr(other, field)})
    same = message(one, KEPT.id, 1, NONCE) == message(changed, KEPT.id, 1, NONCE)
    assert same == (meaning(one) == meaning(changed))


@pytest.mark.parametrize(
    "altered",
    [
        {"method": "PUT"},
        {"path": "/v1/models/linear:predicT"},
        {"path": "/v1/models/linear/versions/2:predict"},
        {"query": "a=1&b=3"},
        {"query": ""},
        {"query": "a=1&b=2&c="},
        {"body": b'{"instances": [[1, 2, 4]]}'},
        {"body": b""},
        *({"headers": [("content-type", "application/json"), (name, "2")]} for name in HEADERS),
        {"headers": []},
        {"headers": [("content-type", "text/csv")]},
    ],
)
def test_an_altered_request_is_not_the_one_that_was_signed(altered: dict[str, Any]) -> None:
    authorization = sign(KEY, PARTS)
    assert proves(authorization, PARTS)
    assert not proves(authorization, PARTS._replace(**altered))


@pytest.mark.parametrize(
    "same",
    [
        {"path": "/v1/models/linear%3Apredict"},
        {"path": "/v1/models/l%69near:predict"},
        {"query": "b=2&a=1"},
        {"query": "%61=1&b=2"},
        {"headers": [("Content-Type", " application/json "), ("accept", "text/csv"), ("x-forwarded-for", "::1")]},
    ],
)
def test_what_gateways_do_to_a_request_changes_nothing(same: dict[str, Any]) -> None:
    assert proves(sign(KEY, PARTS), PARTS._replace(**same))


@given(st.integers(0, 63), st.sampled_from("0123456789abcdef"))
def test_a_signature_with_any_digit_changed_proves_nothing(at: int, digit: str) -> None:
    head, _, proof = sign(KEY, PARTS, now=1.8e9, nonce=NONCE).rpartition("=")
    changed = proof[:at] + digit + proof[at + 1 :]
    assert proves(f"{head}={changed}", PARTS) == (changed == proof)


@pytest.mark.parametrize("field", ["key", "timestamp", "nonce"])
def test_so_does_one_with_any_field_changed(field: str) -> None:
    authorization = sign(KEY, PARTS, now=1.8e9, nonce=NONCE)
    value = authorization.split(f"{field}=")[1].split(",")[0]
    other = {"key": "zzzzzzzzzz", "timestamp": "1800000001", "nonce": "m" * 16}[field]
    assert not proves(authorization.replace(f"{field}={value}", f"{field}={other}"), PARTS)


def test_who_reads_the_key_file_cannot_sign() -> None:
    """With `stored` one can compute HMAC(stored, message), and that is all: it is no signature, alone or with a guess."""
    signed = hmac.digest(STORED, message(PARTS, KEPT.id, 1, NONCE), "sha256")
    for guess in bytes(32), STORED, hashlib.sha256(STORED).digest(), signed:
        forged = bytes(a ^ b for a, b in zip(guess, signed, strict=True)).hex()
        assert not proves(f"{SIGNED} key={KEPT.id}, timestamp=1, nonce={NONCE}, signature={forged}", PARTS)


GOOD = sign(KEY, PARTS, now=1.8e9, nonce=NONCE)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        SIGNED,
        GOOD + " ",
        GOOD + "\n",
        GOOD + ", extra=1",
        GOOD[:-1],
        GOOD.replace(", ", ","),
        GOOD.replace("timestamp=1800000000", "timestamp=-1"),
        GOOD.replace("timestamp=1800000000", "timestamp=1.8e9"),
        GOOD.replace("timestamp=1800000000", "timestamp=" + "9" * 30),
        GOOD.replace("timestamp=1800000000", "timestamp=١٨٠٠٠٠٠٠٠٠"),  # Arabic digits
        GOOD.replace("n" * 16, "n" * 15),
        GOOD.replace("n" * 16, "n" * 65),
        GOOD.replace("n" * 16, "\uff4e" * 16),  # of full width
        GOOD.replace("n" * 16, "n" * 15 + "\x00"),
        GOOD.replace("key=", "key=\u200b"),
        GOOD.replace("SHA256", "SHA1"),
        GOOD + GOOD,
        "x" * 1_000_000,
    ],
    ids=lambda _: "wrong",  # the key in them differs in each process that collects the tests
)
def test_what_is_no_signature(wrong: str) -> None:
    assert Signature.parse(wrong) is None


@given(st.text())
def test_any_text_is_a_signature_or_none(text: str) -> None:
    assert Signature.parse(text) is None


def test_a_header_cannot_pass_for_two() -> None:
    with pytest.raises(ValueError, match="line breaks"):
        message(PARTS._replace(headers=[("content-type", "a\nx-triform-version:2")]), KEPT.id, 1, NONCE)


def test_what_is_no_key_cannot_sign() -> None:
    with pytest.raises(ValueError, match="no API key"):
        sign("secret", PARTS)


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hmac.compare_digest` has the last word: where it says no, nothing is proved."""
    seen: list[int] = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append(len(one))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert not proves(sign(KEY, PARTS), PARTS)
    assert seen == [32]
