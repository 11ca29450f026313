"""The function that answers HTTP requests and direct invocations; Lambda's entry point is `handlers.predict.handler`.

environ -> _boot.py -> _function.py: event -> triform/http.py -> answer
"""

from __future__ import annotations

import os
from typing import Any, Final

import handlers._start as start
from handlers._boot import boot
from handlers._function import Function
from handlers._snapshots import register
from handlers._telemetry import Context

function: Final = Function(boot(os.environ))
register(function.booted, function.references.forget)
start.resume()


def handler(event: Any, context: Context) -> dict[str, Any]:
    return function(event, context)
