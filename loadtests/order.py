"""What the processes that generate load are told, and tell: driving.py -> order.json -> generator.py -> generated.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from triform.errors import ConfigurationError

Protocol = Literal["oip-json", "oip-binary", "oip-grpc", "tfs"]
Loop = Literal["open", "closed"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("oip-json", "oip-binary", "oip-grpc", "tfs")
OVER_HTTP: Final[tuple[Protocol, ...]] = ("oip-json", "oip-binary", "tfs")

ORDER: Final = "order.json"
PAYLOADS: Final = "payloads.msgpack"
RECORDS: Final = "records.npz"
GENERATED: Final = "generated.json"


class Stage(msgspec.Struct, frozen=True):
    """A part of a shape in which the load stays the same. `begin`: in seconds from the shape's start; `level`: of the most."""

    begin: float
    seconds: float
    level: float

    @property
    def end(self) -> float:
        return self.begin + self.seconds


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A load run. `rate`: the most requests a second (open loop); `users`: the most callers (closed loop)."""

    host: str  # http://name:port or https://..., with the path that the surface is below
    grpc: str | None = None  # name:port
    grpc_metadata: tuple[tuple[str, str], ...] = ()
    stages: tuple[Stage, ...]
    loop: Loop = "open"
    rate: float
    users: int
    workers: int = 1
    saturates: bool = False  # it ends after the first stage that the target did not keep up with
    timeout: Annotated[float, msgspec.Meta(gt=0)] = 30.0  # seconds, of a request
    connections: int = 256  # of a worker at once
    seed: int = 0
    auth: str = "none"
    region: str | None = None  # of SigV4

    @property
    def seconds(self) -> float:
        return self.stages[-1].end

    def write(self, folder: Path) -> None:
        (folder / ORDER).write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path) -> Order:
        """Raises `ConfigurationError` for what is no order."""
        try:
            return msgspec.json.decode((folder / ORDER).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigurationError(f"{folder} has no order that can be read: {error}") from error


class Generated(msgspec.Struct, frozen=True):
    """What the records do not say. `locust_requests`, `locust_failures`: what Locust's own statistics came to."""

    outcomes: list[str]
    examples: dict[str, str]
    protocols: list[str]
    workers: int
    began: float  # Unix time, of the first worker
    saturated: float | None  # when the stage began that the target did not keep up with, in seconds from there
    locust_requests: int
    locust_failures: int
    locust_warned: bool  # of too little CPU for itself
