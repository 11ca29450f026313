"""Signed requests: the caller proves that he holds a key without sending it, for this one request alone.

    Authorization: TRIFORM-HMAC-SHA256 key=<id>, timestamp=<Unix seconds>, nonce=<16 to 64 of A-Za-z0-9_->, signature=<hex>

    message   = scheme, id, timestamp, nonce, method, path, query, each of HEADERS that is there, SHA-256 of the body: a line each
    signature = client key XOR HMAC-SHA256(stored, message)        RFC 5802, section 3: ClientProof

The server, which has `stored` alone (api_keys.py), makes the client key out of the signature, and its hash must be `stored`. So
who reads the server's file cannot sign; who sees requests cannot either. Who has both can: the wire wants TLS.

`path` begins where the surface does (a stage, base path or route prefix is not signed); path and query are compared in one
percent-encoding, the query's pairs sorted. The body is the one on the wire, packed where it is packed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

from triform.api_keys import ID, SIGNED, Presented, stored_of

SKEW_SECONDS: Final = 300
# What a header says of a body, or of who answers, must not change on the way either.
HEADERS: Final = (
    "content-encoding", "content-type", "inference-header-content-length",
    "x-triform-input", "x-triform-output", "x-triform-version",
)  # fmt: skip
_FORM: Final = re.compile(
    rf"{SIGNED} key=({ID}), timestamp=([0-9]{{1,11}}), nonce=([A-Za-z0-9_-]{{16,64}}), signature=([0-9a-f]{{64}})"
)


class Signature(NamedTuple):
    """What stands in the header. `proof`: 32 bytes."""

    key_id: str
    timestamp: int
    nonce: str
    proof: bytes

    @classmethod
    def parse(cls, authorization: str) -> Signature | None:
        found = _FORM.fullmatch(authorization)
        if found is None:
            return None
        key_id, timestamp, nonce, proof = found.groups()
        return cls(key_id, int(timestamp), nonce, bytes.fromhex(proof))

    def proves(self, stored: bytes, message: bytes) -> bool:
        """Whether the message was signed by the holder of the key of which `stored` is kept; takes the same time if not."""
        client_key = _xor(self.proof, hmac.digest(stored, message, "sha256"))
        return hmac.compare_digest(stored_of(client_key), stored)


class Parts(NamedTuple):
    """What of a request is signed. `path` and `query` as they came."""

    method: str
    path: str
    query: str = ""
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


def message(parts: Parts, key_id: str, timestamp: int, nonce: str) -> bytes:
    """What is signed. Raises `ValueError` for a header that would be several lines of it."""
    said: dict[str, list[str]] = {}
    for name, value in parts.headers:
        if name.lower() in HEADERS:
            said.setdefault(name.lower(), []).append(value.strip())
    path = quote(unquote(parts.path), safe="/:@!$&'()*+,;=~")
    query = urlencode(sorted(parse_qsl(parts.query, keep_blank_values=True)))
    headers = [f"{name}:{','.join(said[name])}" for name in HEADERS if name in said]
    lines = [SIGNED, key_id, str(timestamp), nonce, parts.method, path, query, *headers, hashlib.sha256(parts.body).hexdigest()]
    if any("\n" in line for line in lines):
        raise ValueError("a signed header has no line breaks")
    return "\n".join(lines).encode(errors="surrogatepass")


def sign(key: str, parts: Parts, *, now: float | None = None, nonce: str | None = None) -> str:
    """The Authorization header of a request, by a client. Raises `ValueError` for what is no key.

    sign("trf_...", Parts("POST", "/v1/models/churn:predict", headers=[("content-type", "application/json")], body=body))
    """
    presented = Presented.parse(key)
    if presented is None:
        raise ValueError("this is no API key: expected trf_<id>_<secret>")
    timestamp = int(time.time() if now is None else now)
    nonce = nonce or secrets.token_urlsafe(16)
    signed = hmac.digest(stored_of(presented.client_key), message(parts, presented.id, timestamp, nonce), "sha256")
    proof = _xor(presented.client_key, signed).hex()
    return f"{SIGNED} key={presented.id}, timestamp={timestamp}, nonce={nonce}, signature={proof}"


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
