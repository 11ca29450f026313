"""The gate on made-up traffic: good canaries pass, each kind of bad one is found by its guard, and nothing is promoted unseen."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.triform.rollout.traffic import windows
from triform.rollout.gate import Verdict, judge
from triform.rollout.policy import Disagreement, Errors, Guards, Latency, Limits, Policy, ScoreShift, Shadow, Step
from triform.rollout.windows import SHADOW, Arm, Shadowed, Sketch, Window

ALL = Policy(
    steps=(Step(weight=0.1, min_requests=500, min_seconds=60), Step(weight=0.5, min_requests=2000, min_seconds=300)),
    shadow=Shadow(sample=0.2, min_requests=500, min_seconds=60),
    guards=Guards(
        errors=Errors(increase=0.01),
        latency=Latency(quantiles=(0.5,)),
        disagreement=Disagreement(limit=0.02),
        score_shift=ScoreShift(limit=0.2),
        limits=Limits(error_rate=0.1, p99_ms=1000, qps=2),
    ),
)


def whole(**canary: Any) -> list[Window]:
    """A rollout to its last step, the canary bad from step 0 on if it is."""
    return [*windows(ALL, SHADOW), *windows(ALL, 0, **canary), *windows(ALL, 1, number=40, **canary)]


def says(verdict: Verdict) -> dict[str, str]:
    return {f.guard: f.says for f in verdict.findings}


def test_a_good_canary_passes_each_step() -> None:
    seen = whole()
    for step, end in (SHADOW, 20), (0, 40), (1, 80):
        verdict = judge(ALL, seen[:end], step, 0.0)
        assert verdict.decision == "PROMOTE", verdict.reasons
    assert {f.guard for f in verdict.findings if f.proof and f.says != "within"} == set()
    assert verdict.requests > 15_000


BAD: list[tuple[str, dict[str, Any]]] = [
    ("errors", {"errors": 0.04}),
    ("latency p50", {"slow": 1.6}),
    ("score_shift", {"scores": (6.0, 2.0)}),
    ("limits.error_rate", {"errors": 0.3}),
    ("limits.p99_ms", {"slow": 60.0}),
]


@pytest.mark.parametrize(("guard", "bad"), BAD, ids=[guard for guard, _ in BAD])
def test_each_kind_of_bad_canary_is_found_by_its_guard(guard: str, bad: dict[str, Any]) -> None:
    verdict = judge(ALL, whole(**bad), 1, 0.0)
    assert verdict.decision == "ROLLBACK"
    assert says(verdict)[guard] == "beyond"
    assert any(reason.startswith(guard) for reason in verdict.reasons)


def test_answers_that_differ_are_found_in_the_shadow() -> None:
    verdict = judge(ALL, windows(ALL, SHADOW, disagree=0.1), SHADOW, 0.0)
    assert (verdict.decision, says(verdict)["disagreement"]) == ("ROLLBACK", "beyond")
    assert judge(ALL, windows(ALL, SHADOW, disagree=0.02), SHADOW, 0.0).decision == "CONTINUE"  # neither shown


def test_too_few_answers_a_second_are_found_as_all_traffic_would_have_them() -> None:
    """1,000 requests in 30 s are 33 a second, of which the canary has a half."""
    policy = msgspec.structs.replace(ALL, guards=Guards(limits=Limits(qps=50)))
    assert says(judge(policy, whole(), 1, 0.0))["limits.qps"] == "beyond"
    policy = msgspec.structs.replace(ALL, guards=Guards(limits=Limits(qps=25)))
    assert says(judge(policy, whole(), 1, 0.0))["limits.qps"] == "open"


def test_what_was_not_reported_is_not_slow() -> None:
    policy = msgspec.structs.replace(ALL, guards=Guards(limits=Limits(qps=25)))
    part = msgspec.structs.replace
    seen = [
        part(w, canary=part(w.canary, requests=w.canary.requests // 4, errors=0), reported=1, expected=4)
        for w in windows(policy, 1, number=40)
    ]
    assert says(judge(policy, seen, 1, 0.0))["limits.qps"] == "no data"
    assert says(judge(policy, [part(w, reported=4) for w in seen], 1, 0.0))["limits.qps"] == "beyond"


def test_a_shift_of_too_few_rows_holds_every_step() -> None:
    """Not the last one alone: else a canary that answers NaN would have its second step."""
    policy = msgspec.structs.replace(ALL, shadow=None, guards=Guards(latency=None, score_shift=ScoreShift(min_rows=1000)))
    few, many = (judge(policy, windows(policy, 0, number=n), 0, 0.0) for n in (8, 40))
    assert (few.decision, many.decision) == ("CONTINUE", "PROMOTE")
    assert "score_shift: no data (fewer than 1,000 rows)" in few.reasons


def test_one_slow_bucket_is_not_hidden_by_the_others() -> None:
    seen = whole()
    slow = windows(ALL, 1, number=40, slow=1.6, buckets=(3,), seed=7)
    mixed = [*seen[:40]]
    for good, bad in zip(seen[40:], slow, strict=True):
        execute = {0: good.canary.execute[0], 3: bad.canary.execute[3]}
        mixed.append(msgspec.structs.replace(good, canary=msgspec.structs.replace(good.canary, execute=execute)))
    assert says(judge(ALL, mixed, 1, 0.0))["latency p50"] == "beyond"


def test_a_canary_that_becomes_bad_late_is_found() -> None:
    seen = [*windows(ALL, SHADOW), *windows(ALL, 0, number=60), *windows(ALL, 1, number=15, errors=0.05)]
    verdict = judge(ALL, seen, 1, 0.0)
    assert (verdict.decision, says(verdict)["errors"]) == ("ROLLBACK", "beyond")


def test_what_looks_bad_waits_though_it_is_not_shown_yet() -> None:
    policy = Policy(
        steps=(Step(weight=0.1, min_requests=100, min_seconds=1), Step(weight=0.5)),
        guards=Guards(errors=Errors(increase=0.03), latency=None),
    )
    for errors, decision in (0.0, "PROMOTE"), (0.12, "CONTINUE"):
        verdict = judge(policy, windows(policy, 0, number=5, requests=300, stable={"errors": 0.0}, errors=errors), 0, 0.0)
        assert (verdict.decision, says(verdict)["errors"] == "beyond") == (decision, False), verdict
    assert "errors: it looks beyond its limit" in verdict.reasons


def test_load_that_hits_both_sides_is_no_fault_of_the_canary() -> None:
    seen: list[Window] = []
    for i, (load, errors) in enumerate([(1.0, 0.01), (3.0, 0.2), (1.0, 0.01), (5.0, 0.05)] * 4):
        seen += windows(
            ALL, 1, number=4, seed=i, slow=load, errors=errors, stable={"slow": load, "errors": errors}
        )  # fmt: skip
    policy = msgspec.structs.replace(ALL, guards=Guards(latency=Latency(quantiles=(0.5, 0.95))))
    assert judge(policy, seen, 1, 0.0).decision != "ROLLBACK"


def test_an_early_look_gives_no_other_rollback_than_a_late_one() -> None:
    """What was beyond a limit once stays so: the verdict does not depend on when the gate was asked."""
    seen = whole(errors=0.05)
    decisions = [judge(ALL, seen[:end], seen[end - 1].step, 0.0).decision for end in range(1, len(seen) + 1, 3)]
    first = decisions.index("ROLLBACK")
    assert set(decisions[first:]) == {"ROLLBACK"}


def test_a_canary_that_looks_beyond_an_absolute_limit_waits() -> None:
    """One of fifty of its requests takes 2 s, and p99 may be 1 s."""
    policy = Policy(steps=(Step(weight=0.5, min_requests=500, min_seconds=60),), guards=Guards(limits=Limits(p99_ms=1000)))
    times, seen, reasons = [0.01] * 98, list[Window](), list[str]()
    for second in range(40):
        arm = Arm(requests=100, request_seconds=Sketch.of([*times, 2.0, 2.0]), execute={0: Sketch.of([0.01] * 100)})
        sound = msgspec.structs.replace(arm, request_seconds=Sketch.of([*times, 0.01, 0.01]))
        seen.append(Window(step=0, seconds=10.0, stable=sound, canary=arm))
        verdict = judge(policy, seen, 0, 10.0 * second)
        assert verdict.decision != "PROMOTE", verdict
        reasons += verdict.reasons
        good = judge(policy, [msgspec.structs.replace(window, canary=sound) for window in seen], 0, 10.0 * second)
        assert not [reason for reason in good.reasons if "limits" in reason and "looks beyond" in reason]
    assert "limits.p99_ms: it looks beyond its limit" in reasons
    assert verdict.decision == "ROLLBACK"


LACKING: list[tuple[str, dict[str, Any]]] = [
    ("errors: no data", {"canary": Arm()}),
    ("latency p50: no data", {"execute": {}}),
    ("score_shift: no data", {"scores": ()}),
    ("limits.p99_ms: no data", {"request_seconds": Sketch()}),
    ("the latest window has 3 of 4 replicas", {"reported": 3, "expected": 4}),
    ("seconds: expected 0.001 to 10,000,000, got nan", {"seconds": float("nan")}),
    ("seconds: expected 0.001 to 10,000,000, got -1", {"seconds": -1.0}),
    ("errors of", {"errors": 10**9}),
    ("errors: no data", {"stable": Arm()}),
]


@pytest.mark.parametrize(("why", "change"), LACKING, ids=[f"{i}-{why}" for i, (why, _) in enumerate(LACKING)])
def test_no_data_never_promotes(why: str, change: dict[str, Any]) -> None:
    """A last step that lacks something in all windows, after earlier ones that had everything."""
    seen = whole()
    of_arm = {k: v for k, v in change.items() if k in ("errors", "scores", "request_seconds", "execute")}
    lacking = []
    for window in seen[40:]:
        canary = msgspec.structs.replace(window.canary, **of_arm)
        lacking.append(msgspec.structs.replace(window, **({"canary": canary} if of_arm else change)))
    verdict = judge(ALL, [*seen[:40], *lacking], 1, 0.0)
    assert verdict.decision == "CONTINUE"
    assert why in "; ".join(verdict.reasons)
    assert judge(ALL, [*seen[:40], *lacking], 1, 1e9).decision == "INCONCLUSIVE"
    assert judge(ALL, [*seen[:40], *lacking], 1, float("nan")).decision == "INCONCLUSIVE"


def test_a_step_that_misses_many_windows_waits() -> None:
    """A canary in the process that answers may take its replica down, which then has nothing to report."""
    seen = whole()
    assert judge(ALL, seen, 1, 0.0).decision == "PROMOTE"
    for every, decision in (10, "PROMOTE"), (2, "CONTINUE"):
        lacks = [msgspec.structs.replace(w, expected=2) if w.step == 1 and i % every == 1 else w for i, w in enumerate(seen)]
        lacks += [msgspec.structs.replace(w, reported=1, expected=1) for w in whole() if w.step == 1][-1:]
        verdict = judge(ALL, lacks, 1, 0.0)
        assert verdict.decision == decision, verdict.reasons
    long = [msgspec.structs.replace(w, seconds=600.0, expected=2) if w is seen[50] else w for w in seen]
    assert judge(ALL, long, 1, 0.0).decision == "CONTINUE", "by its length, as neighbours are put together"
    assert "replicas did not report in 600 of 1230 seconds of this step" in "; ".join(verdict.reasons)


@pytest.mark.parametrize("step", [SHADOW, 0, 1])
def test_nothing_at_all_continues_until_time_is_up(step: int) -> None:
    assert judge(ALL, [], step, 0.0).decision == "CONTINUE"
    assert judge(ALL, [Window(step=step, seconds=30.0)], step, 0.0).decision == "CONTINUE"
    assert judge(ALL, [], step, ALL.longest_seconds).decision == "INCONCLUSIVE"


def test_what_replicas_did_not_report_accuses_but_does_not_acquit() -> None:
    part = [msgspec.structs.replace(w, reported=1, expected=2) for w in whole(errors=0.05)]
    assert judge(ALL, part, 1, 0.0).decision == "ROLLBACK"


def test_a_single_huge_count_neither_overflows_nor_promotes() -> None:
    most = Arm(requests=10**15, errors=10**13, execute={0: Sketch({0: 10**15})}, request_seconds=Sketch({0: 10**15}))
    for shadowed in Shadowed(), Shadowed(requests=10**15, rows=10**15, disagreed=0):
        window = Window(step=1, seconds=1e-3, stable=most, canary=most, shadowed=shadowed)
        assert judge(ALL, [window] * 3, 1, 0.0).decision in ("CONTINUE", "ROLLBACK")


def good_rollouts(number: int) -> list[str]:
    """The first rollback's reasons of each good rollout that was rolled back, by the whole gate with every guard."""
    wrong = []
    for seed in range(number):
        seen = [*windows(ALL, SHADOW, number=8, requests=200, seed=seed, disagree=0.005)]
        seen += [*windows(ALL, 0, number=8, requests=200, seed=seed), *windows(ALL, 1, number=12, requests=200, seed=seed)]
        verdict = judge(ALL, seen, 1, 0.0)
        wrong += list(verdict.reasons) if verdict.decision == "ROLLBACK" else []
    return wrong


def test_the_whole_gate_rolls_back_no_good_canary() -> None:
    assert good_rollouts(20) == []


@pytest.mark.slow
def test_the_whole_gate_hardly_ever_rolls_back_a_good_canary() -> None:
    assert len(good_rollouts(500)) <= 8
