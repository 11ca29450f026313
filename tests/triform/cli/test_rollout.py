"""`triform rollout replay`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.triform.rollout.test_evidence import POLICY
from tests.triform.rollout.traffic import windows
from triform.rollout.evidence import Evidence, encode
from triform.rollout.gate import judge

Triform = Callable[..., Any]


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    seen = windows(POLICY, 0, number=5, errors=0.2)
    recorded = Evidence(
        model="linear", stable=1, canary=2, policy=POLICY, windows=tuple(seen), verdict=judge(POLICY, seen, 0, 0.0)
    )
    path = tmp_path / "evidence.json"
    path.write_bytes(encode(recorded))
    return path


def test_a_verdict_is_recomputed(triform: Triform, evidence: Path) -> None:
    said = triform("rollout", "replay", evidence)
    assert (said.code, said.err) == (0, "")
    assert "ROLLBACK: linear/2 beside 1, step 1 of 1" in said.out
    assert "errors: beyond its limit (canary 0.2" in said.out
    assert "the recorded verdict, recomputed" in said.out
    told = triform("rollout", "replay", evidence, "--json").json
    assert (told["same"], told["differences"], told["verdict"]["decision"]) == (True, [], "ROLLBACK")


def test_another_verdict_than_the_recorded_one_fails(triform: Triform, evidence: Path) -> None:
    recorded = msgspec.json.decode(evidence.read_bytes())
    recorded["verdict"]["decision"] = "PROMOTE"
    evidence.write_bytes(msgspec.json.encode(recorded))
    said = triform("rollout", "replay", evidence)
    assert (said.code, "differs: decision: recorded PROMOTE, recomputed ROLLBACK" in said.out) == (1, True)
    assert triform("rollout", "replay", evidence, "--json").json["same"] is False


def test_what_is_no_evidence_is_wrong_use(triform: Triform, tmp_path: Path) -> None:
    assert triform("rollout", "replay", tmp_path / "none.json").code == 2
    (tmp_path / "bad.json").write_text("{}")
    said = triform("rollout", "replay", tmp_path / "bad.json", "--json")
    assert (said.code, said.json["code"]) == (2, "invalid_input")
