"""The log of a replica: one JSON object a line on standard error, where Ray collects it; never a payload."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

import orjson

_USUAL: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Time (UTC), level, logger, message, the traceback where there is one, and every field given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=repr).decode()


def log_as_json() -> None:
    """For what `triform` and `ray_apps` say in this process; a second call changes nothing.

    In a replica `sys.stderr` is Serve's: it makes each line a record of Serve's own log, of level INFO, and that log begins with
    warnings (predict.py). So the lines go to the process's own standard error.
    """
    for name in ("triform", "ray_apps"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
            handler = logging.StreamHandler(sys.__stderr__)
            handler.setFormatter(JsonLines())
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
