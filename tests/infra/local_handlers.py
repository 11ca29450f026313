"""A handler that naps, fails, dies or talks too much as its request asks: what the local gateway is tried on."""

from __future__ import annotations

import json
import os
import time
from typing import Any

calls = 0


def nap(event: dict[str, Any], context: Any) -> dict[str, Any]:
    global calls
    calls += 1
    asked = json.loads(event["body"])
    if "exit" in asked:
        os._exit(asked["exit"])
    if "fail" in asked:
        raise ValueError(asked["fail"])
    time.sleep(asked.get("nap", 0))
    body = json.dumps({"pid": os.getpid(), "calls": calls})
    return {"statusCode": 200, "headers": {}, "body": "x" * asked["answer"] if "answer" in asked else body}
