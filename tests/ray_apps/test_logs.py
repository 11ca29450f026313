"""A line of the log is one JSON object, whatever stands in it."""

from __future__ import annotations

import logging
import sys

import orjson

from ray_apps.logs import JsonLines
from ray_apps.telemetry import Logged
from triform.telemetry import InferenceRecord
from triform.testing import RecordingTelemetry


def line(message: str, **extra: object) -> dict[str, object]:
    record = logging.makeLogRecord({"name": "triform.http", "levelname": "WARNING", "msg": message, **extra})
    text = JsonLines().format(record)
    assert "\n" not in text
    found: dict[str, object] = orjson.loads(text)
    return found


def test_fields_and_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        told = line('a "quoted"\r\nmessage \x1b[31m', request_id="r-1", exc_info=sys.exc_info())
    assert (told["message"], told["request_id"], told["level"]) == ('a "quoted"\r\nmessage \x1b[31m', "r-1", "WARNING")
    assert "ValueError: two" in str(told["traceback"])


def test_requests_are_logged_as_asked() -> None:
    seen: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    logger, keep = logging.getLogger("ray_apps.telemetry"), Keep()
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    try:
        telemetry = RecordingTelemetry()
        for which in "errors", "all":
            for code in "ok", "overloaded":
                Logged(telemetry, which).record(InferenceRecord(form="serve", code=code, request_id=f"{which}-{code}"))  # type: ignore[arg-type]
    finally:
        logger.removeHandler(keep)
    assert [vars(r)["request_id"] for r in seen] == ["errors-overloaded", "all-ok", "all-overloaded"]
    assert len(telemetry.records) == 4
