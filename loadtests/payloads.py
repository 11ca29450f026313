"""Requests for real flights, made ahead in each protocol, each with the answers that the batch job gave.

    wording.py -> Payloads.write -> payloads.msgpack -> Payloads.read -> Choice.draw

Sizes are mixed as SIZES says.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import msgspec

from loadtests.order import PAYLOADS, Protocol

# By rows of a request: how many of a hundred are so, and how many different ones there are.
SIZES: Final[Mapping[int, tuple[int, int]]] = {1: (60, 32), 8: (20, 16), 64: (12, 8), 250: (6, 4), 1000: (2, 2)}


class Payload(msgspec.Struct, frozen=True):
    """A request. `expected`: FP32[rows], `bound`: how far an answer may be from it, FP64[rows], both as bytes."""

    protocol: Protocol
    rows: int
    path: str
    headers: dict[str, str]
    body: bytes
    expected: bytes
    bound: bytes


class Payloads(msgspec.Struct, frozen=True):
    """All of them. `tensor`, `position`: where a row's answer stands among the output tensors; `column`: its name in records."""

    model: str
    tensor: str
    position: int
    column: str
    payloads: list[Payload]

    def write(self, folder: Path) -> None:
        (folder / PAYLOADS).write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def read(cls, folder: Path) -> Payloads:
        return msgspec.msgpack.decode((folder / PAYLOADS).read_bytes(), type=cls)


class Choice:
    """Draws payloads: each protocol as often as the others, sizes as SIZES says."""

    def __init__(self, payloads: Sequence[Payload], chance: random.Random) -> None:
        self._payloads = payloads
        self._chance = chance
        self._weights = [*accumulate(SIZES[p.rows][0] / SIZES[p.rows][1] for p in payloads)]

    def draw(self) -> Payload:
        return self._chance.choices(self._payloads, cum_weights=self._weights)[0]
