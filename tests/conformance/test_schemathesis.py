"""What openapi.json says is what the surface does: schemathesis makes requests of it, right ones and wrong ones, and holds each
answer against it. No 5xx, no status, type, header or body that the document does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from openapi_spec_validator import validate
from schemathesis import checks
from schemathesis.specs.openapi import checks as conformance

from tests.conformance.models import surface
from tests.conformance.wsgi import application
from triform.http import HttpSurface
from triform.openapi import OPERATIONS, document
from triform.routes import ROUTES

EXAMPLES = 1000
CHECKS = [
    checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
    conformance.response_headers_conformance,
]
DOCUMENT = document()
LABELS = [f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods]
MODELS = ["linear", "every", "text", "lookup", "flights"]


@pytest.fixture(scope="module")
def schema(online_models: Path) -> Any:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.app = application(surface(online_models))
    schemathesis.serializer("text/csv", "application/jsonlines")(lambda _context, value: str(value).encode())
    return schema


def check(schema: Any, label: str, examples: int, seed: int) -> None:
    """Half of the requests are for models that are there, and half of all bodies fit the document."""
    operation = schema.find_operation_by_label(label)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(st.sampled_from(modes).flatmap(operation.as_strategy))
        if case.path_parameters and data.draw(st.booleans()):
            there = {"model": data.draw(st.sampled_from(MODELS)), "version": "1", "alias": "stable"}
            case.path_parameters.update({k: v for k, v in there.items() if k in case.path_parameters})
        case.call_and_validate(checks=CHECKS, headers={"accept-encoding": "identity"})  # the WSGI client does not unpack

    run()


def test_the_document_is_openapi_and_has_every_route() -> None:
    validate(DOCUMENT)
    assert {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods} == {
        (route.template, route.method.lower()) for route in ROUTES
    }
    assert set(OPERATIONS) == {route.operation for route in ROUTES}
    assert all(hasattr(HttpSurface, name) for name in OPERATIONS)
    ids = [methods[method]["operationId"] for methods in DOCUMENT["paths"].values() for method in methods]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("label", LABELS)
def test_each_operation(schema: Any, label: str) -> None:
    check(schema, label, EXAMPLES // 10, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("label", LABELS)
def test_each_operation_at_length(schema: Any, label: str, seed: int) -> None:
    check(schema, label, EXAMPLES, seed)
