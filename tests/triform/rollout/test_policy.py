"""`rollout.toml`: read as written, and every bad value refused by its key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from triform.errors import ConfigurationError
from triform.rollout import policy as policy_module
from triform.rollout.policy import Disagreement, Limits, Policy, Shadow, Step, read_policy
from triform.splitting import KeyRule

STEPS = "[[steps]]\nweight = 0.1\n[[steps]]\nweight = 0.5\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rollout.toml"
    path.write_text(text)
    return path


def test_the_docstrings_example_is_what_it_says(tmp_path: Path) -> None:
    lines = re.findall(r"^    (.*)$", policy_module.__doc__ or "", re.MULTILINE)
    read = read_policy(written(tmp_path, "\n".join(lines)))
    assert read.steps == (Step(weight=0.01, min_requests=500, min_seconds=300),)
    assert read.shadow == Shadow(sample=0.1, min_requests=500, min_seconds=600)
    assert read.key == KeyRule("x-user-id", "user_id")
    assert read.guards.disagreement == Disagreement(limit=0.01)
    assert read.guards.limits == Limits(error_rate=0.1, p99_ms=1000, qps=50)


def test_an_empty_file_is_the_default_policy(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "")) == Policy()
    assert msgspec.json.decode(msgspec.json.encode(Policy()), type=Policy) == Policy()


BAD: list[tuple[str, str]] = [
    ("x = 1", "unknown field 'x'"),
    ("steps = []", "steps: expected 1 to 20, got 0"),
    ("[[steps]]\nweight = 0", "steps[0].weight: expected 0.0001 to 1, got 0"),
    ("[[steps]]\nweight = nan", "steps[0].weight: expected 0.0001 to 1, got nan"),
    ("[[steps]]\nweight = -0.1", "steps[0].weight"),
    ("[[steps]]\nweight = 1.5", "steps[0].weight"),
    ("[[steps]]\nweight = 1.0", "steps[0].weight: expected 0.95 at most"),
    ("[[steps]]\nweight = 0.00015", "steps[0].weight: expected a multiple of 0.0001, got 0.00015"),
    ("[[steps]]\nweight = true", "Expected 'float', got 'bool' - at '$.steps[0].weight'"),
    ("[[steps]]\nweigth = 0.1", "steps[0]"),
    ("[[steps]]\nweight = 0.5\n[[steps]]\nweight = 0.1", "steps: expected rising weights, got [0.5, 0.1]"),
    ("[[steps]]\nweight = 0.1\nmin_requests = 0", "steps[0].min_requests: expected 1 to"),
    ("[[steps]]\nweight = 0.1\nmin_requests = 1.5", "Expected 'int'"),
    ("[[steps]]\nweight = 0.1\nmin_seconds = inf", "steps[0].min_seconds"),
    (STEPS + "[shadow]\nsample = 0", "shadow.sample: expected 0.0001 to 1, got 0"),
    ("alpha = 0", "alpha: expected 1e-06 to 0.2, got 0"),
    ("beta = nan", "beta: expected"),
    ("longest_seconds = 60", "longest_seconds: expected at least the 1500 that the steps take, got 60"),
    ('inconclusive = "promote"', "Invalid enum value 'promote' - at '$.inconclusive'"),
    ("[guards.errors]\nincrease = 0", "guards.errors.increase: expected 1e-05 to 0.5, got 0"),
    ("[guards.errors]\nratio = 0.5", "guards.errors.ratio"),
    ("[guards.latency]\nratio = 1.0\nmargin_ms = 0", "guards.latency: expected a ratio from 1.05 or a margin"),
    ("[guards.latency]\nquantiles = []", "guards.latency.quantiles: expected rising numbers from 0.05 to 0.99, got []"),
    ("[guards.latency]\nquantiles = [0.9, 0.5]", "guards.latency.quantiles"),
    ("[guards.latency]\nquantiles = [0.999]", "guards.latency.quantiles"),
    ("[guards.disagreement]\nlimit = 0.1", "guards.disagreement: expected a [shadow] table"),
    ("[shadow]\n[guards.disagreement]\nlimit = 1", "guards.disagreement.limit"),
    ("[guards.score_shift]\nmin_rows = 999", "guards.score_shift.min_rows: expected 1000 to"),
    ("[guards.score_shift]\nedges = [nan]", "guards.score_shift.edges: expected rising numbers, got [nan]"),
    ("[guards.limits]\nqps = -1", "guards.limits.qps"),
    ("[guards.limits]\nerror_rate = 1", "guards.limits.error_rate: expected 0.0001 to 0.99, got 1"),
    ("[guards.limits]\np999_ms = 1", "unknown field 'p999_ms'"),
    ('[key]\nheader = " "', "key.header: expected a name, got ' '"),
    ("[[steps]\n", "not TOML"),
]


@pytest.mark.parametrize(("text", "told"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_value_is_refused_by_its_key(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as error:
        read_policy(path)
    assert str(error.value).startswith(f"{path}: ")
    assert told in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml: cannot be read"):
        read_policy(tmp_path / "none.toml")
