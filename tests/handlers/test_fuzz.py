"""Whatever JSON comes as an event, it is answered in the form of its source, or refused by one typed error."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from handlers._boot import boot
from handlers._events import Direct, LoadBalancer, source_of
from handlers._function import Function
from handlers._messages import decode, messages_of
from handlers._objects import deliveries
from tests.handlers.conftest import context
from tests.handlers.starting import golden_event
from triform.errors import InvalidRequest, NotFound

FEW = settings(max_examples=150, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=5000)
HTTP = ["http-v2", "rest", "alb", "alb-multi", "url", "direct"]

text = st.text(st.characters(), max_size=8)  # halves of surrogate pairs too, which json.loads lets through
WORDS = [
    "2.0", "1.0", "GET", "HEAD", "/", "/v1/models/linear:predict", "/v2/models/linear/infer", "$default", "linear", "stable",
    "elb", "model", "lookup", "instances", "YWJj", "%", "%ff", "in/%ed%a0%80.csv", "application/json", "gzip", "x-triform-input",
    "s3://bucket/in/x", "aws:sqs", "s3:TestEvent", "ObjectRemoved:Delete", '{"instances": [[1, 2, 3]]}', '{"Records": []}',
    '{"model": "linear", "instances": [[1, 2, 3]]}', '{"Event": "s3:TestEvent"}', "[[[[[",
]  # fmt: skip
words = st.sampled_from(WORDS)
scalars = st.none() | st.booleans() | st.integers() | st.sampled_from([2**70, -(2**63)]) | st.floats() | text | words
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(text | words, v, max_size=4), max_leaves=8)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@st.composite
def changed(draw: st.DrawFn, names: list[str]) -> Any:
    """A golden event in which some values are others, or are missing."""
    event = {"event": golden_event(draw(st.sampled_from(names)))}
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from([place for place in places(event) if place]))
        at: Any = event
        for key in path:
            at = at[key]
        if draw(st.booleans()):
            at[last] = draw(values)
        elif path:
            del at[last]
        if not isinstance(event["event"], dict | list):
            break
    return copy.deepcopy(event["event"])


def check_answer(event: Any, answer: dict[str, Any]) -> None:
    json.dumps(answer).encode()
    source = source_of(event)
    if isinstance(source, Direct):
        assert {"predictions", "outputs", "error"} & answer.keys()
        assert ("error" in answer) == ("status" in answer) == ("code" in answer)
        status = answer.get("status", 200)
    else:
        assert isinstance(answer["body"], str)
        assert isinstance(answer["isBase64Encoded"], bool)
        many = isinstance(source, LoadBalancer) and "multiValueHeaders" in event
        headers = answer["multiValueHeaders" if many else "headers"]
        assert all(isinstance(name, str) and isinstance(value, list if many else str) for name, value in headers.items())
        status = answer["statusCode"]
    assert status < 500, answer


@pytest.fixture(scope="module")
def function(models: Any) -> Function:
    anybody = {"TRIFORM_REPOSITORY": str(models), "TRIFORM_DEFAULT_MODEL": "linear", "TRIFORM_ALLOW_ANONYMOUS": "true"}
    return Function(boot(anybody))


@FEW
@given(event=changed(HTTP) | values)
@example(event={"requestContext": {"elb": None}, "path": "/", "httpMethod": "\ud800"})
def test_every_event_is_answered_in_the_form_of_its_source(function: Function, event: Any) -> None:
    check_answer(event, function(event, context()))


@pytest.mark.slow
@MANY
@given(event=changed(HTTP) | values)
def test_every_event_is_answered_in_the_form_of_its_source_many(function: Function, event: Any) -> None:
    check_answer(event, function(event, context()))


def check_objects(event: Any) -> None:
    try:
        found = deliveries(event)
    except InvalidRequest:
        return
    for delivery in found:
        for notice in delivery.notices or ():
            notice.key.encode()
            assert notice.location.startswith("s3://")


def queued(body: Any) -> Any:
    (record,) = golden_event("sqs")["Records"]
    return {"Records": [{**record, "body": json.dumps(body)}]}


OBJECTS = changed(["s3-put", "s3-test"]) | changed(["s3-put", "s3-test"]).map(queued) | changed(["sqs"]) | values


@FEW
@given(event=OBJECTS)
@example(event={"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": "%ff"}}}]})
@example(event={"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": "\ud800"}}}]})
def test_every_event_tells_of_objects_or_is_refused(event: Any) -> None:
    check_objects(event)


@pytest.mark.slow
@MANY
@given(event=OBJECTS)
def test_every_event_tells_of_objects_or_is_refused_many(event: Any) -> None:
    check_objects(event)


def check_messages(function: Function, event: Any) -> None:
    try:
        works = messages_of(event)
    except InvalidRequest:
        return
    for work in works:
        try:
            decode(work, function.booted.service.models)
        except (InvalidRequest, NotFound) as error:
            str(error)


MESSAGES = changed(["sqs", "sqs-fifo"]) | values


@FEW
@given(event=MESSAGES)
@example(event={"Records": [{"messageId": "a", "body": "\ud800", "\ud800": 1}]})
def test_every_message_is_a_question_or_is_refused(function: Function, event: Any) -> None:
    check_messages(function, event)


@pytest.mark.slow
@MANY
@given(event=MESSAGES)
def test_every_message_is_a_question_or_is_refused_many(function: Function, event: Any) -> None:
    check_messages(function, event)
