"""The paths of the surface: what they are called, and how a request finds its own.

method, path -> find -> the route, and what the path says: {"model": "flights", "version": "3"}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from triform.errors import MethodNotAllowed, RouteNotFound

if TYPE_CHECKING:
    from triform.api_keys import Role

Chosen = Mapping[str, str]
LIVE: Final = "/v2/health/live"
READY: Final = "/v2/health/ready"
PING: Final = "/ping"
EVERYBODYS: Final = frozenset({LIVE, READY, PING})  # what probes ask has no credentials, and is told yes or no


class Route(NamedTuple):
    """`operation` is the name of the method of `HttpSurface` that answers, and the operationId in openapi.json."""

    method: str
    template: str
    operation: str
    role: Role = "infer"  # that its caller needs


def _models_of(protocol: str, *operations: tuple[str, str, str], alias: bool = False) -> list[Route]:
    """The routes of a model, of one of its versions and, in a protocol that has them, of an alias."""
    chosen = ["", "/versions/{version}"] + (["/labels/{alias}"] if alias else [])
    return [
        Route(method, f"/{protocol}/models/{{model}}{which}{rest}", operation)
        for method, rest, operation in operations
        for which in chosen
    ]


ROUTES: Final = (
    *_models_of("v2", ("POST", "/infer", "v2_infer")),
    *_models_of("v1", ("POST", ":predict", "v1_predict"), alias=True),
    Route("POST", "/invocations", "invocations"),
    Route("GET", LIVE, "v2_live"),
    Route("GET", READY, "v2_ready"),
    Route("GET", PING, "ping"),
    Route("GET", "/v2", "v2_server"),
    *_models_of("v2", ("GET", "/ready", "v2_model_ready"), ("GET", "", "v2_model")),
    *_models_of("v1", ("GET", "/metadata", "v1_metadata"), ("GET", "", "v1_status"), alias=True),
    *_models_of("v1", ("POST", ":classify", "v1_classify"), ("POST", ":regress", "v1_regress"), alias=True),
    Route("GET", "/openapi.json", "openapi"),
)


def _parts(path: str) -> list[str]:
    """`/v1/models/m:predict` as "", "v1", "models", "m", ":predict"."""
    return path.replace(":", "/:").split("/")


_TABLE: Final = [(route, _parts(route.template)) for route in ROUTES]


def find(method: str, path: str) -> tuple[Route, Chosen]:
    """The route of a path that is percent-decoded; HEAD is GET. Raises `RouteNotFound`, `MethodNotAllowed`."""
    return _find(method, path) if len(path) > _SHORT else _known(method, path)


def _find(method: str, path: str) -> tuple[Route, Chosen]:
    parts, asked = _parts(path), "GET" if method == "HEAD" else method
    allowed = []
    for route, wanted in _TABLE:
        if len(parts) != len(wanted) or (chosen := _chosen(parts, wanted)) is None:
            continue
        if route.method == asked:
            return route, chosen
        allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
    if allowed:
        raise MethodNotAllowed(f"{method[:20]!r} is not for this path: use {allowed[0]}", allowed=", ".join(allowed))
    raise RouteNotFound("no such path")


def _chosen(parts: list[str], wanted: list[str]) -> Chosen | None:
    """What stands in the places of the names, which is not empty; None where the path is another."""
    chosen = {}
    for part, want in zip(parts, wanted, strict=True):
        if want.startswith("{"):
            if not part or part.startswith(":"):
                return None
            chosen[want[1:-1]] = part
        elif part != want:
            return None
    return chosen


_SHORT: Final = 200  # characters of a path that is remembered: no caller fills the memory
_known = lru_cache(maxsize=256)(_find)
