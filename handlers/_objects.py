"""The objects that an event tells of: S3's notifications, direct or in the messages of an SQS queue.

    event -> deliveries -> [Delivery(message, [Notice(bucket, key), ...]), ...]

Keys arrive URL-encoded. `s3:TestEvent`, which S3 sends when notifications are set up, and events of objects that were removed
tell of nothing to do. Shapes: AWS, "Event message structure".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from triform.errors import InvalidRequest

# What an event of another shape comes to; a ValueError is one of msgspec's, a body that is no JSON, or a key that is no UTF-8.
_UNREADABLE: Final = (TypeError, KeyError, AttributeError, ValueError)


class Notice(NamedTuple):
    """An object that was created."""

    bucket: str
    key: str

    @property
    def location(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


class Delivery(NamedTuple):
    """What was delivered at once. `message`: the id to report where it fails; None of an event that came directly."""

    message: str | None
    notices: list[Notice] | None  # None: it cannot be read


class _Bucket(msgspec.Struct):
    name: str


class _Object(msgspec.Struct):
    key: str


class _S3(msgspec.Struct):
    bucket: _Bucket
    object: _Object


class _Record(msgspec.Struct, rename="camel"):
    s3: _S3
    event_name: str = ""


class _Message(msgspec.Struct, rename="camel"):
    message_id: str
    body: str
    event_source: str


def deliveries(event: Any) -> list[Delivery]:
    """What the event brings. Raises `InvalidRequest` for one that is of neither kind."""
    if _is_test(event):
        return []
    try:
        records = event["Records"]
        if isinstance(records, list) and records and records[0].get("eventSource") == "aws:sqs":
            return [_of_message(msgspec.convert(record, _Message)) for record in records]
        return [Delivery(None, list(_notices(event)))]
    except _UNREADABLE as error:
        raise InvalidRequest("this is no event of S3, nor of a queue that S3 sends to") from error


def _of_message(message: _Message) -> Delivery:
    try:
        content = orjson.loads(message.body)
        return Delivery(message.message_id, [] if _is_test(content) else list(_notices(content)))
    except _UNREADABLE:
        return Delivery(message.message_id, None)


def _is_test(event: Any) -> bool:
    return isinstance(event, dict) and event.get("Event") == "s3:TestEvent"


def _notices(event: Any) -> Iterator[Notice]:
    for record in msgspec.convert(event["Records"], list[_Record]):
        key = unquote_to_bytes(record.s3.object.key.replace("+", " ")).decode()
        if "ObjectRemoved" not in record.event_name and not key.endswith("/"):  # consoles make "folders" so
            yield Notice(record.s3.bucket.name, key)
