"""Which messages were answered before, in a DynamoDB table, by Powertools' persistence layer.

    claim(message) -> mine -> answer it -> done(message), or give_back(message) where that failed
                   -> answered before -> nothing to do          -> another environment is at it -> come again

Powertools' decorator does this around one function call; here the rows of several messages are one run, so its layer is called
directly. Whoever dies between the answer's delivery and `done` has answered, and the message is answered again once the claim has
run out with that invocation's time: at least once, unless the results themselves are exclusive.

IAM: dynamodb:PutItem, UpdateItem and DeleteItem on the table (its key is the text `id`; let `expiration` be its TTL).
"""

from __future__ import annotations

from typing import Any, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from handlers._telemetry import Context
from triform.errors import ConfigurationError, LeaseHeld, StoreError


class Claims(Protocol):
    def claim(self, message: str, context: Context) -> bool:
        """Whether the message is the caller's to answer; False: it was answered. Raises `LeaseHeld`, `StoreError`."""

    def done(self, message: str) -> None:
        """It was answered. Raises `StoreError`."""

    def give_back(self, message: str) -> None:
        """It was not, and may be at once. Raises `StoreError`."""


class NoClaims:
    """Every message is the caller's."""

    def claim(self, message: str, context: Context) -> bool:  # noqa: ARG002 - the protocol's
        return True

    def done(self, message: str) -> None:
        """Does nothing."""

    def give_back(self, message: str) -> None:
        """Does nothing."""


class TableClaims:
    """In a table; see the module."""

    def __init__(self, table: str, seconds: int) -> None:
        try:
            from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer, IdempotencyConfig
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"TRIFORM_IDEMPOTENCY_TABLE needs {error.name}: install triform[lambda]") from error
        self._layer = DynamoDBPersistenceLayer(table_name=table)
        config = IdempotencyConfig(expires_after_seconds=seconds, hash_function="sha256")
        self._layer.configure(config, function_name="handlers.sqs")

    def claim(self, message: str, context: Context) -> bool:
        from aws_lambda_powertools.utilities.idempotency.exceptions import IdempotencyItemAlreadyExistsError

        try:
            self._layer.save_inprogress(_key(message), context.get_remaining_time_in_millis())
        except IdempotencyItemAlreadyExistsError as error:
            record = error.old_data_record
            if record is not None and record.status == "COMPLETED":
                return False
            raise LeaseHeld(f"message {message} is being answered by another environment") from None
        except (ClientError, BotoCoreError) as error:
            raise _explained(error) from error
        return True

    def done(self, message: str) -> None:
        try:
            self._layer.save_success(_key(message), {})
        except (ClientError, BotoCoreError) as error:
            raise _explained(error) from error

    def give_back(self, message: str) -> None:
        try:
            self._layer.delete_record(_key(message), StoreError("not answered"))
        except (ClientError, BotoCoreError) as error:
            raise _explained(error) from error


def _key(message: str) -> dict[str, Any]:
    return {"message": message}


def _explained(error: Exception) -> StoreError:
    return StoreError(f"the table of TRIFORM_IDEMPOTENCY_TABLE does not answer ({type(error).__name__})")


def open_claims(table: str | None, seconds: int) -> Claims:
    return NoClaims() if table is None else TableClaims(table, seconds)
