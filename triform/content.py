"""Content negotiation: what a body is, how it is packed, and what the caller takes.

    Content-Type -> media_type      Content-Encoding -> unpack      Accept, Accept-Encoding -> by_weight -> pack

Names and rules: RFC 9110, sections 8.3 (Content-Type), 8.4 (Content-Encoding), 12.5 (Accept and Accept-Encoding).
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from triform.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

_WINDOW: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's wbits
_WORTH_PACKING: Final = 1024  # bytes
_WEIGHT: Final = re.compile(r"[01](\.[0-9]{0,3})?")

MediaType = tuple[str, dict[str, str]]


def media_type(value: str) -> MediaType:
    """`text/csv; header=present` as its type in lower case, "" where there is none, and its parameters."""
    kind, _, rest = value.partition(";")
    if not rest:
        return kind.strip().lower(), {}
    pairs = (part.partition("=") for part in rest.split(";"))
    return kind.strip().lower(), {key.strip().lower(): text.strip().strip('"') for key, _, text in pairs}


def is_utf8(parameters: dict[str, str]) -> bool:
    """Whether a media type's charset is UTF-8, which it is where none is said."""
    return parameters.get("charset", "utf-8").lower().replace("_", "-") in ("utf-8", "utf8", "us-ascii", "ascii")


def by_weight(value: str) -> list[MediaType]:
    """What an Accept or Accept-Encoding names, the most wanted first; what has weight 0 is left out."""
    weighed = []
    for part in filter(str.strip, value.split(",")):
        kind, parameters = media_type(part)
        q = parameters.pop("q", "1")
        weight = float(q) if _WEIGHT.fullmatch(q) else 1.0
        if weight > 0:
            weighed.append((weight, kind, parameters))
    weighed.sort(key=lambda one: -one[0])
    return [(kind, parameters) for _, kind, parameters in weighed]


def unpack(body: bytes, encoding: str, most: int) -> bytes:
    """The unpacked body, at most `most` bytes.

    Raises `PayloadTooLarge` before more is unpacked, `InvalidRequest` for what is cut short, corrupt or followed by more (a
    second gzip member included), `UnsupportedMediaType`.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW:
        raise UnsupportedMediaType(f"content-encoding {encoding[:40]!r}: expected gzip or deflate")
    stream = zlib.decompressobj(_WINDOW[encoding])
    try:
        unpacked = stream.decompress(body, most + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body cannot be unpacked: {error}") from None
    if len(unpacked) > most:
        raise PayloadTooLarge(f"the body unpacks to more than {most} bytes")
    if not stream.eof:
        raise InvalidRequest("the body cannot be unpacked: it is cut short")
    if stream.unused_data:
        raise InvalidRequest("the body cannot be unpacked: something follows its end")
    return unpacked


def beginning(body: bytes, encoding: str, most: int) -> bytes:
    """The unpacked body's first bytes, at most so many: as far as it can be unpacked."""
    if encoding not in _WINDOW:
        return body[:most]
    try:
        return zlib.decompressobj(_WINDOW[encoding]).decompress(body, most)
    except zlib.error:
        return b""


def pack(body: bytes, accepted: str) -> tuple[bytes, dict[str, str]]:
    """The body packed as an Accept-Encoding wishes, where that is worth it, and the headers that say so."""
    if not accepted or len(body) < _WORTH_PACKING:
        return body, {}
    told = {"vary": "accept-encoding"}
    encoding = next((name for name, _ in by_weight(accepted) if name in _WINDOW), None)
    if encoding is None:
        return body, told
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[encoding])
    return stream.compress(body) + stream.flush(), {"content-encoding": encoding, **told}
