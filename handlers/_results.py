"""Where the answers to messages go: a prefix of S3, a queue, or an event bus; a setting says which.

    s3://bucket/prefix   <prefix>/<message id>.json, created exclusively: one result, however often the message comes
    https://sqs...       a message; at least once. In a FIFO queue in the order of the message groups
    events:BUS           an event of type "triform.answer"; at least once

IAM: s3:PutObject on the prefix, or sqs:SendMessage on the queue, or events:PutEvents on the bus.
"""

from __future__ import annotations

from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from triform.errors import AnswerTooLarge, ConfigurationError, StoreError
from triform.stores.files import FileStore, open_files

MESSAGE_BYTES: Final = 256 << 10  # what every region and both services take
_PATIENT: Final = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 4, "mode": "standard"})


class Results(Protocol):
    """Every method may raise `StoreError`."""

    def put(self, message: str, body: bytes, *, group: str | None = None) -> None:
        """Delivers the answer to a message, JSON. `group`: of a message from a FIFO queue. Raises `AnswerTooLarge`."""


class Files:
    """Below a prefix of S3 (or in a folder, as tests do)."""

    def __init__(self, files: FileStore) -> None:
        self._files = files

    def put(self, message: str, body: bytes, *, group: str | None = None) -> None:  # noqa: ARG002 - files have no order
        self._files.create(f"{message}.json", body)


class Queue:
    """SQS. A message that is too large is an error, never cut."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = boto3.client("sqs", config=_PATIENT)

    def put(self, message: str, body: bytes, *, group: str | None = None) -> None:
        _check_size(body)
        fifo = {"MessageGroupId": group or "triform", "MessageDeduplicationId": message} if self._url.endswith(".fifo") else {}
        try:
            self._client.send_message(QueueUrl=self._url, MessageBody=body.decode(), **fifo)
        except (ClientError, BotoCoreError) as error:
            raise StoreError(f"SQS does not take the answer ({_name(error)}): it needs sqs:SendMessage") from error


class Bus:
    """EventBridge."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._client = boto3.client("events", config=_PATIENT)

    def put(self, message: str, body: bytes, *, group: str | None = None) -> None:  # noqa: ARG002 - events have no order
        _check_size(body)
        entry = {"Source": "triform", "DetailType": "triform.answer", "Detail": body.decode(), "EventBusName": self._name}
        try:
            answer: dict[str, Any] = self._client.put_events(Entries=[entry])
        except (ClientError, BotoCoreError) as error:
            raise StoreError(f"EventBridge does not take the answer ({_name(error)}): it needs events:PutEvents") from error
        if answer.get("FailedEntryCount"):
            code = (answer.get("Entries") or [{}])[0].get("ErrorCode")
            raise StoreError(f"EventBridge does not take the answer to {message} ({code})")


def _name(error: Exception) -> str:
    code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
    return str(code or type(error).__name__)


def _check_size(body: bytes) -> None:
    if len(body) > MESSAGE_BYTES - 1024:  # the rest is for the event around it
        raise AnswerTooLarge(
            f"the answer has {len(body)} bytes, more than a message takes: send fewer rows at a time, or use s3://"
        )


def open_results(location: str | None) -> Results:
    """What the setting names. Raises `ConfigurationError`."""
    if location is None:
        raise ConfigurationError("TRIFORM_RESULTS is not set: s3://bucket/prefix, a queue's URL, or events:BUS")
    if location.startswith("events:"):
        if not location.removeprefix("events:"):
            raise ConfigurationError("TRIFORM_RESULTS: events: needs the bus, for instance events:default")
        return Bus(location.removeprefix("events:"))
    if urlsplit(location).scheme in ("https", "http"):
        return Queue(location)
    return Files(open_files(location))
