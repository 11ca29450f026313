"""A function as the platform starts it: its module imported anew in an environment, then called with golden events."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EVENTS = Path(__file__).parent.parent / "events"
Handler = Callable[[Any, Any], Any]


class Invocation:
    """What a function asks of Lambda's context."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.aws_request_id = "8f5c1f3e-0000-4000-8000-000000000001"
        self.milliseconds = int(seconds * 1000)

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


def golden_event(name: str, **replaced: str) -> Any:
    """The event in tests/events, with each {NAME} in it replaced."""
    text = (EVENTS / f"{name}.json").read_text()
    for key, value in replaced.items():
        text = text.replace(f"{{{key.upper()}}}", json.dumps(value)[1:-1])
    return json.loads(text)


def start(module: str, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Handler:
    """`handlers.<module>.handler`, of a fresh environment with these TRIFORM_* settings."""
    for key, value in settings.items():
        monkeypatch.setenv(f"TRIFORM_{key.upper()}", str(value))
    monkeypatch.delitem(sys.modules, f"handlers.{module}", raising=False)
    handler: Handler = importlib.import_module(f"handlers.{module}").handler
    return handler


def metrics(printed: str, name: str) -> list[dict[str, Any]]:
    """The EMF objects with that metric, among what a function printed."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [line for line in lines if "_aws" in line and name in line]
