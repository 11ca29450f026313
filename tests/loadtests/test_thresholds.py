"""Limits from TOML, what breaks them, and what CI is told."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests.junit import junit
from loadtests.options import TARGETS
from loadtests.records import OK, REFUSED, TIMEOUT, WRONG
from loadtests.report import pictures, report
from loadtests.shapes import SHAPES
from loadtests.thresholds import FILE, Limits, judge, read_limits
from tests.loadtests.made import found
from triform.errors import ConfigurationError

GOOD = [(i / 10, 0.01, OK) for i in range(100)]


def broken(limits: Limits, *requests: tuple[float, float, str], shape: str = "soak", **counters: object) -> list[str]:
    return [check.name for check in judge(found(*requests, shape=shape, **counters), limits) if not check.kept]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_target_has_limits_in_every_shape(target: str, shape: str) -> None:
    limits = read_limits(FILE, target, shape)
    assert None not in (limits.p99_ms, limits.error_rate, limits.minimum_rate, limits.refused_share)


def test_a_shape_may_have_limits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[mine]\np50_ms = 5\np99_ms = 50\n[mine.spike]\np99_ms = 500\n")
    assert read_limits(file, "mine", "soak") == Limits(p50_ms=5, p99_ms=50)
    assert read_limits(file, "mine", "spike") == Limits(p50_ms=5, p99_ms=500)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[serve]\np98_ms = 5", r"serve: .*p98_ms"),
        ("[serve]\np99_ms = 'fast'", r"serve: .*p99_ms"),
        ("[serve]\np99_ms = nan", r"serve\.p99_ms"),
        ("[serve]\nerror_rate = -1", r"serve\.error_rate"),
        ("[serve.soak]\nminimum_rat = 1", r"serve\.soak: .*minimum_rat"),
        ("[serve.square]\np99_ms = 1", r"square"),
        ("serve = 5", "serve"),
        ("[other]\np99_ms = 1", r"there is no \[serve\]"),
        ("[serve", "no TOML"),
    ],
)
def test_limits_that_cannot_be_meant_are_named(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"limits\.toml.*{named}"):
        read_limits(file, "serve", "soak")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.toml"):
        read_limits(tmp_path / "nothing.toml", "serve", "soak")


def test_each_limit_breaks_on_its_own() -> None:
    assert broken(Limits(p50_ms=20, p99_ms=20, p999_ms=20, error_rate=0, refused_share=0, minimum_rate=9), *GOOD) == []
    assert broken(Limits(p50_ms=9.9), *GOOD) == ["p50_ms"]
    slow = [*GOOD[:-2], (9.8, 1.0, OK), (9.9, 1.0, OK)]
    assert broken(Limits(p50_ms=20, p99_ms=20, p999_ms=20), *slow) == ["p99_ms", "p999_ms"]
    assert broken(Limits(error_rate=0.02, refused_share=0), *GOOD, (5.0, 1.0, TIMEOUT)) == []
    assert broken(Limits(error_rate=0.001), *GOOD, (5.0, 1.0, TIMEOUT)) == ["error_rate"]
    assert broken(Limits(error_rate=0, refused_share=0), *GOOD, (5.0, 0.1, REFUSED)) == ["refused_share"]
    assert broken(Limits(minimum_rate=11), *GOOD) == ["minimum_rate"]


def test_a_wrong_answer_breaks_every_run_and_so_does_none() -> None:
    assert broken(Limits(), *GOOD, (5.0, 0.1, WRONG)) == ["no answer differs from the batch job's"]
    assert broken(Limits()) == ["something was answered"]
    assert broken(Limits(p99_ms=5), (1.0, 1.0, REFUSED)) == ["something was answered", "p99_ms"]


def test_counters_that_differ_break_it_where_they_may_not() -> None:
    assert broken(Limits(), *GOOD, server={OK: 100}, prometheus={OK: 100}) == []
    assert broken(Limits(), *GOOD, server={OK: 99}) == ["counters agree"]
    assert broken(Limits(), *GOOD, server={OK: 99}, exact=False) == []


def test_steps_are_judged_by_the_last_one_before_the_first_that_broke_a_limit() -> None:
    """Ten steps of a second; from the seventh on everything takes half a second, and the ninth would be good again."""
    requests = [
        (step + i / (10 * (step + 1)), 0.5 if step in (6, 7, 9) else 0.01, OK)
        for step in range(10)
        for i in range(10 * (step + 1))
    ]
    limits = Limits(p99_ms=100, minimum_rate=50)
    checks = {check.name: check for check in judge(found(*requests, shape="steps"), limits)}
    assert checks["minimum_rate"].kept
    assert checks["p99_ms"].said.endswith("in the step of 60/s")
    assert broken(Limits(p99_ms=100, minimum_rate=70), *requests, shape="steps") == ["minimum_rate"]
    assert broken(Limits(p99_ms=1, minimum_rate=1), *requests, shape="steps") == ["p99_ms"]


def test_junit_has_a_case_for_each_check() -> None:
    run = found(*GOOD, (5.0, 0.1, WRONG))
    checks = judge(run, Limits(p50_ms=1, minimum_rate=1))
    suite = ElementTree.fromstring(junit(run, checks)).find("testsuite")  # noqa: S314 - our own
    assert suite is not None
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("loadtests.serve.soak", str(len(checks)), "2")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["no answer differs from the batch job's", "p50_ms"]


def test_the_page_stands_alone_and_says_what_was_broken() -> None:
    run = found(*GOOD, (5.0, 0.1, "http_500_<script>"))
    page = report(run, judge(run, Limits(error_rate=0))).decode()
    assert "Limits were broken" in page
    assert "<script" not in page
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http://" not in page.replace("http://127.0.0.1:1", "")
    assert {*pictures(run)} == {"latency-by-rate", "rate", "latency", "queue"}
    assert pictures(run) == pictures(run), "the same numbers give the same pictures"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_can_be_drawn_even_if_nothing_was_answered(shape: str) -> None:
    for requests in ([], [(1.0, 0.1, REFUSED)], GOOD):
        run = found(*requests, shape=shape)
        assert report(run, judge(run, Limits(p99_ms=1)))
