"""A recorded verdict can be recomputed by anybody, and a change of any of it is seen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.triform.rollout.traffic import windows
from triform.errors import InvalidInput
from triform.rollout.evidence import Evidence, decode, encode, replay
from triform.rollout.gate import judge
from triform.rollout.policy import Guards, Latency, Limits, Policy, ScoreShift, Step

POLICY = Policy(
    steps=(Step(weight=0.5, min_requests=100, min_seconds=60),),
    guards=Guards(latency=Latency(quantiles=(0.5,)), score_shift=ScoreShift(), limits=Limits(p99_ms=1000, qps=5)),
)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    seen = windows(POLICY, 0, number=5, errors=0.2)
    return Evidence(model="linear", stable=1, canary=2, policy=POLICY, windows=tuple(seen), verdict=judge(POLICY, seen, 0, 150.0))


def test_a_verdict_survives_the_file(evidence: Evidence) -> None:
    read = decode(encode(evidence))
    assert read == evidence
    replayed = replay(read)
    assert (replayed.verdict, replayed.differences) == (evidence.verdict, ())
    assert evidence.verdict.decision == "ROLLBACK"


def test_evidence_from_before_guards_said_why_is_replayed(evidence: Evidence) -> None:
    before = encode(evidence).replace(b',"why":""', b"")
    assert before != encode(evidence)
    assert replay(decode(before)).differences == ()


def test_a_change_of_the_evidence_or_the_verdict_is_told(evidence: Evidence) -> None:
    fewer = msgspec.structs.replace(evidence, windows=evidence.windows[:1])
    assert any(d.startswith("requests: recorded") for d in replay(fewer).differences)
    other = msgspec.structs.replace(evidence, verdict=msgspec.structs.replace(evidence.verdict, decision="PROMOTE"))
    assert replay(other).differences == ("decision: recorded PROMOTE, recomputed ROLLBACK",)
    kinder = msgspec.structs.replace(POLICY, alpha=1e-6)
    assert any("against_at" in d for d in replay(msgspec.structs.replace(evidence, policy=kinder)).differences)


BAD = [b"", b"{}", b"[" * 100_000, b'{"format": 2', b"\xff", b"null"]


@pytest.mark.parametrize("content", BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_no_evidence_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"^it\.json: not the evidence of a rollout: "):
        decode(content, "it.json")


def test_evidence_of_another_format_or_with_a_bad_policy_is_refused(evidence: Evidence, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="evidence of format 2"):
        decode(encode(msgspec.structs.replace(evidence, format=2)))
    with pytest.raises(InvalidInput, match="a verdict on step 7 of 1"):
        decode(encode(msgspec.structs.replace(evidence, verdict=msgspec.structs.replace(evidence.verdict, step=7))))
    with pytest.raises(InvalidInput, match="weight"):
        decode(encode(evidence).replace(b'"weight":0.5', b'"weight":7.5'))
