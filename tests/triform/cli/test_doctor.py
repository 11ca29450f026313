"""`triform doctor`: plain lines, JSON, an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Triform = Callable[..., Any]


def test_lines_say_what_is_open_and_what_to_do(triform: Triform, tmp_path: Path) -> None:
    said = triform("doctor", "-r", tmp_path)
    assert (said.code, said.err) == (1, "")
    (repository,) = [line for line in said.out.splitlines() if " repository " in line]
    assert repository.startswith("open    repository this process may change what is served")
    assert "read-only mount" in repository


def test_json_has_the_same_for_programs(triform: Triform, tmp_path: Path) -> None:
    said = triform("doctor", "-r", tmp_path, "--json")
    assert (said.code, said.json["open"]) == (1, True)
    checks = {finding["check"] for finding in said.json["findings"]}
    assert checks >= {"anonymous", "audit", "repository", "user", "ports"}
    assert {finding["state"] for finding in said.json["findings"]} <= {"open", "ok", "unknown"}


def test_serves_own_arguments_count(triform: Triform, tmp_path: Path) -> None:
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"repository": "s3://b/models", "allow_anonymous": True, "models": ["churn"], "num_replicas": 2}))
    told = {finding["check"]: finding["state"] for finding in triform("doctor", "--args", args, "--json").json["findings"]}
    assert (told["anonymous"], told["repository"]) == ("open", "unknown")
    args.write_text("[]")
    assert triform("doctor", "--args", args).code == 2
